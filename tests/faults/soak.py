"""Minutes of faults at random: `make soak`, or with `ARGS="--minutes 3"`. Not part of `make test`.

Small jobs come all the time to workers with a fake model, most of them idle, and one runs for ten
minutes. Workers are killed (the goal is 200 in 20 minutes), children die, connections are cut,
Redis stops and restarts. In the end every id that was submitted has an answer, only one was ever
shown, it is one that its kind of job may have, and the long job was begun once; otherwise the exit
status is 1.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from support.figures import Tally
from support.processes import Worker
from support.scene import CLEAN, Scene
from support.valkey import Valkey
from support.witness import TERMINAL
from zlora import JobHandle
from zlora.errors import BrokerUnavailable, JobPoisoned, ZloraError

WORKERS: Final = 3  # beside the one with the long job
KILLS_A_MINUTE: Final = 13  # in 17 of 20 minutes
GOAL: Final = 10  # workers killed in a minute of the whole run
SETTLING: Final = 150.0  # seconds at the end without faults, in which what is open is to end
RECKONING: Final = 30.0  # seconds after that
LONG: Final = 600  # seconds of the job that must not be begun twice
PAUSES: Final = (0.02, 0.3)  # seconds between two jobs
POISONED: Final = "poisoned, 3 attempts"

# What a job may come to. The slow ones meet workers that die under them, now and then three in a
# row.
ALLOWED: Final = {
    "plain": {"drawn"},
    "twice": {"drawn"},
    "slow": {"drawn", POISONED},
    "cancelled": {"job_revoked", "drawn"},
    "dying": {"drawn", POISONED},
    "long": {"drawn"},
}
SHOWN: Final = 20  # ids in the report of each kind of wrong
NEVER: Final = ("internal", "timeout", "unknown")


@dataclass
class Fleet:
    """The workers that die, and those that take their place."""

    scene: Scene
    running: list[tuple[Worker, ExitStack]] = field(default_factory=list)
    started: int = 0
    killed: int = 0

    def start(self) -> None:
        """One more, which loads its model while the jobs come."""
        self.started += 1
        stack = ExitStack()
        self.running.append(
            (stack.enter_context(self.scene.starting_worker(f"w{self.started}")), stack)
        )

    def kill_one(self) -> None:
        """kill -9 of a parent, busy or not, of those that take jobs if there is one; another takes its place."""
        ready = [item for item in self.running if item[0].lines(" ready.")]
        item = random.choice(ready or self.running)
        self.running.remove(item)
        worker, stack = item
        if worker.process.poll() is not None:
            last = worker.log.read_text()[-4000:]
            raise SystemExit(
                f"a worker has ended by itself, with status {worker.process.returncode}:\n{last}"
            )
        self.scene.kill(worker.process.pid)
        self.killed += 1
        stack.close()
        self.start()

    def stop(self) -> None:
        """End all that run."""
        for _, stack in self.running:
            stack.close()


@dataclass
class Producer:
    """Submits until it is told to stop, in a thread of its own; some jobs misbehave, some come twice, some go."""

    scene: Scene
    over: threading.Event = field(default_factory=threading.Event)
    kinds: Counter[str] = field(default_factory=Counter)

    def run(self) -> None:
        """The thread."""
        while not self.over.wait(random.uniform(*PAUSES)):
            kind = random.choices(
                ("plain", "slow", "dying", "twice", "cancelled"), (70, 10, 5, 10, 5)
            )[0]
            self.kinds[kind] += 1
            name = f"{kind}-{self.kinds[kind]}"
            patiently(lambda: SUBMIT[kind](self.scene, name))  # noqa: B023 - called at once


def patiently(submit: Callable[[], object]) -> None:
    """What a producer does whose Redis is away: the same again, until it is there."""
    while True:
        try:
            submit()
        except BrokerUnavailable:
            time.sleep(0.5)
        else:
            return


def twice(scene: Scene, name: str) -> None:
    """One id from two producers."""
    scene.submit(job_id=name), scene.submit(job_id=name)


def cancelled(scene: Scene, name: str) -> None:
    """Submitted and not wanted any more."""
    scene.submit(job_id=name, steps=20, step=0.05).cancel()


SUBMIT: Final[dict[str, Callable[[Scene, str], object]]] = {
    "plain": lambda scene, name: scene.submit(job_id=name, steps=1, step=0),
    "slow": lambda scene, name: scene.submit(job_id=name, steps=10, step=0.1),
    "dying": lambda scene, name: scene.submit(job_id=name, steps=2, do=["kill-child"]),
    "twice": twice,
    "cancelled": cancelled,
}


def main(minutes: float) -> int:
    """The exit status."""
    start = time.monotonic()
    tally, settled_by = Tally(), start + max(60 * minutes - RECKONING, 60.0)
    calm_from = max(settled_by - SETTLING, start + 40.0)
    with tempfile.TemporaryDirectory(prefix="zlora-soak-") as name, ExitStack() as stack:
        folder = Path(name)
        (folder / "valkey").mkdir()
        valkey = stack.enter_context(Valkey(folder / "valkey", tally))
        scene = Scene(folder / "scene", tally, broker_url=valkey.url, queue="soak")
        stack.callback(scene.close)
        # The worker of the long job is none of those that die.
        stack.enter_context(scene.worker("steady"))
        seconds = min(LONG, 0.8 * (calm_from - time.monotonic()))
        long = scene.submit(job_id="long", steps=200, step=seconds / 200)
        scene.wait_begun(long)
        fleet, producer = Fleet(scene), Producer(scene)
        stack.callback(fleet.stop)
        for _ in range(WORKERS):
            fleet.start()
        hurt(scene, valkey, fleet, producer, until=calm_from)
        settle(scene, until=settled_by)
        say(
            f"{fleet.killed} workers were killed; the goal is {round(GOAL * minutes)} in {minutes:g} minutes"
        )
        if fleet.killed < GOAL * minutes:
            say(f"that is {round(GOAL * minutes) - fleet.killed} less than the goal")
        return verdict(scene, long)


def hurt(scene: Scene, valkey: Valkey, fleet: Fleet, producer: Producer, *, until: float) -> None:
    """One fault after the other, while jobs come."""
    every: dict[Callable[[], object], float] = {
        fleet.kill_one: 60 / KILLS_A_MINUTE,
        valkey.cut_all: 47,
        lambda: pause(valkey): 101,
        lambda: restart(valkey): 163,
        lambda: report(scene, producer.kinds, killed=fleet.killed): 30,
    }
    start = time.monotonic()
    due = {act: start + period for act, period in every.items()}
    thread = threading.Thread(target=producer.run, daemon=True)
    thread.start()
    while (now := time.monotonic()) < until:
        for act in [act for act, at in due.items() if at <= now]:
            act()
            due[act] += every[act]
        time.sleep(0.05)
    producer.over.set()
    thread.join()


def pause(valkey: Valkey) -> None:
    """A Redis that says nothing for some seconds."""
    valkey.pause()
    time.sleep(8)
    valkey.resume()


def restart(valkey: Valkey) -> None:
    """kill -9 of Redis, which comes back with what is in its append-only file."""
    valkey.kill()
    time.sleep(3)
    valkey.start()


def settle(scene: Scene, *, until: float) -> None:
    """Wait until every job has ended."""
    while (left := open_jobs(scene)) and time.monotonic() < until:
        say(f"{len(left)} jobs are open, such as {', '.join(left[:5])}")
        time.sleep(5)


def open_jobs(scene: Scene) -> list[str]:
    """Ids without a verdict."""
    return [
        name
        for name, handle in list(scene.handles.items())
        if handle.status().state not in TERMINAL
    ]


def report(scene: Scene, kinds: Counter[str], *, killed: int) -> None:
    """A line for whoever waits."""
    deaths = scene.tally.faults + len(scene.events("fault"))
    say(f"{len(scene.handles)} jobs ({dict(kinds)}), {deaths} faults, {killed} workers killed")


def verdict(scene: Scene, long: JobHandle) -> int:
    """Say what came of it all."""
    found = scene.audit()
    answers = {name: answer(handle) for name, handle in scene.handles.items()}
    for kind in ALLOWED:
        say(
            f"{kind}: {dict(Counter(told for name, told in answers.items() if kind_of(name) == kind))}"
        )
    never = Counter(told for told in answers.values() if told in NEVER)
    say(", ".join(f"{code} {never[code]}" for code in NEVER))
    wrong = [name for name, told in answers.items() if told not in ALLOWED[kind_of(name)]]
    say(
        f"the job of minutes was begun {scene.begun(long)} times; {len(wrong)} jobs came to what they may not"
    )
    say(scene.tally.row())
    for what, names in {**found._asdict(), "wrong": wrong}.items():
        for handle in (scene.handles[name] for name in names[:SHOWN]):
            say(f"{what}: {handle.id}: {answers[handle.id]}, begun {scene.begun(handle)} times")
            say(
                f"    was shown: {scene.witness.states(handle.id)} {scene.witness.verdicts(handle.id)}"
            )
    return 0 if found == CLEAN and not wrong and scene.begun(long) == 1 else 1


def kind_of(name: str) -> str:
    """The kind of a job, which its id begins with."""
    return name.partition("-")[0]


def answer(handle: JobHandle) -> str:
    """What a job came to, in a word or two."""
    try:
        handle.result(timeout=0)
    except JobPoisoned as error:
        return f"{error.code}, {len(error.details['attempts'])} attempts"
    except ZloraError as error:
        return error.code
    return "drawn"


def say(text: str) -> None:
    """A line, now."""
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=20, help="how long it takes in all (default: %(default)s)"
    )
    sys.exit(main(parser.parse_args().minutes))
