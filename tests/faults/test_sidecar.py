"""A sidecar that hangs or ends: the parent starts another, which continues the work."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from support.processes import wait_until
from support.scene import Scene
from support.valkey import Valkey
from zlora.broker.keys import RECORD_EXPIRES, sidecar_faults_key

TIMEOUT: Final = 5  # seconds; a sidecar needs some to start on a busy machine
SHORT: Final = {"ZLORA_SWEEP": "1", "ZLORA_SIDECAR_TIMEOUT": str(TIMEOUT)}


@contextmanager
def stopped(*processes: int) -> Iterator[None]:
    """Stop processes for the length of the block."""
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def faults(scene: Scene) -> dict[str, str]:
    """Return the counted faults of sidecars, which expire."""
    key = sidecar_faults_key(scene.queue)
    with scene.broker() as broker:
        assert broker.ttl(key) <= RECORD_EXPIRES
        found: dict[str, str] = broker.hgetall(key)  # type: ignore[assignment]
    return found


def test_a_sidecar_that_hangs_is_replaced_and_a_lost_message_is_sent_again(scene: Scene) -> None:
    with scene.worker(**SHORT) as running:
        first = running.sidecar()
        with stopped(first):
            busy = scene.submit(steps=1, step=1)  # the child has it while the other is lost
            scene.wait_begun(busy)
            lost = scene.submit()
            with scene.broker() as broker:
                assert [broker.lpop(name) for name in scene.queue_lists()]
            scene.tally.fault()

            wait_until(lambda: running.sidecar() != first, "there is another sidecar")
            assert lost.result(timeout=60).base_intact
        assert busy.result(timeout=60).base_intact
        assert not Path(f"/proc/{first}").exists()
        assert running.lines("the sidecar has given no sign of life for")
        assert faults(scene) == {"hung": "1"}


def test_a_sidecar_that_ends_while_redis_is_down_is_started_again_meanwhile(
    scene: Scene, valkey: Valkey
) -> None:
    """Metrics would be missing for as long as the outage lasts."""
    with scene.worker() as running:
        first = running.sidecar()
        valkey.kill()
        try:
            wait_until(lambda: running.lines("Trying again"), "the parent waits for Redis")
            scene.kill(first)
            wait_until(lambda: running.sidecar() != first, "there is another sidecar")
        finally:
            valkey.start()
        assert scene.submit().result(timeout=60).base_intact


def test_a_sidecar_stays_if_the_whole_worker_stood_still(scene: Scene) -> None:
    """As on a machine that was suspended: the parent had no chance to see signs of life."""
    with scene.worker(**SHORT) as running:
        wait_until(lambda: running.lines("/sidecar]"), "the sidecar has started")
        sidecar = running.sidecar()
        with stopped(running.process.pid, running.child(), sidecar):
            time.sleep(TIMEOUT + 1)
        assert scene.submit().result(timeout=60).base_intact
        scene.submit(steps=1, step=TIMEOUT).result(timeout=60)

        assert running.sidecar() == sidecar
        assert faults(scene) == {}
