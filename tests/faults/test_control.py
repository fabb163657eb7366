"""What a producer controls: cancel, priority, deadlines, and one job per id."""

import signal
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import pytest
from support.processes import wait_until
from support.scene import Scene, Shared, request
from support.servers import Request, lora_bytes, reply, serving
from zlora import JobHandle, JobState
from zlora.broker.keys import lease_key
from zlora.errors import Conflict, JobExpired, JobRevoked, JobUnknown, ResultTimeout

STEP = 0.4  # seconds
ENDS_WITHIN = STEP + 0.5  # seconds from the cancel of a running job


def test_job_cancelled_in_the_queue_is_never_drawn_even_by_a_later_worker(scene: Scene) -> None:
    """Celery keeps its own revocations in the memory of workers."""
    with scene.worker(ZLORA_SHUTDOWN_TIMEOUT="1") as first:
        busy = scene.submit(do=["sleep"], seconds=60)
        scene.wait_begun(busy)
        cancelled, other = scene.submit(), scene.submit()
        assert cancelled.cancel() == "queued"
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(30) == 0

    with scene.worker("two"):
        assert other.result(timeout=60).base_intact
        assert busy.result(timeout=60).base_intact
        assert_revoked(scene, cancelled)
        assert scene.begun(cancelled) == 0


def test_job_cancelled_while_it_is_drawn_ends_within_a_step_and_the_model_stays(
    shared: Shared,
) -> None:
    scene, _ = shared
    cancelled, next_one = scene.submit(steps=100, step=STEP), scene.submit()
    scene.wait_step(cancelled, 2)

    start = time.monotonic()
    assert cancelled.cancel() == "running"
    with pytest.raises(JobRevoked):
        cancelled.result(timeout=30)
    seconds = time.monotonic() - start
    scene.tally.notes.append(
        f"a cancel took effect after {seconds:.2f} s, in a job with steps of {STEP} s"
    )
    assert seconds < ENDS_WITHIN

    assert next_one.result(timeout=30).base_intact
    assert_revoked(scene, cancelled)
    assert len(scene.events("loaded")) == 1


@pytest.mark.parametrize("where", ["running", "queued"])
def test_job_cancelled_before_or_after_its_child_is_killed_is_not_drawn_again(
    scene: Scene, where: str
) -> None:
    """The flag is in Redis, not in a worker's memory; the stored first image of two is deleted."""
    with scene.worker(FAKE_RELOAD_SECONDS="1.5") as running:
        cancelled = scene.submit(do=["nothing", "sleep"], seconds=60, fields={"num_images": 2})
        wait_until(lambda: scene.events("fault", cancelled)[1:], "the second image is begun")
        wait_until(
            lambda: [path.name for path in scene.files(cancelled)] == ["0.png"],
            "the first image is stored",
        )
        if where == "running":
            assert cancelled.cancel() == "running"
        scene.kill(scene.child(running))
        if where == "queued":
            wait_until(lambda: not is_leased(scene, cancelled), "the parent notes the death")
            # the sidecar has ended the job, or the next child does
            assert cancelled.cancel() in ("queued", "running")

        wait_until(lambda: cancelled.status().state is JobState.REVOKED, "the job is revoked")
        scene.wait_settled()
        assert scene.submit().result(timeout=30).base_intact
        assert_revoked(scene, cancelled)
        assert len(scene.events("begin", cancelled)) == 2


def test_job_cancelled_during_a_download_is_not_drawn(scene: Scene) -> None:
    """The source takes ten seconds for a file of a few KB."""
    with serving(slowly) as host, scene.worker(ZLORA_ALLOW_HOSTS=host.name):
        cancelled = scene.submit(fields={"loras": [{"file": {"url": f"{host.url}/a.safetensors"}}]})
        wait_until(lambda: host.sent > 0, "the download has begun")

        start = time.monotonic()
        assert cancelled.cancel() == "running"
        wait_until(lambda: cancelled.status().state is JobState.REVOKED, "the job is revoked")
        assert time.monotonic() - start < 2
        assert scene.submit().result(timeout=30).base_intact
        assert_revoked(scene, cancelled)
        assert scene.begun(cancelled) == 0


def test_job_cancelled_after_its_end_keeps_its_result(shared: Shared) -> None:
    scene, _ = shared
    handle = scene.submit()
    result = handle.result(timeout=30)

    assert handle.cancel() == "finished"
    assert handle.result(timeout=1) == result
    assert handle.status().state is JobState.SUCCESS


def test_jobs_are_drawn_by_priority_and_then_in_order(shared: Shared) -> None:
    """A job without a priority has the normal one."""
    scene, _ = shared
    first = scene.submit(steps=1, step=1)
    scene.wait_begun(first)
    order = ["low", "normal", "high", "low", None, "high"]
    ids = [
        scene.submit(options={"priority": priority} if priority else {}).id for priority in order
    ]
    for job_id in ids:
        scene.handles[job_id].result(timeout=30)

    begun = [event["label"] for event in scene.events("begin") if event["label"] in ids]
    assert [ids.index(label) for label in begun] == [2, 5, 1, 4, 0, 3]


def test_job_not_begun_before_its_deadline_expires_and_a_begun_one_goes_on(shared: Shared) -> None:
    scene, _ = shared
    in_time = scene.submit(steps=1, step=2, options={"expires_in": 1.5})
    scene.wait_begun(in_time)
    late = scene.submit(options={"expires_in": 1})

    assert in_time.result(timeout=30).base_intact
    with pytest.raises(JobExpired):
        late.result(timeout=30)
    assert scene.begun(late) == 0


