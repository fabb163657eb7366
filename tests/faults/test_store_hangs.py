"""A store that accepts and does not answer, or is away: every job ends, the model stays, and nothing comes late."""

from collections.abc import Iterator
from itertools import repeat

import pytest
from support import seaweed
from support.figures import Tally
from support.processes import wait_until
from support.s3_proxy import Broken, Request, S3Proxy, drop_request
from support.scene import Scene
from zlora import JobHandle, JobState
from zlora.errors import JobRevoked, JobTimeout
from zlora.schema import Cancellation

MANY = 200  # requests: all of a test


@pytest.fixture(scope="module")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A real S3 server."""
    with seaweed.seaweed(tmp_path_factory.mktemp("seaweed")) as port:
        yield port


@pytest.fixture
def proxy(s3_port: int, tally: Tally, scene: Scene) -> Iterator[S3Proxy]:
    """Between the scene's workers and the server."""
    with S3Proxy(s3_port, tally) as found:
        store = {"ZLORA_STORE": f"s3://{seaweed.BUCKET}/hangs", "ZLORA_S3_ENDPOINT": found.url}
        scene.environ |= store | seaweed.ENVIRON
        yield found


def never(proxy: S3Proxy, _request: Request) -> bytes:
    """The server hears nothing, and the client neither."""
    proxy.held.set()
    proxy.released.wait(60)
    raise Broken


def stored(port: int, handle: JobHandle) -> list[str]:
    return seaweed.keys(port, f"hangs/runs/{handle.id}/")


def test_a_job_whose_upload_hangs_ends_in_its_time_and_nothing_of_it_stays(
    scene: Scene, proxy: S3Proxy, s3_port: int
) -> None:
    with scene.worker() as running:
        child = scene.child(running)
        proxy.meet(r"PUT \S+/outputs/", *repeat(never, MANY))
        handle = scene.submit(fields={"num_images": 2, "timeout": 2})

        with pytest.raises(JobTimeout):
            handle.result(timeout=60)
        proxy.meet("-")
        after = scene.submit()
        after.result(timeout=60)

        assert scene.child(running) == child
    assert stored(s3_port, handle) == []


def test_a_cancel_is_heard_while_the_last_picture_is_uploaded(
    scene: Scene, proxy: S3Proxy, s3_port: int
) -> None:
    with scene.worker() as running:
        child = scene.child(running)
        proxy.meet(r"PUT \S+/outputs/", *repeat(never, MANY))
        handle = scene.submit()
        wait_until(proxy.held.is_set, "the picture is on its way")

        assert handle.cancel() == Cancellation.RUNNING
        with pytest.raises(JobRevoked):
            handle.result(timeout=60)

        assert scene.child(running) == child
        proxy.meet("-")
    assert stored(s3_port, handle) == []


def test_jobs_wait_for_a_store_that_is_away_and_are_drawn_once_then(
    scene: Scene, proxy: S3Proxy, s3_port: int
) -> None:
    """None fails, and none is drawn that could not be stored."""
    with scene.worker():
        proxy.meet(r"GET \S+/manifest", *repeat(drop_request, MANY))
        handles = [scene.submit() for _ in range(2)]
        wait_until(
            lambda: len({line.split("?")[0] for line in proxy.asked}) == 2, "both jobs have met it"
        )
        assert [scene.begun(handle) for handle in handles] == [0, 0]
        proxy.meet("-")

        for handle in handles:
            handle.result(timeout=60)
            assert handle.status().state is JobState.SUCCESS
    assert [scene.begun(handle) for handle in handles] == [1, 1]
    logs = "".join(path.read_text() for path in scene.folder.glob("*.log"))
    assert all(f"[{handle.id}] succeeded" in logs for handle in handles)
    assert "X-Amz-Signature" not in logs  # nor in events, which show the same of a result
    assert all(len(stored(s3_port, handle)) == 2 for handle in handles)
