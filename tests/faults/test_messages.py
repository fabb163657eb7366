"""Messages that no child can run: each is answered or counted, and the worker goes on."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from celery import Celery
from support.processes import wait_until
from support.scene import Scene, request
from support.servers import Request, lora_bytes, reply, serving
from zlora import JobHandle, JobState
from zlora.errors import InvalidRequest, JobRevoked, LoraForbidden
from zlora.schema import TASK_NAME

SECRET = "0123456789secret"
GARBAGE = [
    b"\xff\xfe\x00", b"", b"{}", b"null", b"[]", b"5", b'"text"', b'{"body": 1}',
    b'{"body": "e30=", "headers": []}', b"[" * 100_000, b"{" + b" " * 100_000,
    b'{"body": "!", "headers": {}, "properties": {"delivery_tag": "x"}}',
]  # fmt: skip
# Headers of Celery's protocol, each with a value of another type than the protocol has.
ODD_HEADERS: list[dict[str, Any]] = [
    {"retries": "many"}, {"timelimit": "long"}, {"timelimit": [1, 2, 3]}, {"expires": {"in": 5}},
    {"eta": "soon"}, {"task": 5}, {"task": None}, {"argsrepr": {"a": 1}}, {"origin": 7},
    {"group": [1]}, {"lang": 3}, {"root_id": {}}, {"shadow": [1]}, {"stamps": 5},
    {"ignore_result": "no"}, {"zlora_submitted_at": [1]},
]  # fmt: skip


def test_an_unreadable_job_fails_as_an_invalid_request_and_the_worker_goes_on(scene: Scene) -> None:
    with scene.worker() as running, scene.any_client() as other:
        refused = [
            sent(scene, other, "unknown", "zlora.nothing", [request("unknown")]),
            sent(scene, other, "no-argument", TASK_NAME, []),
            sent(scene, other, "many-arguments", TASK_NAME, [request("x"), 5]),
            sent(scene, other, "other-argument", TASK_NAME, [], kwargs={"image": 1}),
            sent(scene, other, "no-request", TASK_NAME, ["a city at night"]),
            sent(scene, other, "pickled", TASK_NAME, [request("pickled")], serializer="pickle"),
            sent(scene, other, "yaml", TASK_NAME, [request("yaml")], serializer="yaml"),
        ]
        for handle in refused:
            with pytest.raises(InvalidRequest):
                handle.result(timeout=30)

        assert scene.submit().result(timeout=30).base_intact
        assert running.process.poll() is None
        assert len(scene.events("loaded")) == 1
        assert has_refused(scene, 3)  # the unknown task, pickle and YAML
        prompts = ("'a city at night'", '"pickled"', '"yaml"')
        assert [prompt for prompt in prompts if prompt in running.log.read_text()] == []


def test_a_job_with_an_odd_header_is_drawn_or_refused(scene: Scene) -> None:
    """A job is drawn if no part of the worker needs the header."""
    with scene.worker() as running:
        handles = [tampered(scene, f"odd-{index}", odd) for index, odd in enumerate(ODD_HEADERS)]
        outcomes = [outcome(handle) for handle in handles]

        assert "InvalidRequest" in outcomes
        assert set(outcomes) <= {"InvalidRequest", "drawn"}
        assert scene.submit().result(timeout=30).base_intact
        assert running.process.poll() is None
        assert len(scene.events("loaded")) == 1


def test_garbage_in_the_queue_is_counted_and_the_worker_goes_on(scene: Scene) -> None:
    before = scene.submit()
    (name,) = scene.queue_lists()
    with scene.broker() as broker, scene.worker() as running:
        before.result(timeout=30)
        for count, garbage in enumerate(GARBAGE, 1):
            broker.lpush(name, garbage)
            scene.tally.fault()
            wait_until(partial(has_refused, scene, count), f"garbage {garbage[:20]!r} is counted")

        assert scene.submit().result(timeout=30).base_intact
        assert running.process.poll() is None
        assert scene.events("loaded")[0]["pid"] == scene.child(running)


def test_the_name_of_a_foreign_task_is_in_no_event(scene: Scene) -> None:
    """It would become a label of Flower's metrics, one for each name."""
    with scene.worker(), watched_events(scene) as events, scene.any_client() as other:
        for index in range(5):
            sent(scene, other, f"foreign-{index}", f"task.number{index}", [request("x")])
        handle = scene.submit()
        handle.result(timeout=30)
        wait_until(lambda: "task-succeeded" in kinds(events, handle), "the events arrive")

    assert has_refused(scene, 5)
    assert "task.number" not in json.dumps(events)


