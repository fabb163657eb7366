"""A fail-over is an event: no worker ends, and no client gets an error for a job that succeeds.

Two Valkeys are primary and replica behind one address, a proxy that stands for the name of the
broker. `make failover` repeats each event, with more jobs.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from support.figures import Tally
from support.processes import wait_until
from support.proxy import Proxy
from support.scene import CLEAN, Scene
from support.valkey import Valkey
from zlora import Client, JobHandle, JobState
from zlora.errors import BrokerUnavailable, JobRevoked, JobVanished

JOBS: Final = int(os.environ.get("ZLORA_FAILOVER_JOBS", "8"))  # submitted around each event
ROUNDS: Final = int(os.environ.get("ZLORA_FAILOVER_ROUNDS", "1"))
REQUEST: Final = {"prompt": "a portrait"}
REFUSED: Final = 3.0  # seconds in which Redis refuses to write: longer than a job takes
LAG: Final = 1.5  # seconds by which a replica is behind


class Stage:
    """Two servers, one of which is the primary, behind one address; two workers, and a client."""

    def __init__(self, folder: Path, tally: Tally, stack: ExitStack) -> None:
        servers = []
        for name in ("a", "b"):
            (folder / name).mkdir()
            servers.append(stack.enter_context(Valkey(folder / name, tally)))
        self.primary, self.replica = servers
        self.replica.follow(self.primary.port)
        self.name = stack.enter_context(Proxy(self.primary.port, tally))
        self.tally = tally
        self.pauses: dict[str, float] = {}  # the longest of each event, in seconds
        self.scene = Scene(folder / "scene", tally, broker_url=self.name.url, queue="failover")
        stack.callback(self.scene.close)
        self.workers = [
            stack.enter_context(self.scene.starting_worker(name)) for name in ("one", "two")
        ]
        for worker in self.workers:
            worker.wait_ready()

    def switch(self) -> None:
        """Give the name to the replica, which is a primary now."""
        self.primary, self.replica = self.replica, self.primary
        self.name.lead_to(self.primary.port)

    def submit(self, count: int) -> list[JobHandle]:
        """Submit jobs, each again under its id until the broker has accepted it."""
        return [self._submit() for _ in range(count)]

    def _submit(self) -> JobHandle:
        try:
            return self.scene.submit(steps=2, step=0.02)
        except BrokerUnavailable as error:
            job_id = error.details["job_id"]

        def again() -> JobHandle | None:
            try:
                return self.scene.submit(job_id=job_id, steps=2, step=0.02)
            except BrokerUnavailable:
                return None

        return wait_until(again, "the broker accepts jobs again")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, tally: Tally) -> Iterator[Stage]:
    """Return a stage for all events, one after the other."""
    with ExitStack() as stack:
        made = Stage(tmp_path_factory.mktemp("failover"), tally, stack)
        yield made
        for name, seconds in made.pauses.items():
            tally.notes.append(f"{name}: {seconds:.1f} s until a new job had its result")
        assert made.scene.audit() == CLEAN


def demote(stage: Stage, *, cuts: bool) -> None:
    """Let primary and replica change places, as an operator does for an upgrade."""
    stage.primary.hand_over(stage.replica)
    if cuts:
        stage.primary.cut_all()
    stage.switch()


def primary_becomes_a_replica(stage: Stage) -> None:
    """Keep its connections, on which each command that writes is refused."""
    demote(stage, cuts=False)


def primary_becomes_a_replica_and_cuts(stage: Stage) -> None:
    """End its connections."""
    demote(stage, cuts=True)


def primary_dies(stage: Stage) -> None:
    """Kill it; it comes back as a replica."""
    dead = stage.primary
    dead.kill()
    stage.replica.promote()
    stage.switch()
    dead.start()
    dead.follow(stage.primary.port)


def disk_is_full(stage: Stage) -> None:
    """Let a snapshot fail: Redis refuses to write (MISCONF)."""
    with stage.primary.without_disk():
        time.sleep(REFUSED)


def replicas_are_missing(stage: Stage) -> None:
    """Ask for more replicas than there are: Redis refuses to write (NOREPLICAS)."""
    stage.primary.set("min-replicas-to-write", "2")
    time.sleep(REFUSED)
    stage.primary.set("min-replicas-to-write", "0")


def memory_is_full(stage: Stage) -> None:
    """Take all memory: Redis refuses to write (OOM)."""
    stage.primary.set("maxmemory", "1")
    time.sleep(REFUSED)
    stage.primary.set("maxmemory", "0")


def script_runs_for_long(stage: Stage) -> None:
    """Run a script of another program: Redis refuses every command meanwhile (BUSY)."""
    stage.primary.set("busy-reply-threshold", "1")
    with ThreadPoolExecutor(1) as pool, stage.primary.client() as other:
        running = pool.submit(other.eval, "while true do end", 0)
        time.sleep(3 * REFUSED)
        with stage.primary.client() as admin:
            admin.script_kill()
        assert isinstance(running.exception(), redis.ResponseError)


@pytest.mark.parametrize("round_", range(ROUNDS))
@pytest.mark.parametrize(
    "event",
    [
        primary_becomes_a_replica,
        primary_becomes_a_replica_and_cuts,
        primary_dies,
        disk_is_full,
        replicas_are_missing,
        memory_is_full,
        script_runs_for_long,
    ],
)
def test_event_ends_no_worker_and_no_job(
    stage: Stage, event: Callable[[Stage], None], round_: int
) -> None:
    """Two jobs run, others are queued, and all are waited for, when the event comes."""
    with ThreadPoolExecutor(2 * JOBS + 2) as pool:
        handles = [stage.scene.submit(steps=10, step=0.15) for _ in stage.workers]
        for handle in handles:
            stage.scene.wait_step(handle)
        handles += stage.submit(JOBS // 2)
        waits = [pool.submit(handle.result, 90) for handle in handles]

        start = time.monotonic()
        event(stage)
        waits += [pool.submit(handle.result, 90) for handle in stage.submit(JOBS // 2)]
        last = waits[-1]
        wait_until(last.done, "the last job has its result")
        stage.pauses[event.__name__] = max(
            time.monotonic() - start, stage.pauses.get(event.__name__, 0.0)
        )

        assert all(wait.result().base_intact for wait in waits)
        assert [worker.process.poll() for worker in stage.workers] == [None, None]
        assert len(stage.scene.events("loaded")) == len(stage.workers)


def test_job_that_the_new_primary_never_had_is_reported_or_submitted_again(stage: Stage) -> None:
    """The replica is cut off as jobs are submitted, and then promoted. No worker serves them."""
    with ExitStack() as stack:
        link = stack.enter_context(Proxy(stage.primary.port, stage.tally))
        stage.replica.follow(link.port)

        def client(**options: Any) -> Client:
            made = Client.from_url(stage.name.url, queue="nobody", **options)
            return stack.enter_context(made)

        safe = client(wait_replicas=1)
        kept = safe.submit(REQUEST, job_id="kept")
        link.black_out()
        lost = client().submit(REQUEST, job_id="lost")
        stubborn = client(resubmit=True).submit(REQUEST, job_id="again")
        with pytest.raises(BrokerUnavailable, match="0 of 1 replicas"):
            safe.submit(REQUEST, job_id="refused")
        pool = stack.enter_context(ThreadPoolExecutor())
        waits = [pool.submit(handle.result, 30) for handle in (lost, stubborn)]
        dead = stage.primary
        dead.kill()
        stage.replica.promote()
        stage.switch()

        with pytest.raises(JobVanished):
            waits[0].result()
        wait_until(lambda: stubborn.status().state is JobState.PENDING, "it is submitted again")
        assert kept.status().state is JobState.PENDING
        kept.cancel()
        stubborn.cancel()
        with pytest.raises(JobRevoked):
            waits[1].result()
        dead.start()
        dead.follow(stage.primary.port)


def test_primary_dies_while_its_replica_is_behind(stage: Stage) -> None:
    """Jobs whose submissions waited for the replica are there; others vanish, which is reported."""
    with ExitStack() as stack:
        link = stack.enter_context(Proxy(stage.primary.port, stage.tally))
        stage.replica.follow(link.port)
        safe, plain = (
            stack.enter_context(
                Client.from_url(stage.name.url, queue="behind", wait_replicas=replicas)
            )
            for replicas in (1, 0)
        )
        link.lag(LAG)
        kept = [safe.submit(REQUEST) for _ in range(JOBS // 4)]
        lost = [plain.submit(REQUEST) for _ in range(JOBS // 4)]
        dead = stage.primary
        dead.kill()
        link.black_out()  # a dead machine sends nothing; the proxy would still send what it holds
        stage.replica.promote()
        stage.switch()

        assert [handle.status().state for handle in kept] == [JobState.PENDING] * len(kept)
        pool = stack.enter_context(ThreadPoolExecutor())
        for wait in [pool.submit(handle.result, 30) for handle in lost]:
            with pytest.raises(JobVanished):
                wait.result()
        for handle in kept:
            handle.cancel()
        dead.start()
        dead.follow(stage.primary.port)