def test_one_id_submitted_again_is_one_job(scene: Scene) -> None:
    """The job may be queued, running or done; another request with the same id is refused."""
    again = partial(scene.submit, job_id="one", steps=5, step=0.2)
    again(), again()
    with scene.worker(), scene.worker("two"):
        handle = scene.handles["one"]
        scene.wait_begun(handle)
        again()
        with pytest.raises(Conflict):
            scene.client.submit(request("one", steps=6), job_id="one")
        result = handle.result(timeout=30)

        assert again().result(timeout=30) == result
        assert scene.submit().result(timeout=30).base_intact
        assert scene.begun(handle) == 1


def test_id_that_was_never_submitted_is_unknown(scene: Scene) -> None:
    """Only a worker can look into the store: without a worker there is no answer."""
    unknown = scene.client.job("never-submitted")
    assert unknown.status().state is JobState.UNKNOWN
    with pytest.raises(ResultTimeout):
        unknown.result(timeout=0.5)

    def is_known_to_be_unknown() -> bool:
        try:
            unknown.result(timeout=0.5)
        except JobUnknown:
            return True
        except ResultTimeout:
            pass
        return False

    with scene.worker():
        wait_until(is_known_to_be_unknown, "the worker's sidecar answers")


def test_expired_result_is_read_from_the_store(shared: Shared) -> None:
    scene, _ = shared
    result = scene.submit(job_id="old").result(timeout=30)
    del scene.handles["old"]  # leaves the job out of the audit
    with scene.broker() as broker:
        assert broker.delete(*(name for name in broker.scan_iter("*old")))

    handle = scene.client.job("old")
    wait_until(lambda: handle.status().state is JobState.SUCCESS, "the worker's sidecar answers")
    assert handle.result(timeout=10) == result
    assert handle.cancel() == "finished"


def test_every_redis_key_of_a_job_expires(scene: Scene) -> None:
    """Jobs that are drawn, failed, cancelled, queued, or whose child was killed."""
    with scene.worker() as running, scene.broker() as broker:
        scene.submit().result(timeout=30)
        failed = scene.submit(do="nan")
        killed = scene.submit(do=["kill-child"], options={"expires_in": 60})
        wait_until(lambda: failed.status().state is JobState.FAILURE, "the job fails")
        killed.result(timeout=30)
        busy = scene.submit(steps=20, step=0.1)
        scene.wait_step(busy)
        queued, cancelled = scene.submit(options={"expires_in": 60}), scene.submit()
        cancelled.cancel()
        assert running.process.poll() is None

        names = [
            name
            for name in broker.scan_iter("*")
            if name.startswith(("zlora:", "celery-task-meta-"))
        ]
        assert {name.split(":")[1] for name in names if ":" in name} >= {
            "job",
            "ledger",
            "lease",
            "expiring",
        }
        assert [name for name in names if int(broker.ttl(name)) < 0] == []
        assert queued.result(timeout=30).base_intact


def test_producer_sees_position_phase_step_and_eta(scene: Scene) -> None:
    first = scene.submit(steps=20, step=0.1)
    others = [scene.submit() for _ in range(3)]
    places = [handle.status().position for handle in others]
    assert all(place is not None for place in places)
    assert all(later - earlier == 1 for earlier, later in pairwise(map(int, filter(None, places))))

    with scene.worker():
        seen = [
            wait_until(lambda: first.status() if first.status().step else None, "a step is seen")
        ]
        while (status := first.status()).state is JobState.PROGRESS:
            seen.append(status)
            time.sleep(0.05)
        for handle in others:
            handle.result(timeout=30)

    denoising = [status for status in seen if status.phase == "denoising"]
    steps = [status.step for status in denoising if status.step is not None]
    assert steps == sorted(steps)
    assert len(set(steps)) > 2
    assert {status.steps for status in denoising} == {20}
    etas = [status.eta for status in denoising if status.eta is not None]
    assert etas
    assert all(0 <= eta < 20 for eta in etas)


def is_leased(scene: Scene, handle: JobHandle) -> bool:
    """Return whether a worker holds the job's lease."""
    with scene.broker() as broker:
        return bool(broker.exists(lease_key(handle.id)))


def slowly(_: Request) -> Iterator[bytes]:
    """Yield a valid answer in slow pieces."""
    answer = reply(lora_bytes())
    for start in range(0, len(answer), 100):
        yield answer[start : start + 100]
        time.sleep(0.4)


def assert_revoked(scene: Scene, handle: JobHandle) -> None:
    """Assert that the job is revoked, and that the store has nothing of it."""
    assert handle.status().state is JobState.REVOKED
    with pytest.raises(JobRevoked):
        handle.result(timeout=1)
    assert not scene.files(handle)


def test_previews_are_in_events_and_nowhere_else_and_gone_after_the_job(shared: Shared) -> None:
    scene, worker = shared
    words = {}
    for previews in (False, True):
        handle = scene.submit(steps=30, step=0.05, fields={"previews": previews})
        events = list(handle.events(timeout=60))
        words[previews] = {event.preview for event in events if event.phase == "denoising"}
        assert events[-1].preview is None

    with scene.broker() as broker:
        kept = [broker.get(key) or "" for key in broker.scan_iter(_type="string")]
    assert words == {False: {None}, True: {"data:image/jpeg;base64,"}}
    assert not [value for value in kept if "image/jpeg" in value]
    assert "image/jpeg" not in (scene.run_folder(handle) / "manifest.json").read_text()
    assert "image/jpeg" not in worker.log.read_text()
