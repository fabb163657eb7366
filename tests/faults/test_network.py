"""A network that swallows every byte: a worker finds out, and takes jobs again."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from faults.figures import Tally
from faults.proxy import Proxy
from faults.scene import Scene
from faults.valkey import Valkey
from zlora import JobHandle

RECOVERS_WITHIN = 60.0  # seconds


@pytest.fixture
def another(tmp_path: Path, valkey: Valkey, tally: Tally) -> Iterator[Scene]:
    """A second queue."""
    with closing(Scene(tmp_path / "another", tally, broker_url=valkey.url, queue="another")) as made:
        yield made
        assert made.audit() == ([], [])


@pytest.fixture
def proxy(valkey: Valkey, tally: Tally) -> Iterator[Proxy]:
    """The way from workers to the broker; producers go without."""
    with Proxy(valkey.port, tally) as made:
        yield made


def test_workers_behind_dead_connections_take_jobs_within_a_minute(scene: Scene, another: Scene, proxy: Proxy) -> None:
    """One is idle on its queue; the other is busy, and a job waits on its queue too."""
    way = {"ZLORA_BROKER_URL": proxy.url}
    with scene.worker(**way), another.worker(**way):
        busy = another.submit(steps=20, step=0.2)
        another.wait_step(busy)
        queued = another.submit()

        blink(proxy)
        start = time.monotonic()
        for_idle = scene.submit()

        assert_drawn_once(scene, for_idle)
        scene.tally.notes.append(f"an idle worker took a job {time.monotonic() - start:.1f} s after a dead connection")
        assert_drawn_once(another, busy)
        assert_drawn_once(another, queued)


def blink(proxy: Proxy) -> None:
    """The connections of now are dead for good, and nobody is told; new ones are served."""
    proxy.black_out()
    proxy.restore()


def assert_drawn_once(scene: Scene, handle: JobHandle) -> None:
    assert handle.result(timeout=RECOVERS_WITHIN).base_intact
    assert scene.begun(handle) == 1
