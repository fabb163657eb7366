"""Workers that stand still or are cut off, and come back after another one has taken their job.

Each story has a queue with workers of its own. The stories run side by side, because some seconds
pass until a job is taken over. `make freezes` does the same at random, with the default settings.
"""

import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any, Final

import pytest
from support import seaweed
from support.figures import Tally
from support.objects import BucketObjects
from support.processes import Worker, wait_until
from support.proxy import Proxy
from support.s3_proxy import S3Proxy, delay
from support.scene import CLEAN, Scene
from support.valkey import Valkey
from support.witness import TERMINAL
from zlora import JobHandle, JobState
from zlora.errors import GenerationFailed, JobRevoked

SHORT: Final = {"ZLORA_VISIBILITY": "2", "ZLORA_SWEEP": "1"}
LIMIT: Final = 8.0  # seconds of a job, of which a drawing takes half
LATE: Final[dict[str, Any]] = {"steps": 1, "step": LIMIT / 2, "fields": {"timeout": LIMIT}}
FROZEN: Final = 3  # workers that stand still at a time; so many killed children poison a job
ENDS_WITHIN: Final = 60.0  # seconds, on a busy machine

Story = Callable[[Scene, S3Proxy], JobHandle]
Told = Callable[[Story], tuple[Scene, JobHandle]]


def stand_still(scene: Scene, worker: Worker, handle: JobHandle) -> None:
    """Stop all processes of the worker that has the job, and let its locks expire at once."""
    scene.tally.fault()
    worker.freeze()
    scene.expire_locks(handle)


def come_back(*workers: Worker) -> None:
    """Let workers go on, and end each once it has left its job."""
    for worker in workers:
        worker.process.send_signal(signal.SIGTERM)
        worker.thaw()
    for worker in workers:
        worker.process.wait(ENDS_WITHIN)


def wait_ended(handle: JobHandle) -> None:
    """Wait until clients see the end of a job."""
    wait_until(lambda: handle.status().state in TERMINAL, "the job has ended")


def end_by_another(
    scene: Scene, handle: JobHandle, *frozen: Worker, s3: S3Proxy | None = None
) -> None:
    """Let another worker end the job, and then the frozen ones come back."""
    with scene.worker("two"):
        wait_ended(handle)
        if s3 is not None:
            s3.released.set()
        come_back(*frozen)


# Stories


def late(scene: Scene, _s3: S3Proxy) -> JobHandle:
    """Let a worker stand still until the job's time is over; let it come back to a drawing."""
    with scene.worker() as first:
        handle = scene.submit(**LATE)
        scene.wait_begun(handle)
        stand_still(scene, first, handle)
        with scene.worker("two"):
            scene.wait_begun(handle, times=2)
            wait_until(lambda: time.time() > scene.at(handle, 1) + LIMIT, "the time is over")
            come_back(first)
            wait_ended(handle)
    return handle


def cut_off(scene: Scene, _s3: S3Proxy) -> JobHandle:
    """Let a worker without Redis draw until the job's time is over, while another draws too."""
    broker_url = scene.environ["ZLORA_BROKER_URL"]
    port = int(broker_url.rpartition(":")[2].partition("/")[0])
    with Proxy(port, scene.tally) as proxy, scene.worker(ZLORA_BROKER_URL=proxy.url) as first:
        handle = scene.submit(**LATE, do=["sleep"], seconds=0.6 * LIMIT)
        scene.wait_begun(handle)
        proxy.break_at(b".")
        wait_until(lambda: proxy.is_down, "the worker is cut off")
        scene.expire_locks(handle)
        with scene.worker("two"):
            scene.wait_begun(handle, times=2)
            proxy.restore()
            wait_ended(handle)
            come_back(first)
    return handle


def frozen_while_it_ends(scene: Scene, s3: S3Proxy) -> JobHandle:
    """Let a worker fail, and stand still while its first request to end the job is under way."""
    with scene.worker() as first:
        s3.meet(r"(DELETE \S*/outputs|PUT \S*/manifest)", delay)
        handle = scene.submit(do=["nan"])
        wait_until(s3.held.is_set, "the worker ends the job")
        stand_still(scene, first, handle)
        end_by_another(scene, handle, first, s3=s3)
    return handle


