"""The in-memory worker behaves as a real one, and has features for tests."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import redis
from zlora import Client, QueueInfo, webhook
from zlora.base_limits import BaseLimits
from zlora.client import Priority
from zlora.errors import (
    Conflict,
    InternalError,
    InvalidRequest,
    JobExpired,
    JobRevoked,
    JobUnknown,
    LoraNotFound,
    ResultTimeout,
    StoreFailed,
    ZloraError,
)
from zlora.schema import (
    Cancellation,
    GenerateRequest,
    GenerateResult,
    JobState,
    JobStatus,
    digest_of,
    parse_request,
    seed_of,
)
from zlora.testing import MemoryWorker, Progress, _draw_fake, fake_result

REQUEST = {"prompt": "a portrait"}
SECRET_URL = "https://us3r:pa55@example.com/x.safetensors?sig=t0ken"


class Clock:
    """A clock that a test can advance."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


# --- the same on Redis


@pytest.fixture(params=["memory", "redis"])
def client(request: pytest.FixtureRequest) -> Iterator[Client]:
    """Yield a client without a worker, in memory and on Redis."""
    if request.param == "memory":
        with MemoryWorker(paused=True).client() as opened:
            yield opened
        return
    url = request.getfixturevalue("broker_url")
    with redis.Redis.from_url(url) as connection:
        connection.flushall()
    with Client(url) as opened:
        yield opened


def test_the_same_request_under_the_same_id_is_the_same_job(client: Client) -> None:
    client.submit(REQUEST, job_id="job-1")
    client.submit(
        GenerateRequest(prompt="a portrait", num_images=1), job_id="job-1", priority="high"
    )

    assert client.submit(REQUEST, job_id="job-2").status().position == 1


def test_another_request_under_the_same_id_is_a_conflict(client: Client) -> None:
    """The first request stays queued."""
    client.submit(REQUEST, job_id="job-1")

    with pytest.raises(Conflict) as raised:
        client.submit({"prompt": "another"}, job_id="job-1")

    assert raised.value.details == {"job_id": "job-1"}
    assert client.job("job-1").status().state == JobState.PENDING


def test_no_job_of_many_is_queued_if_one_is_a_conflict(client: Client) -> None:
    client.submit({"prompt": "another"}, job_id="taken")

    with pytest.raises(Conflict):
        client.submit_many([REQUEST] * 2, job_ids=["a", "taken"])

    assert client.submit({"prompt": "a city"}, job_id="a").status().position == 1


def test_a_position_counts_the_jobs_that_are_due_earlier(client: Client) -> None:
    low = client.submit(REQUEST, priority="low")
    normal = [client.submit(REQUEST) for _ in range(2)]
    high = client.submit(REQUEST, priority="high")

    assert [job.status().position for job in (high, *normal, low)] == [0, 1, 2, 3]
    assert low.status() == JobStatus(state=JobState.PENDING, phase="queued", position=3)


def test_a_queued_job_that_is_cancelled_has_ended(client: Client) -> None:
    first, second = client.submit_many([REQUEST, REQUEST])

    assert first.cancel() == Cancellation.QUEUED
    assert first.cancel() == Cancellation.FINISHED
    assert first.status() == JobStatus(state=JobState.REVOKED)
    assert list(first.events(timeout=0)) == [JobStatus(state=JobState.REVOKED)]
    assert second.status().position == 0
    with pytest.raises(JobRevoked, match=first.id):
        first.result(timeout=0)


def test_a_cancelled_job_that_is_submitted_again_stays_cancelled(client: Client) -> None:
    client.submit(REQUEST, job_id="job-1").cancel()

    assert client.submit(REQUEST, job_id="job-1").status().state == JobState.REVOKED


def test_a_job_without_a_worker_has_no_result(client: Client) -> None:
    with pytest.raises(ResultTimeout):
        client.submit(REQUEST).result(timeout=0)


# --- results


