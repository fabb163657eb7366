"""A store that hangs or is away: every job ends, the model stays, and nothing is stored late."""

import time
from collections.abc import Iterator
from itertools import repeat

import pytest
from support import seaweed
from support.figures import Tally
from support.processes import wait_until
from support.s3_proxy import Broken, Request, S3Proxy, drop_request
from support.scene import Scene
from zlora import JobHandle, JobState
from zlora.errors import GenerationFailed, JobRevoked, JobTimeout
from zlora.schema import Cancellation

MANY = 200  # requests; more than a test sends


@pytest.fixture(scope="module")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a real S3 server."""
    with seaweed.seaweed(tmp_path_factory.mktemp("seaweed")) as port:
        yield port


@pytest.fixture
def proxy(s3_port: int, tally: Tally, scene: Scene) -> Iterator[S3Proxy]:
    """Proxy between the scene's workers and the server."""
    with S3Proxy(s3_port, tally) as found:
        store = {"ZLORA_STORE": f"s3://{seaweed.BUCKET}/hangs", "ZLORA_S3_ENDPOINT": found.url}
        scene.environ |= store | seaweed.ENVIRON
        yield found


def hang(proxy: S3Proxy, _request: Request) -> bytes:
    """Keep the request from the server, and the client without an answer."""
    proxy.held.set()
    proxy.released.wait(60)
    raise Broken


def images_of(port: int, handle: JobHandle) -> list[str]:
    return seaweed.keys(port, f"hangs/runs/{handle.id}/outputs/")


def test_a_job_whose_upload_hangs_ends_by_its_timeout_and_leaves_nothing(
    scene: Scene, proxy: S3Proxy, s3_port: int
) -> None:
    with scene.worker() as running:
        child = scene.child(running)
        proxy.meet(r"PUT \S+/outputs/", *repeat(hang, MANY))
        handle = scene.submit(fields={"num_images": 2, "timeout": 2})

        with pytest.raises(JobTimeout):
            handle.result(timeout=60)
        proxy.meet("-")
        after = scene.submit()
        after.result(timeout=60)

        assert scene.child(running) == child
    assert images_of(s3_port, handle) == []


def test_a_job_can_be_cancelled_while_its_last_image_is_uploaded(
    scene: Scene, proxy: S3Proxy, s3_port: int
) -> None:
    with scene.worker() as running:
        child = scene.child(running)
        proxy.meet(r"PUT \S+/outputs/", *repeat(hang, MANY))
        handle = scene.submit()
        wait_until(proxy.held.is_set, "the image is on its way")

        assert handle.cancel() == Cancellation.RUNNING
        proxy.released.set()  # the test above waits for a server that never answers
        with pytest.raises(JobRevoked):
            handle.result(timeout=60)

        assert scene.child(running) == child
        proxy.meet("-")
    assert images_of(s3_port, handle) == []


def test_a_job_waits_for_a_store_that_is_away_and_is_drawn_once(
    scene: Scene, proxy: S3Proxy, s3_port: int
) -> None:
    """It is not drawn before it can be stored. No URL of its images is logged."""
    with scene.worker() as running:
        proxy.meet(r"GET \S+/manifest", *repeat(drop_request, MANY))
        handle = scene.submit()
        wait_until(
            lambda: any("WARNING" in line for line in running.lines(handle.id)),
            "the delivery gives up the store",
        )
        assert scene.begun(handle) == 0
        proxy.meet("-")

        handle.result(timeout=60)
        wait_until(
            lambda: running.lines(f"[{handle.id}] succeeded"), "the parent acknowledges the message"
        )

    assert handle.status().state is JobState.SUCCESS
    assert scene.begun(handle) == 1
    log = running.log.read_text()
    assert "X-Amz-Signature" not in log  # nor in events, which have the same text of a result
    assert len(images_of(s3_port, handle)) == 1


def test_an_image_that_is_stored_after_its_job_has_failed_is_deleted(
    scene: Scene, proxy: S3Proxy, s3_port: int
) -> None:
    with scene.worker():
        proxy.meet(r"PUT \S+/outputs/0", hang)
        handle = scene.submit(step=0.7, at=2, do=["nothing", "nan"], fields={"num_images": 2})
        wait_until(proxy.held.is_set, "the first image is on its way")
        with pytest.raises(GenerationFailed):
            handle.result(timeout=60)
        proxy.released.set()  # boto3 sends the image again
        time.sleep(2)
        scene.submit().result(timeout=60)
        wait_until(lambda: not images_of(s3_port, handle), "the image is deleted")
