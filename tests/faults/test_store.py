"""A store that fails during a job: the job is tried again, and a manifest has all its images."""

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

# Bytes that a file may have on a full disk: more than the test's logs, less than an image of noise.
ROOM = 100_000
NOISE = 256  # pixels a side: 196 KB as PNG


@pytest.fixture(scope="module")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a real S3 server."""
    with seaweed.seaweed(tmp_path_factory.mktemp("seaweed")) as port:
        yield port


def test_a_worker_waits_for_an_s3_server_that_goes_away_between_two_images(
    scene: Scene, s3_port: int, tally: Tally
) -> None:
    """The stored image is not drawn again, and the manifest comes last."""
    with Proxy(s3_port, tally) as proxy:
        scene.environ |= s3_environ("a", proxy)
        first_is_stored = Event()
        proxy.break_at(rb"PUT \S+/outputs/1\.png", once=first_is_stored)
        with scene.worker():
            handle = scene.submit(fields={"num_images": 2})
            folder = f"a/runs/{handle.id}"
            wait_until(lambda: stored(s3_port, folder), "the first image is stored")
            first_is_stored.set()
            wait_until(lambda: proxy.is_down, "the server is away at the second upload")
            assert stored(s3_port, folder) == [f"{folder}/outputs/0.png"]
            proxy.restore()

            result = handle.result(timeout=60)

    assert scene.begun(handle) == 1
    names = ["manifest.json", "outputs/0.png", "outputs/1.png"]
    assert sorted(stored(s3_port, folder)) == [f"{folder}/{name}" for name in names]
    assert s3_manifest(s3_port, folder) == unlinked(result)


def test_a_manifest_is_the_result_although_the_answer_of_s3_is_lost(
    scene: Scene, s3_port: int, tally: Tally
) -> None:
    """The worker repeats the request, and adopts the manifest that S3 has."""
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


def test_a_child_killed_during_an_upload_leaves_no_result_and_the_job_completes(
    scene: Scene, s3_port: int
) -> None:
    """The server has half of a part of the second image, and waits for the rest until the end."""
    store = seaweed.store(s3_port, "c")
    with S3Proxy(s3_port, scene.tally) as proxy:
        scene.environ |= s3_environ("c", proxy)
        # A worker repeats a request after 10 s without an answer.
        proxy.meet(r"PUT \S+/outputs/1\.png\?\S*partNumber=2", *repeat(hold, 3))
        with scene.worker() as running:
            handle = scene.submit(noise=1700, step=0.3, fields={"num_images": 2})
            folder = f"c/runs/{handle.id}"
            wait_until(proxy.held.is_set, "the second image is on its way")
            wait_until(lambda: stored(s3_port, folder), "the first image is stored")
            assert stored(s3_port, folder) == [f"{folder}/outputs/0.png"]
            assert manifest.read_result(store, handle.id) is None
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
    assert scene.begun(handle) == 1  # the first image is reused


def test_a_job_fails_after_some_tries_on_a_full_disk_and_succeeds_once_there_is_room(
    scene: Scene,
) -> None:
    """A smaller image is stored meanwhile, and the model stays."""
    with scene.worker() as running:
        fill_disk(scene, scene.child(running))
        failing, small = scene.submit(noise=NOISE), scene.submit()
        assert small.result(timeout=30).base_intact
        scene.wait_begun(failing, 3)
        waiting = scene.submit(noise=NOISE)

        with pytest.raises(StoreFailed) as raised:
            failing.result(timeout=90)
        assert raised.value.details["attempt"] == scene.begun(failing) > 1
        assert not scene.files(failing)
        assert not scene.files(waiting)
        free_disk(scene.child(running))

        result = waiting.result(timeout=60)
        assert result.base_intact
        assert result.attempt > 1
        assert len(scene.events("loaded")) == 1


def test_a_redelivered_job_draws_only_the_missing_images(scene: Scene) -> None:
    with scene.worker() as running:
        handle = scene.submit(do=["nothing", "hang"], fields={"num_images": 3})
        wait_until(lambda: scene.kept(handle), "the first image is stored")
        wait_until(
            lambda: len(scene.events("fault", handle)) == 2, "the second image is being drawn"
        )
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
    """Return the variables of a worker with a prefix of the bucket, through the proxy."""
    store = {
        "ZLORA_STORE": f"s3://{seaweed.BUCKET}/{prefix}",
        "ZLORA_S3_ENDPOINT": f"http://127.0.0.1:{proxy.port}",
    }
    return store | seaweed.ENVIRON


def stored(port: int, folder: str) -> list[str]:
    """Return the keys of a job in the bucket."""
    return seaweed.keys(port, f"{folder}/")


def s3_manifest(port: int, folder: str) -> GenerateResult:
    """Return the result in a job's manifest in the bucket."""
    return msgspec.json.decode(s3_object(port, f"{folder}/manifest.json"), type=GenerateResult)


def s3_object(port: int, key: str) -> bytes:
    """Return the object under a key of the bucket."""
    return seaweed.client(port).get_object(Bucket=seaweed.BUCKET, Key=key)["Body"].read()


def fill_disk(scene: Scene, child: int) -> None:
    """Let the kernel refuse the child files larger than `ROOM`."""
    scene.tally.fault()
    resource.prlimit(child, resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))


def free_disk(child: int) -> None:
    """Let the child write files of any size again."""
    resource.prlimit(child, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