def test_a_job_has_ended_before_submit_returns() -> None:
    worker = MemoryWorker()
    with worker.client() as client:
        fields = {"num_images": 2, "batch_size": 2, "output_format": "jpeg"}
        job = client.submit({**REQUEST, **fields}, job_id="job-1")

        assert job.status() == JobStatus(state=JobState.SUCCESS)
        assert job.cancel() == Cancellation.FINISHED
        result = job.result(timeout=0)

    first, second = result.images
    assert (first.key, first.content_type) == ("runs/job-1/outputs/0.jpeg", "image/jpeg")
    assert second.url == "https://pictures.invalid/runs/job-1/outputs/1.jpeg"
    assert (first.width, first.height, first.size) == (1024, 1024, 0)
    assert (first.batch_size, second.batch_size) == (2, 2)
    assert (first.seed, second.seed) == (seed_of("job-1"), seed_of("job-1") + 1)
    assert result.request_sha256 == digest_of(worker.requests["job-1"])


@pytest.mark.parametrize("fields", [{}, {"previews": True}], ids=str)
def test_the_progress_of_a_job_has_previews_if_its_request_asks_for_them(
    fields: dict[str, Any],
) -> None:
    found = list[str | None]()

    def draw(job_id: str, request: GenerateRequest, progress: Progress) -> GenerateResult:
        progress("denoising", 1, 2)
        found.append(opened.job(job_id).status().preview)
        return fake_result(job_id, request)

    with MemoryWorker(draw=draw).client() as opened:
        opened.submit({**REQUEST, **fields}).result(timeout=0)

    assert found == ["data:image/jpeg;base64," if fields else None]


def test_a_result_has_the_options_of_the_request_and_no_secret() -> None:
    loras = [
        {"file": {"url": SECRET_URL}, "weight": 0.5, "unet_weight": 0.7, "adapter_name": "anime"}
    ]
    request = {
        **REQUEST,
        "width": 512,
        "height": 768,
        "seed": 3,
        "loras": loras,
        "inline": True,
        "url_policy": "key",
    }
    with MemoryWorker().client() as client:
        result = client.submit(request).result(timeout=0)

    (image,), (receipt,) = result.images, result.loras
    assert (image.width, image.height, image.seed, image.url) == (512, 768, 3, None)
    assert image.data_uri == "data:image/png;base64,"
    assert (receipt.source, receipt.adapter_name) == ("https://example.com/x.safetensors", "anime")
    assert (receipt.unet_weight, receipt.text_encoder_weight) == (0.7, 0.5)
    assert not [secret for secret in ("us3r", "pa55", "t0ken") if secret in repr(result)]


def test_requests_has_each_job_once() -> None:
    worker = MemoryWorker()
    with worker.client() as client:
        for name in ("b", "a", "b"):
            client.submit(REQUEST, job_id=name)
        with pytest.raises(InvalidRequest):
            client.submit({"prompt": 1}, job_id="c")

    assert list(worker.requests.items()) == [
        (name, GenerateRequest(prompt="a portrait")) for name in ("b", "a")
    ]


def test_a_job_is_run_once_however_often_it_is_submitted() -> None:
    drawn: list[str] = []

    def draw(job_id: str, request: GenerateRequest, _: Progress) -> GenerateResult:
        drawn.append(job_id)
        return fake_result(job_id, request)

    with MemoryWorker(draw=draw).client() as client:
        jobs = [client.submit(REQUEST, idempotency_key="order 17") for _ in range(3)]

    assert drawn == [jobs[0].id]
    assert {job.id for job in jobs} == set(drawn)


@pytest.mark.parametrize(
    "error",
    [
        LoraNotFound("gone", {"status": 404}),
        StoreFailed(),
        JobExpired("late"),
        JobRevoked("unwanted"),
    ],
    ids=repr,
)
def test_an_error_of_draw_is_the_error_of_the_job(error: ZloraError) -> None:
    with MemoryWorker(draw=failing(error)).client() as client:
        job = client.submit(REQUEST)
        with pytest.raises(type(error), match=str(error)) as raised:
            job.result(timeout=0)

    revoked = isinstance(error, JobExpired | JobRevoked)
    assert job.status().state == (JobState.REVOKED if revoked else JobState.FAILURE)
    assert raised.value.details == error.details
    assert raised.value is not error  # it has crossed JSON


