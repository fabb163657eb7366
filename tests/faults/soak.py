"""Random faults for minutes: `make soak`, or `make soak ARGS="--minutes 2"`.

Small jobs come all the time to workers with a fake model, and one job runs for ten minutes. Workers
and child processes are killed, workers stand still or are cut off from Redis for a time, and some
have a clock that is an hour wrong. Connections are cut, Redis pauses, restarts, and changes places
with its replica. At the end every job must have a result, only one, of a kind that is allowed, with
its images, and the same for clients and in the store; and the long job must have begun once.
Otherwise the exit status is 1. A run of 20 minutes aims at 200 killed workers.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import redis
from support.figures import Tally
from support.long_runs import kind_of, open_jobs, result_of, say
from support.processes import Worker, wait_until
from support.proxy import Proxy
from support.scene import CLEAN, Scene
from support.valkey import Valkey
from zlora import JobHandle
from zlora.broker.keys import unfinished_key
from zlora.errors import BrokerUnavailable

WORKERS: Final = 4  # besides the one with the long job
KILLS_A_MINUTE: Final = 13  # in 17 of 20 minutes
GOAL: Final = 10  # killed workers per minute of the whole run
SETTLING: Final = 150.0  # seconds without faults near the end, in which open jobs are to end
AUDIT: Final = 30.0  # seconds at the end
LONG: Final = 600  # seconds of the job that must not begin twice
PAUSES: Final = (0.02, 0.3)  # seconds between two jobs
MOST_OPEN: Final = 300  # jobs; more would not end while no faults are injected
AWAY: Final = (12.0, 60.0)  # seconds that a worker stands still, or is cut off from Redis
CLOCKS: Final = ("0", "0", "3600", "-3600")  # seconds by which the clocks of workers are wrong

# Results that a job may have. Slow jobs meet killed workers, now and then three in a row.
ALLOWED: Final = {
    "plain": {"success"},
    "twice": {"success"},
    "slow": {"success", "poisoned"},
    "cancelled": {"job_revoked", "success"},
    "failing": {"generation_failed"},
    "dying": {"success", "poisoned"},
    "long": {"success"},
}
REPORTED: Final = 20  # ids of each kind of failure in the report
NEVER: Final = ("internal", "timeout", "unknown")  # error codes


@dataclass
class Member:
    """A worker of the fleet. While it is away, it stands still or is cut off, and is not killed."""

    worker: Worker
    proxy: Proxy  # between the worker and Redis
    stack: ExitStack
    is_away: bool = False
    back_at: float = 0.0  # on the monotonic clock

    def leave(self) -> None:
        """Stand still, or be cut off from Redis, for some time."""
        self.is_away, self.back_at = True, time.monotonic() + random.uniform(*AWAY)

    def come_back(self) -> None:
        """Go on."""
        self.worker.thaw()
        self.proxy.restore()
        self.is_away = False


@dataclass
class Broker:
    """A Redis with its replica, and the addresses that lead to it: clients know no other."""

    primary: Valkey
    replica: Valkey
    tally: Tally
    addresses: list[Proxy] = field(default_factory=list)
    fail_overs: int = 0

    @contextmanager
    def new_address(self) -> Iterator[Proxy]:
        """Open one more address."""
        with Proxy(self.primary.port, self.tally) as proxy:
            self.addresses.append(proxy)
            yield proxy
            self.addresses.remove(proxy)

    def cut_all(self) -> None:
        """End all connections."""
        self.primary.cut_all()

    def pause(self) -> None:
        """Answer nothing for some seconds."""
        self.primary.pause()
        time.sleep(8)
        self.primary.resume()

    def restart(self) -> None:
        """Be killed (kill -9), and start again with the append-only file."""
        self.primary.kill()
        time.sleep(3)
        self.primary.start()

    def fail_over(self) -> None:
        """Change places with the replica; connections are cut, or refuse to write from now on."""
        self.replica.follow(self.primary.port)
        with self.primary.client() as connection:
            wait_until(
                lambda: connection.info("replication")["slave0"]["state"] == "online",
                "the primary knows its replica",
            )
        self.primary.hand_over(self.replica)
        if random.random() < 0.5:
            self.primary.cut_all()
        self.fail_overs += 1
        self.primary, self.replica = self.replica, self.primary
        for address in self.addresses:
            address.lead_to(self.primary.port)


@dataclass
class Fleet:
    """The workers that are killed and replaced."""

    scene: Scene
    broker: Broker
    running: list[Member] = field(default_factory=list)
    started: int = 0
    faults: Counter[str] = field(default_factory=Counter)

    def start(self) -> None:
        """Start one more worker without a wait for its model."""
        self.started += 1
        stack = ExitStack()
        proxy = stack.enter_context(self.broker.new_address())
        worker = stack.enter_context(
            self.scene.starting_worker(
                f"w{self.started}", ZLORA_BROKER_URL=proxy.url, FAKE_CLOCK=random.choice(CLOCKS)
            )
        )
        self.running.append(Member(worker, proxy, stack))

    def kill_one(self) -> None:
        """Kill a worker (kill -9), and start another."""
        if (member := self._any()) is None:
            return
        self.running.remove(member)
        self.scene.kill(member.worker.process.pid)
        self.faults["killed"] += 1
        member.stack.close()
        self.start()

    def freeze_one(self) -> None:
        """Let parent, child and sidecar of a worker stand still for some time."""
        if (member := self._any()) is None:
            return
        self.scene.tally.fault()
        self.faults["frozen"] += 1
        member.leave()
        member.worker.freeze()

    def cut_off_one(self) -> None:
        """Cut off a worker from Redis for some time, while its connections stay open."""
        if (member := self._any()) is None:
            return
        self.faults["cut off"] += 1
        member.leave()
        member.proxy.black_out()

    def terminate_one(self) -> None:
        """Send SIGTERM to the child of a worker, as a machine does that runs out of memory."""
        member = self._any()
        if member is None or (child := self.scene.find_child(member.worker)) is None:
            return
        self.scene.tally.fault()
        self.faults["terminated children"] += 1
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGTERM)

    def welcome(self, *, all_of_them: bool = False) -> None:
        """Let workers go on whose time away is over."""
        now = time.monotonic()
        for member in self.running:
            if member.is_away and (all_of_them or member.back_at < now):
                member.come_back()

    def stop(self) -> None:
        """End all workers."""
        for member in self.running:
            member.stack.close()

    def _any(self) -> Member | None:
        """Return a worker that is not away, one that takes jobs if possible."""
        for member in self.running:
            worker = member.worker
            if worker.process.poll() is not None:
                status, last = worker.process.returncode, worker.log.read_text()[-4000:]
                raise SystemExit(
                    f"a worker has ended with status {status}; its log ends with:\n{last}"
                )
        here = [member for member in self.running if not member.is_away]
        ready = [member for member in here if member.worker.lines(" ready.")]
        return random.choice(ready or here) if here else None


@dataclass
class Producer:
    """Submits jobs in a thread: some misbehave, some come twice, some are cancelled."""

    scene: Scene
    over: threading.Event = field(default_factory=threading.Event)
    kinds: Counter[str] = field(default_factory=Counter)

    def run(self) -> None:
        """Submit until `over` is set."""
        while not self.over.wait(random.uniform(*PAUSES)):
            if self._open() > MOST_OPEN:
                continue
            kinds = ("plain", "slow", "dying", "twice", "cancelled", "failing")
            kind = random.choices(kinds, (65, 10, 5, 10, 5, 5))[0]
            self.kinds[kind] += 1
            self._submit(kind, f"{kind}-{self.kinds[kind]}")

    def _open(self) -> int:
        """Return the number of jobs that have not ended, or 0 if Redis does not answer."""
        with suppress(redis.RedisError), self.scene.broker() as broker:
            return int(broker.zcard(unfinished_key(self.scene.queue)))
        return 0

    def _submit(self, kind: str, name: str) -> None:
        while True:
            try:
                SUBMIT[kind](self.scene, name)
            except BrokerUnavailable:
                time.sleep(0.5)
            else:
                return


def submit_twice(scene: Scene, name: str) -> None:
    """Submit the same job twice."""
    scene.submit(job_id=name), scene.submit(job_id=name)


def submit_and_cancel(scene: Scene, name: str) -> None:
    """Submit a job and cancel it."""
    scene.submit(job_id=name, steps=20, step=0.05).cancel()


SUBMIT: Final[dict[str, Callable[[Scene, str], object]]] = {
    "plain": lambda scene, name: scene.submit(job_id=name, steps=1, step=0),
    "slow": lambda scene, name: scene.submit(job_id=name, steps=10, step=0.1),
    "dying": lambda scene, name: scene.submit(job_id=name, steps=2, do=["kill-child"]),
    "twice": submit_twice,
    "cancelled": submit_and_cancel,
    "failing": lambda scene, name: scene.submit(job_id=name, steps=4, step=0.1, do="nan", at=4),
}


def main(minutes: float) -> int:
    """Run for some minutes, and return the exit status."""
    say(f"the soak test takes about {max(minutes, 2):g} minutes")
    start = time.monotonic()
    tally, settled_by = Tally(), start + max(60 * minutes - AUDIT, 60.0)
    calm_from = max(settled_by - SETTLING, start + 40.0)
    with tempfile.TemporaryDirectory(prefix="zlora-soak-") as name, ExitStack() as stack:
        folder = Path(name)
        for server in ("a", "b"):
            (folder / server).mkdir()
        primary, replica = (
            stack.enter_context(Valkey(folder / server, tally)) for server in ("a", "b")
        )
        broker = Broker(primary, replica, tally)
        url = stack.enter_context(broker.new_address()).url
        broker.replica.follow(broker.primary.port)
        scene = Scene(folder / "scene", tally, broker_url=url, queue="soak")
        stack.callback(scene.close)
        # The worker of the long job is never killed.
        stack.enter_context(scene.worker("steady"))
        seconds = min(LONG, 0.8 * (calm_from - time.monotonic()))
        long = scene.submit(job_id="long", steps=200, step=seconds / 200)
        scene.wait_begun(long)
        fleet, producer = Fleet(scene, broker), Producer(scene)
        stack.callback(fleet.stop)
        for _ in range(WORKERS):
            fleet.start()
        inject_faults(scene, broker, fleet, producer, until=calm_from)
        wait_for_open_jobs(scene, until=settled_by)
        goal = round(GOAL * minutes)
        killed = fleet.faults["killed"]
        say(f"{killed} workers were killed; the goal is {goal} in {minutes:g} minutes")
        report(scene, producer.kinds, fleet)
        return exit_status(scene, long)


def inject_faults(
    scene: Scene, broker: Broker, fleet: Fleet, producer: Producer, *, until: float
) -> None:
    """Inject one fault after the other while jobs come."""
    every: dict[Callable[[], object], float] = {  # seconds
        fleet.kill_one: 60 / KILLS_A_MINUTE,
        fleet.freeze_one: 31,
        fleet.cut_off_one: 37,
        fleet.terminate_one: 13,
        broker.cut_all: 47,
        broker.pause: 101,
        broker.fail_over: 83,
        broker.restart: 163,
        lambda: report(scene, producer.kinds, fleet): 30,
    }
    start = time.monotonic()
    due = {act: start + period for act, period in every.items()}
    thread = threading.Thread(target=producer.run, daemon=True)
    thread.start()
    while (now := time.monotonic()) < until:
        for act in [act for act, at in due.items() if at <= now]:
            act()
            due[act] += every[act]
        fleet.welcome()
        time.sleep(0.05)
    fleet.welcome(all_of_them=True)
    producer.over.set()
    thread.join()


def wait_for_open_jobs(scene: Scene, *, until: float) -> None:
    """Wait until every job has ended."""
    while (left := open_jobs(scene)) and time.monotonic() < until:
        say(f"{len(left)} jobs have not ended, such as {', '.join(left[:5])}")
        time.sleep(5)


def report(scene: Scene, kinds: Counter[str], fleet: Fleet) -> None:
    """Print progress."""
    faults = scene.tally.faults + len(scene.events("fault"))
    say(f"{len(scene.handles)} jobs {dict(kinds)}, {faults} faults")
    say(f"    workers: {dict(fleet.faults)}; {fleet.broker.fail_overs} fail-overs")


def exit_status(scene: Scene, long: JobHandle) -> int:
    """Print the results, and return the exit status."""
    found = scene.audit()
    results = {name: result_of(handle) for name, handle in scene.handles.items()}
    for kind in ALLOWED:
        counts = Counter(result for name, result in results.items() if kind_of(name) == kind)
        say(f"{kind}: {dict(counts)}")
    never = Counter(result for result in results.values() if result in NEVER)
    say(", ".join(f"{code} {never[code]}" for code in NEVER))
    wrong = [name for name, result in results.items() if result not in ALLOWED[kind_of(name)]]
    say(f"the long job began {scene.begun(long)} times; {len(wrong)} jobs have a forbidden result")
    say(scene.tally.row())
    for what, names in {**found._asdict(), "wrong": wrong}.items():
        for name in names[:REPORTED]:
            begun = scene.begun(scene.handles[name])
            say(f"{what}: {name}: {results[name]}, begun {begun} times")
            say(f"    states: {scene.witness.states(name)} {scene.witness.ends(name)}")
    # Images of a worker that stood still while it stored them may be left behind.
    is_clean = found._replace(left=[]) == CLEAN
    return 0 if is_clean and not wrong and scene.begun(long) == 1 else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=20, help="duration of the run (default: %(default)s)"
    )
    sys.exit(main(parser.parse_args().minutes))
