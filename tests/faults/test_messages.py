"""Messages that no child could draw: their producers hear of it, strangers' bytes are counted, and the worker lives."""

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
    b"\xff\xfe\x00", b"", b"{}", b"null", b"[]", b"5", b'"text"', b'{"body": 1}', b'{"body": "e30=", "headers": []}',
    b"[" * 100_000, b'{"body": "!", "headers": {}, "properties": {"delivery_tag": "x"}}', b"{" + b" " * 100_000,
]  # fmt: skip
# Headers of Celery's protocol, each with a value of a kind that it cannot have.
ODD_HEADERS: list[dict[str, Any]] = [
    {"retries": "many"}, {"timelimit": "long"}, {"timelimit": [1, 2, 3]}, {"expires": {"in": 5}}, {"eta": "soon"},
    {"task": 5}, {"task": None}, {"argsrepr": {"a": 1}}, {"origin": 7}, {"group": [1]}, {"lang": 3}, {"root_id": {}},
    {"shadow": [1]}, {"stamps": 5}, {"ignore_result": "no"}, {"zlora_submitted_at": [1]},
]  # fmt: skip


def test_jobs_that_cannot_be_read_fail_in_words_and_the_worker_lives(scene: Scene) -> None:
    with scene.worker() as running, scene.any_client() as other:
        refused = [
            sent(scene, other, "stranger", "zlora.nothing", [request("stranger")]),
            sent(scene, other, "no-argument", TASK_NAME, []),
            sent(scene, other, "many-arguments", TASK_NAME, [request("x"), 5]),
            sent(scene, other, "other-argument", TASK_NAME, [], kwargs={"picture": 1}),
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
        assert has_refused(scene, 3)  # those that no child could take
        said = running.log.read_text()
        assert not [
            prompt for prompt in ("'a city at night'", '"pickled"', '"yaml"') if prompt in said
        ]


def test_a_job_with_an_odd_header_is_answered(scene: Scene) -> None:
    """Drawn where nothing hangs on the header, refused where something does; never silence, never a dead worker."""
    with scene.worker() as running:
        handles = [tampered(scene, f"odd-{index}", odd) for index, odd in enumerate(ODD_HEADERS)]
        answers = [answer(handle) for handle in handles]

        assert "InvalidRequest" in answers
        assert set(answers) <= {"InvalidRequest", "drawn"}
        assert scene.submit().result(timeout=30).base_intact
        assert running.process.poll() is None
        assert len(scene.events("loaded")) == 1


def test_garbage_on_the_queue_is_counted_and_the_worker_lives(scene: Scene) -> None:
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


def test_what_watchers_see_of_a_job_has_no_secret_of_its_lora(scene: Scene) -> None:
    """Flower shows what is in the events."""
    with serving(with_a_lora) as host:
        url = f"{host.url}/a.safetensors?X-Amz-Signature={SECRET}"
        with scene.worker(ZLORA_ALLOW_HOSTS=host.name) as running, watched_events(scene) as events:
            handle = scene.submit(fields={"loras": [{"file": {"url": url}}]})
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


def test_a_lora_that_cannot_be_had_gives_no_secret_away(scene: Scene) -> None:
    """Refused for good, and out of order for now: neither error nor result, event nor log has the signature."""
    with serving(reply(status=403)) as refusing, serving(reply(status=503)) as broken:
        names = f"{refusing.name},{broken.name}"
        with scene.worker(ZLORA_ALLOW_HOSTS=names) as running, watched_events(scene) as events:
            refused, waiting = (
                scene.submit(
                    fields={
                        "loras": [
                            {"file": {"url": f"{url}/a.safetensors?X-Amz-Signature={SECRET}"}}
                        ]
                    }
                )
                for url in (refusing.url, broken.url)
            )
            with pytest.raises(LoraForbidden) as found:
                refused.result(timeout=30)
            wait_until(
                lambda: waiting.status().state is JobState.RETRY, "the other is to be tried again"
            )
            shown = [stored_meta(scene, handle) for handle in (refused, waiting)]
            status = waiting.status()
            waiting.cancel()
            with pytest.raises(JobRevoked):  # by its worker, where that has the lease yet
                waiting.result(timeout=30)
            wait_until(
                lambda: kinds(events, refused) >= {"task-received", "task-failed"},
                "the events arrive",
            )

        assert [SECRET in host.requests[0].target for host in (refusing, broken)] == [True, True]
        assert all("503" in text or "403" in text or "lora" in text.lower() for text in shown)
        for text in (
            *shown,
            str(status),
            repr(found.value),
            json.dumps(events),
            running.log.read_text(),
        ):
            assert SECRET not in text


def stored_meta(scene: Scene, handle: JobHandle) -> str:
    """A job's state and result as Redis has them."""
    with scene.broker() as broker:
        return str(broker.get(f"celery-task-meta-{handle.id}"))


def sent(
    scene: Scene, app: Celery, job_id: str, task: str, arguments: list[Any], **options: Any
) -> JobHandle:
    """A message of any Celery client."""
    scene.tally.fault()
    app.send_task(task, args=arguments, task_id=job_id, **options)
    return scene.answer_for(scene.client.job(job_id))


def tampered(scene: Scene, job_id: str, headers: dict[str, Any]) -> JobHandle:
    """A sound message with some headers replaced, on the queue."""
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


def answer(handle: JobHandle) -> str:
    """What a job came to."""
    try:
        handle.result(timeout=30)
    except InvalidRequest as error:
        return type(error).__name__
    return "drawn"


def has_refused(scene: Scene, count: int) -> bool:
    """Whether so many messages without a readable id were refused."""
    with scene.broker() as broker:
        return int(broker.get(f"zlora:refused:{scene.queue}") or 0) == count


def kinds(events: list[dict[str, Any]], handle: JobHandle) -> set[str]:
    """The kinds of events that were seen of a job."""
    return {event["type"] for event in events if event.get("uuid") == handle.id}


def with_a_lora(_: Request) -> bytes:
    return reply(lora_bytes())


@contextmanager
def watched_events(scene: Scene) -> Iterator[list[dict[str, Any]]]:
    """Every event on the broker, as Flower receives them."""
    events: list[dict[str, Any]] = []
    with scene.any_client() as app, app.connection() as connection:
        receiver = app.events.Receiver(connection, handlers={"*": events.append})
        watching = threading.Thread(
            target=lambda: receiver.capture(limit=None, timeout=None, wakeup=True)
        )
        watching.start()
        wait_until(
            lambda: events, "an event is seen"
        )  # a worker's heartbeat, which it sends when asked
        try:
            yield events
        finally:
            receiver.should_stop = True
            watching.join(30)