def test_another_exception_of_draw_fails_the_job_and_is_raised() -> None:
    with MemoryWorker(draw=failing(AssertionError("the prompt is wrong"))).client() as client:
        with pytest.raises(AssertionError, match="the prompt is wrong"):
            client.submit(REQUEST, job_id="job-1")
        with pytest.raises(InternalError, match="AssertionError: the prompt is wrong"):
            client.job("job-1").result(timeout=0)


def failing(error: Exception) -> Callable[..., GenerateResult]:
    def draw(*_: Any) -> GenerateResult:
        raise error

    return draw


# --- a paused worker


def test_a_draw_without_a_result_fails_the_job_and_raises() -> None:
    nothing: Any = lambda *_: None  # noqa: E731
    with MemoryWorker(draw=nothing).client() as client:
        with pytest.raises(msgspec.ValidationError):
            client.submit(REQUEST, job_id="job-1", webhook_url="https://example.com/hook")
        with pytest.raises(InternalError):
            client.job("job-1").result(timeout=0)


def test_jobs_are_run_by_priority() -> None:
    worker = MemoryWorker(paused=True)
    with worker.client() as client:
        order: list[tuple[str, Priority]] = [
            ("a", "low"),
            ("b", "normal"),
            ("c", "high"),
            ("d", "normal"),
        ]
        jobs = {
            name: client.submit(REQUEST, job_id=name, priority=priority) for name, priority in order
        }
        ended: list[str] = []
        while worker.run(1):
            ended += [
                name
                for name, job in jobs.items()
                if name not in ended and job.status().state == "SUCCESS"
            ]

    assert ended == ["c", "b", "d", "a"]
    assert worker.run() == 0


def test_watchers_see_every_step_of_a_job_in_another_thread() -> None:
    seen: list[JobStatus] = []
    steps = iter(range(1, 4))
    heard = threading.Semaphore(0)

    def draw(job_id: str, request: GenerateRequest, progress: Progress) -> GenerateResult:
        for step in steps:
            progress("denoising", step, 3)
            assert heard.acquire(timeout=10)
        return fake_result(job_id, request)

    worker = MemoryWorker(draw=draw, paused=True)
    with worker.client() as client:
        job = client.submit(REQUEST)
        events = job.events(timeout=10)
        seen.append(next(events))
        drawing = threading.Thread(target=worker.run)
        drawing.start()
        for status in events:
            seen.append(status)
            if status.phase == "denoising":
                heard.release()
        drawing.join()

    steps_seen = [
        (status.state, status.phase, status.step, status.steps)
        for status in seen
        if status.phase != "loading"
    ]
    assert steps_seen == [
        ("PENDING", "queued", None, None),
        *(("PROGRESS", "denoising", step, 3) for step in (1, 2, 3)),
        ("SUCCESS", None, None, None),
    ]


def test_a_running_job_that_is_cancelled_ends_with_its_present_step() -> None:
    steps: list[int] = []

    def cancelled_within(
        job_id: str, request: GenerateRequest, progress: Progress
    ) -> GenerateResult:
        for step in range(1, 4):
            progress("denoising", step, 3)
            steps.append(step)
            if step == 2:
                assert worker.client().job(job_id).cancel() == Cancellation.RUNNING
        return fake_result(job_id, request)

    worker = MemoryWorker(draw=cancelled_within, paused=True)
    with worker.client() as client:
        job = client.submit(REQUEST)
        worker.run()
        with pytest.raises(JobRevoked):
            job.result(timeout=0)

    assert steps == [1, 2]


def test_a_job_that_was_cancelled_before_its_submission_is_refused() -> None:
    with MemoryWorker().client() as client:
        assert client.job("job-1").status() == JobStatus(state=JobState.UNKNOWN)
        with pytest.raises(JobUnknown):
            client.job("job-1").result(timeout=0)
        assert client.job("job-1").cancel() == Cancellation.UNKNOWN

        with pytest.raises(JobRevoked):
            client.submit(REQUEST, job_id="job-1").result(timeout=0)


