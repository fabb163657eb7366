"""A store that fails in the middle of a job: the job is tried again, and no manifest speaks of what is not there."""

import hashlib
import resource
from collections.abc import Iterator
from itertools import repeat
from threading import Event

import msgspec
import pytest
from support import seaweed
from support.figures import Tally
from support.processes import unlinked, wait_until
from support.proxy import Proxy
from support.s3_proxy import S3Proxy, hold
from support.scene import Scene
from zlora import GenerateResult
from zlora.errors import StoreFailed
from zlora_worker.results import manifest

ROOM = 100_000  # bytes that a file may have on a full disk: above this test's logs, below a picture of noise
NOISE = 256  # pixels a side: 196 KB as png


@pytest.fixture(scope="module")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A real S3 server."""
    with seaweed.seaweed(tmp_path_factory.mktemp("seaweed")) as port:
        yield port


def test_an_s3_server_that_goes_between_two_pictures_is_waited_for(
    scene: Scene, s3_port: int, tally: Tally
) -> None:
    """The picture that is there is not drawn again, and the manifest comes last."""
    with Proxy(s3_port, tally) as proxy:
        scene.environ |= s3_environ("a", proxy)
        first_is_stored = Event()
        proxy.break_at(rb"PUT \S+/outputs/1\.png", once=first_is_stored)
        with scene.worker():
            handle = scene.submit(fields={"num_images": 2})
            folder = f"a/runs/{handle.id}"
            wait_until(lambda: stored(s3_port, folder), "the first picture is stored")
            first_is_stored.set()
            wait_until(lambda: proxy.is_down, "the second picture meets a server that is away")
            assert stored(s3_port, folder) == [f"{folder}/outputs/0.png"]
            proxy.restore()

            result = handle.result(timeout=60)

    assert scene.begun(handle) == 1
    names = ["manifest.json", "outputs/0.png", "outputs/1.png"]
    assert sorted(stored(s3_port, folder)) == [f"{folder}/{name}" for name in names]
    assert s3_manifest(s3_port, folder) == unlinked(result)


def test_a_manifest_whose_answer_is_lost_is_the_result(
    scene: Scene, s3_port: int, tally: Tally
) -> None:
    """S3 has it, and the worker does not know: it asks again, and adopts what is there."""
    with Proxy(s3_port, tally) as proxy:
        scene.environ |= s3_environ("b", proxy)
        proxy.lose_answer_to(rb"PUT \S+/manifest\.json")
        with scene.worker():
            handle = scene.submit()
            wait_until(lambda: proxy.is_down, "the answer is lost")
            kept = s3_manifest(s3_port, f"b/runs/{handle.id}")
            proxy.restore()

            result = unlinked(handle.result(timeout=60))
            assert result == kept == s3_manifest(s3_port, f"b/runs/{handle.id}")
    assert scene.begun(handle) == 1


@pytest.mark.parametrize(
    ("noise", "upload"),
    [(600, r"PUT \S+/outputs/1\.png$"), (1700, r"PUT \S+/outputs/1\.png\?\S*partNumber=2")],
    ids=["one piece", "parts"],
)
def test_a_child_that_dies_in_mid_upload_leaves_no_result_and_the_job_completes(
    scene: Scene, s3_port: int, noise: int, upload: str
) -> None:
    """The server has half of the second picture, and waits for the rest until all is done."""
    store = seaweed.store(s3_port, "c")
    with S3Proxy(s3_port, scene.tally) as proxy:
        scene.environ |= s3_environ("c", proxy)
        proxy.meet(
            upload, *repeat(hold, 3)
        )  # a worker gives a request up after 10 s, and asks again
        with scene.worker() as running:
            handle = scene.submit(noise=noise, step=0.3, fields={"num_images": 2})
            folder = f"c/runs/{handle.id}"
            wait_until(proxy.held.is_set, "the second picture is on its way")
            wait_until(lambda: stored(s3_port, folder), "the first picture is stored")
            assert stored(s3_port, folder) == [f"{folder}/outputs/0.png"]
            assert manifest.read_manifest(store, handle.id) is None
            scene.kill(scene.child(running))
            proxy.meet("-")

            result = handle.result(timeout=60)
            proxy.released.set()

    assert [image.seed for image in result.images] == [result.seed, result.seed + 1]
    names = ["manifest.json", "outputs/0.png", "outputs/1.png"]
    assert sorted(stored(s3_port, folder)) == [f"{folder}/{name}" for name in names]
    assert s3_manifest(s3_port, folder) == unlinked(result)
    digests = [
        hashlib.sha256(s3_object(s3_port, f"c/{image.key}")).hexdigest() for image in result.images
    ]
    assert digests == [image.sha256 for image in result.images]
    assert scene.begun(handle) == 1  # the first picture: it was there


def test_a_disk_that_has_room_again_takes_the_job(scene: Scene) -> None:
    with scene.worker() as running:
        fill_disk(scene, scene.child(running))
        handle = scene.submit(noise=NOISE)
        wait_until(lambda: running.lines("store_failed"), "the store fails")
        assert not scene.files(handle)
        free_disk(scene.child(running))

        result = handle.result(timeout=60)
        assert result.base_intact
        assert result.attempt > 1
        assert len(scene.events("loaded")) == 1


def test_a_disk_that_stays_full_fails_the_job_after_some_tries_and_the_next_is_stored(
    scene: Scene,
) -> None:
    with scene.worker() as running:
        fill_disk(scene, scene.child(running))
        handle, small = scene.submit(noise=NOISE), scene.submit()

        assert small.result(timeout=30).base_intact
        with pytest.raises(StoreFailed) as found:
            handle.result(timeout=90)
        assert found.value.details["attempt"] == scene.begun(handle) > 1
        assert not scene.files(handle)
        assert len(scene.events("loaded")) == 1


def test_a_job_of_several_pictures_that_comes_again_draws_the_missing_ones(scene: Scene) -> None:
    with scene.worker() as running:
        handle = scene.submit(do=["nothing", "hang"], fields={"num_images": 3})
        wait_until(lambda: scene.kept(handle), "the first picture is stored")
        wait_until(lambda: len(scene.events("fault", handle)) == 2, "the second one is being drawn")
        scene.kill(scene.child(running))

        result = handle.result(timeout=60)
        assert [image.seed for image in result.images] == [
            result.seed,
            result.seed + 1,
            result.seed + 2,
        ]
        drawn = [event["seed"] - result.seed for event in scene.events("end", handle)]
        assert drawn == [0, 1, 2]


def s3_environ(prefix: str, proxy: Proxy | S3Proxy) -> dict[str, str]:
    """A prefix of the bucket, through the proxy."""
    store = {
        "ZLORA_STORE": f"s3://{seaweed.BUCKET}/{prefix}",
        "ZLORA_S3_ENDPOINT": f"http://127.0.0.1:{proxy.port}",
    }
    return store | seaweed.ENVIRON


def stored(port: int, folder: str) -> list[str]:
    """What the bucket has of a job."""
    return seaweed.keys(port, f"{folder}/")


def s3_manifest(port: int, folder: str) -> GenerateResult:
    """What the bucket says of a job."""
    return msgspec.json.decode(s3_object(port, f"{folder}/manifest.json"), type=GenerateResult)


def s3_object(port: int, key: str) -> bytes:
    """What the bucket has under a key."""
    return seaweed.client(port).get_object(Bucket=seaweed.BUCKET, Key=key)["Body"].read()


def fill_disk(scene: Scene, child: int) -> None:
    """From now on the kernel refuses the child files of some size."""
    scene.tally.fault()
    resource.prlimit(child, resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))


def free_disk(child: int) -> None:
    """There is room again."""
    resource.prlimit(child, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