def frozen_before_its_manifest(scene: Scene, s3: S3Proxy) -> JobHandle:
    """Let a worker stand still while its manifest is under way, and cancel the job."""
    with scene.worker() as first:
        s3.meet(r"PUT \S*/manifest", delay)
        handle = scene.submit()
        wait_until(s3.held.is_set, "the worker writes the manifest")
        stand_still(scene, first, handle)
        handle.cancel()
        end_by_another(scene, handle, first, s3=s3)
    return handle


def frozen_before_its_retry(scene: Scene, _s3: S3Proxy) -> JobHandle:
    """Let a worker come back after the job has failed, and meet an error that is tried again."""
    with scene.worker() as first:
        handle = scene.submit(steps=1, step=3, do=["nan", "unreachable"])
        scene.wait_begun(handle)
        stand_still(scene, first, handle)
        end_by_another(scene, handle, first)
    return handle


def frozen_one_after_the_other(scene: Scene, _s3: S3Proxy) -> JobHandle:
    """Let each worker that takes the job stand still, except the last; then let all come back."""
    with ExitStack() as stack:
        handle = scene.submit(steps=1, step=1)
        workers = list[Worker]()
        for count in range(FROZEN):
            workers.append(stack.enter_context(scene.worker(f"w{count}")))
            scene.wait_begun(handle, times=count + 1)
            stand_still(scene, workers[-1], handle)
        end_by_another(scene, handle, *workers)
    return handle


WITH_A_FOLDER: Final[tuple[Story, ...]] = (
    frozen_one_after_the_other,
    late,
    cut_off,
    frozen_before_its_retry,
)
WITH_S3: Final[tuple[Story, ...]] = (frozen_while_it_ends, frozen_before_its_manifest)


@pytest.fixture(scope="module", autouse=True)
def told(tmp_path_factory: pytest.TempPathFactory, valkey: Valkey, tally: Tally) -> Iterator[Told]:
    """Begin all stories; the value waits for the end of one, and returns its queue and job."""
    folder = tmp_path_factory.mktemp("stories")
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(len(WITH_A_FOLDER + WITH_S3)))
        runs = dict[Story, tuple[Scene, Future[JobHandle]]]()

        def begin(story: Story, s3: S3Proxy, **variables: str) -> Scene:
            name = story.__name__
            scene = Scene(
                folder / name, tally, broker_url=valkey.url, queue=name, **SHORT, **variables
            )
            stack.enter_context(closing(scene))
            runs[story] = scene, threads.submit(story, scene, s3)
            return scene

        unused = stack.enter_context(S3Proxy(0, tally))
        for story in WITH_A_FOLDER:
            begin(story, unused)
        port = stack.enter_context(seaweed.seaweed(tmp_path_factory.mktemp("seaweed")))
        for story in WITH_S3:
            proxy = stack.enter_context(S3Proxy(port, tally))
            store = f"s3://{seaweed.BUCKET}/{story.__name__}"
            scene = begin(
                story, proxy, ZLORA_STORE=store, ZLORA_S3_ENDPOINT=proxy.url, **seaweed.ENVIRON
            )
            scene.bucket = BucketObjects(port, story.__name__)
        yield lambda story: (runs[story][0], runs[story][1].result())


@pytest.mark.parametrize("story", [late, cut_off, frozen_while_it_ends])
def test_a_worker_that_comes_back_neither_ends_the_job_of_its_successor_nor_deletes_its_images(
    told: Told, story: Story
) -> None:
    scene, handle = told(story)

    assert handle.result(timeout=5).base_intact
    assert scene.begun(handle) == 2
    assert scene.audit() == CLEAN


def test_the_manifest_of_a_frozen_worker_is_no_result_after_the_job_was_cancelled(
    told: Told,
) -> None:
    scene, handle = told(frozen_before_its_manifest)

    with pytest.raises(JobRevoked):
        handle.result(timeout=5)
    assert handle.status().state is JobState.REVOKED
    assert scene.audit() == CLEAN


def test_a_frozen_worker_does_not_retry_a_job_that_has_failed(told: Told) -> None:
    scene, handle = told(frozen_before_its_retry)

    with pytest.raises(GenerationFailed):
        handle.result(timeout=5)
    assert "RETRY" not in scene.witness.states(handle.id)
    assert scene.audit() == CLEAN


def test_workers_that_stand_still_poison_no_job(told: Told) -> None:
    scene, handle = told(frozen_one_after_the_other)

    assert handle.result(timeout=5).base_intact
    assert scene.begun(handle) == FROZEN + 1
    assert scene.audit() == CLEAN