@pytest.mark.parametrize("looked_at", [False, True])
def test_a_job_that_does_not_start_in_time_expires(looked_at: bool) -> None:
    """The job expires when the worker takes it, or when its producer looks."""
    clock = Clock()
    worker = MemoryWorker(paused=True, clock=clock)
    with worker.client() as client:
        late, patient = (
            client.submit(REQUEST, expires_in=60),
            client.submit(REQUEST, expires_in=600),
        )
        clock.ahead = 61
        if not looked_at:
            assert worker.run() == 2

        with pytest.raises(JobExpired, match=late.id):
            late.result(timeout=0)
        assert late.status().state == JobState.REVOKED
        assert worker.run() == (1 if looked_at else 0)
        assert patient.result(timeout=0).job_id == patient.id


def test_webhooks_can_be_passed_to_a_receiver() -> None:
    """The worker has one webhook for each requested event; a receiver accepts its signature."""
    worker, secret = MemoryWorker(), webhook.new_secret()
    with worker.client() as client:
        client.submit(REQUEST, job_id="quiet")
        client.submit(REQUEST, job_id="well", webhook_url="https://example.com/well")
        client.submit(
            REQUEST,
            job_id="filtered",
            webhook_url="https://example.com/x",
            webhook_events=["job.failed"],
        )
        client.job("late").cancel()
        client.submit(REQUEST, job_id="late", webhook_url="https://example.com/late")
        drawn = client.job("well").result(timeout=0)

    verifier = webhook.Verifier(secret)
    events = [
        verifier.verify(
            posted.body, webhook.sign(posted.body, secret, message_id=posted.message_id)
        )
        for posted in worker.webhooks
    ]
    assert [posted.url for posted in worker.webhooks] == [
        "https://example.com/well",
        "https://example.com/late",
    ]
    assert [(event.type, event.job_id) for event in events] == [
        (webhook.SUCCEEDED, "well"),
        (webhook.CANCELLED, "late"),
    ]
    assert events[0].result == drawn
    assert isinstance(events[1].error, JobRevoked)


def test_many_wait_at_once_in_an_event_loop() -> None:
    worker = MemoryWorker(paused=True)

    async def main() -> list[GenerateResult]:
        async with worker.async_client() as client:
            jobs = await client.submit_many([REQUEST] * 200)
            waiting = asyncio.gather(*(job.result(timeout=10) for job in jobs))
            await asyncio.to_thread(worker.run)
            return await waiting

    results = asyncio.run(main())
    assert [result.job_id for result in results] == list(worker.requests)