def test_events_result_and_log_of_a_job_have_no_secret_of_its_lora(scene: Scene) -> None:
    """Flower shows the content of events."""
    with serving(serve_lora) as host:
        url = f"{host.url}/a.safetensors?X-Amz-Signature={SECRET}"
        with scene.worker(ZLORA_ALLOW_HOSTS=host.name) as running, watched_events(scene) as events:
            handle = scene.submit(fields=with_lora(url))
            result = handle.result(timeout=30)
            wait_until(
                lambda: kinds(events, handle) >= {"task-received", "task-succeeded"},
                "the events arrive",
            )

        assert len(host.requests) == 1
        assert SECRET in host.requests[0].target
        assert SECRET not in json.dumps(events)
        assert SECRET not in str(result)
        assert SECRET not in running.log.read_text()


def test_errors_events_and_log_of_a_failed_download_have_no_secret_of_the_lora(
    scene: Scene,
) -> None:
    """One server refuses the download, and the other one fails for now."""
    with serving(reply(status=403)) as refusing, serving(reply(status=503)) as broken:
        names = f"{refusing.name},{broken.name}"
        with scene.worker(ZLORA_ALLOW_HOSTS=names) as running, watched_events(scene) as events:
            refused, waiting = (
                scene.submit(fields=with_lora(f"{host.url}/a.safetensors?signature={SECRET}"))
                for host in (refusing, broken)
            )
            with pytest.raises(LoraForbidden) as found:
                refused.result(timeout=30)
            wait_until(
                lambda: waiting.status().state is JobState.RETRY,
                "the other job waits for its retry",
            )
            shown = [stored_meta(scene, handle) for handle in (refused, waiting)]
            status = waiting.status()
            waiting.cancel()
            with pytest.raises(JobRevoked):  # by its worker, if the worker still has the lease
                waiting.result(timeout=30)
            wait_until(
                lambda: kinds(events, refused) >= {"task-received", "task-failed"},
                "the events arrive",
            )

        assert [SECRET in host.requests[0].target for host in (refusing, broken)] == [True, True]
        assert all("503" in text or "403" in text or "lora" in text.lower() for text in shown)
        log = running.log.read_text()
        for text in (*shown, str(status), repr(found.value), json.dumps(events), log):
            assert SECRET not in text


def stored_meta(scene: Scene, handle: JobHandle) -> str:
    """Return the state and result of a job as Redis has them."""
    with scene.broker() as broker:
        return str(broker.get(f"celery-task-meta-{handle.id}"))


def sent(
    scene: Scene, app: Celery, job_id: str, task: str, arguments: list[Any], **options: Any
) -> JobHandle:
    """Send a message as any Celery client does."""
    scene.tally.fault()
    app.send_task(task, args=arguments, task_id=job_id, **options)
    return scene.answer_for(scene.client.job(job_id))


def tampered(scene: Scene, job_id: str, headers: dict[str, Any]) -> JobHandle:
    """Queue a good message with some headers replaced."""
    scene.tally.fault()
    with scene.any_client() as other, scene.broker() as broker:
        other.send_task(
            TASK_NAME, args=[request(job_id)], task_id=job_id, queue="drafts", priority=0
        )
        message = json.loads(str(broker.rpop("drafts")))
        message["headers"] |= headers
        message["properties"]["delivery_info"]["routing_key"] = scene.queue
        assert json.loads(base64.b64decode(message["body"]))
        broker.lpush(scene.queue, json.dumps(message))
    return scene.answer_for(scene.client.job(job_id))


def outcome(handle: JobHandle) -> str:
    """Return "drawn", or the name of the error."""
    try:
        handle.result(timeout=30)
    except InvalidRequest as error:
        return type(error).__name__
    return "drawn"


def has_refused(scene: Scene, count: int) -> bool:
    """Return whether so many messages without a job id were refused."""
    with scene.broker() as broker:
        return int(broker.get(f"zlora:refused:{scene.queue}") or 0) == count


def kinds(events: list[dict[str, Any]], handle: JobHandle) -> set[str]:
    """Return the types of the events of a job."""
    return {event["type"] for event in events if event.get("uuid") == handle.id}


def with_lora(url: str) -> dict[str, Any]:
    """Return the field of a request with one LoRA."""
    return {"loras": [{"file": {"url": url}}]}


def serve_lora(_: Request) -> bytes:
    """Answer any request with a LoRA file."""
    return reply(lora_bytes())


@contextmanager
def watched_events(scene: Scene) -> Iterator[list[dict[str, Any]]]:
    """Collect all events on the broker, as Flower does."""
    events: list[dict[str, Any]] = []
    with scene.any_client() as app, app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": events.append})
        watching = threading.Thread(
            target=lambda: receiver.capture(limit=None, timeout=None, wakeup=True)
        )
        watching.start()
        wait_until(lambda: events, "an event arrives")  # a heartbeat of the worker
        try:
            yield events
        finally:
            receiver.should_stop = True
            watching.join(30)