def test_threads_that_submit_at_once_lose_no_job() -> None:
    worker = MemoryWorker()
    with worker.client() as client:
        threads = [
            threading.Thread(
                target=lambda: [client.submit(REQUEST).result(timeout=10) for _ in range(20)]
            )
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len(worker.requests) == 160
        assert {client.job(name).status().state for name in worker.requests} == {JobState.SUCCESS}


def test_a_fake_result_has_a_receipt_for_each_embedding() -> None:
    specs = [{"file": {"url": SECRET_URL}, "token": "cat"}, {"file": {"ref": "owner/x"}}]
    request = parse_request({"prompt": "a cat", "negative_prompt": "no cat", "embeddings": specs})

    result = fake_result("job", request)

    first, second = result.embeddings
    assert (first.source, first.used) == ("https://example.com/x.safetensors", {"cat": 2})
    assert second.source == "cozy://owner/x"
    assert result.request is not None
    assert [spec.file.sha256 for spec in result.request.embeddings] == [first.sha256] * 2


def test_a_fake_result_has_receipts_of_image_and_mask() -> None:
    files = {"image": {"url": SECRET_URL}, "mask": {"url": "job:earlier#1"}}
    request = parse_request({"prompt": "a cat", **files, "width": 512, "height": 256})

    result = fake_result("job", request)

    assert result.image_receipt is not None
    assert result.mask_receipt is not None
    assert result.image_receipt.source == "https://example.com/x.safetensors"
    assert (result.mask_receipt.source, result.mask_receipt.tier) == ("job:earlier#1", "store")
    assert (result.image_receipt.width, result.image_receipt.height) == (512, 256)
    assert result.request is not None
    assert result.request.image is not None
    assert result.request.image.sha256 == result.image_receipt.sha256


def test_a_fake_result_has_the_size_of_the_second_pass() -> None:
    request = parse_request(
        {"prompt": "a cat", "width": 512, "height": 256, "upscale": {"factor": 2}}
    )

    (image,) = fake_result("job", request).images

    assert (image.width, image.height) == (1024, 512)


Z_IMAGE = QueueInfo(
    base="Z-Image",
    model="z",
    models=("z", "another"),
    base_sha256="0" * 64,
    width=512,
    height=768,
    scheduler="FlowMatchEulerDiscreteScheduler",
    num_inference_steps=9,
    guidance_scale=0.0,
    limits=BaseLimits(side_step=16, prompts="chat", unread_guidance=0.0, has_text_loras=False),
    schedulers=("flow_match_euler",),
    timeout=60,
    url_policies=("key",),
    url_expires_in=3600,
    versions={},
    loaded_at=1.0,
)


@pytest.mark.parametrize("sweep", [None, {"seed": [1, 2]}])
def test_what_a_request_does_not_name_is_what_the_queue_serves(
    sweep: dict[str, Any] | None,
) -> None:
    with MemoryWorker(info=Z_IMAGE).client() as client:
        job = client.submit({"prompt": "a cat", "sweep": sweep})
        result = job.result(timeout=0)

    drawn = result.cells[0].request if sweep else result.request
    assert drawn
    assert (result.base, result.model, result.scheduler) == ("Z-Image", "z", Z_IMAGE.scheduler)
    assert (drawn.num_inference_steps, drawn.guidance_scale) == (9, 0.0)
    assert {(image.width, image.height) for image in result.images} == {(512, 768)}
    assert result.request_sha256 == digest_of(parse_request({"prompt": "a cat", "sweep": sweep}))


def test_what_a_request_names_is_not_changed_by_what_the_queue_serves() -> None:
    given = {"num_inference_steps": 4, "guidance_scale": 2.0, "width": 64, "height": 96}

    with MemoryWorker(info=Z_IMAGE).client() as client:
        result = client.submit({"prompt": "a", "model": "another", **given}).result(timeout=0)

    assert result.request
    assert {name: getattr(result.request, name) for name in given} == given
    assert result.model == "another"


def test_a_fake_job_has_the_steps_of_the_base_that_is_served() -> None:
    seen: list[tuple[str, int, int]] = []

    def draw(job_id: str, request: GenerateRequest, _progress: Progress) -> GenerateResult:
        return _draw_fake(job_id, request, lambda *report: seen.append(report), info=Z_IMAGE)

    with MemoryWorker(draw=draw).client() as client:
        client.submit({"prompt": "a cat", "num_images": 2})

    assert seen[-1] == ("denoising", 18, 18)


def test_a_fake_job_has_the_steps_that_are_drawn() -> None:
    seen: list[tuple[str, int, int]] = []

    def draw(job_id: str, request: GenerateRequest, _progress: Progress) -> GenerateResult:
        return _draw_fake(job_id, request, lambda *report: seen.append(report))

    with MemoryWorker(draw=draw).client() as client:
        client.submit({"prompt": "a cat", "image": {"url": "job:a#0"}, "strength": 0.5})

    assert seen[-1] == ("denoising", 14, 14)


def test_a_fake_result_survives_the_wire() -> None:
    request = parse_request({**REQUEST, "loras": [{"file": {"cozy_ref": "owner/name"}}]})

    with MemoryWorker().client() as client:
        result = client.submit(request, job_id="job-1").result(timeout=0)

    made = fake_result("job-1", request)
    assert result.images == made.images
    assert result.loras == made.loras
    assert result.request == made.request
