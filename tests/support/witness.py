"""All states of jobs that any client could have seen on a broker."""

import json
import time
import uuid
from collections import defaultdict
from contextlib import suppress
from threading import Event, Thread
from typing import Any, Final

import redis
from support.processes import wait_until
from zlora import JobState, config
from zlora.broker.connection import make_resilient

NAME: Final = "witness"  # of the connection, so that a fault which cuts connections spares it
TERMINAL: Final = (JobState.SUCCESS, JobState.FAILURE, JobState.REVOKED)

_PREFIX: Final = "celery-task-meta-"
_RETRY: Final = 0.02  # seconds until the next try if Redis is away


class Witness:
    """Records each state that Celery's result backend publishes, in a thread.

    After a restart of Redis, the states that are stored are recorded too.
    """

    def __init__(self, url: str) -> None:
        self._url, self._over, self._subscribed = url, Event(), Event()
        self._states: dict[str, list[str]] = defaultdict(list)
        self._ends: dict[str, list[str]] = defaultdict(list)
        self._ended, self._reopened = set[str](), set[str]()
        self._marks: set[str] = set()
        self._thread = Thread(target=self._run, name="witness", daemon=True)
        self._thread.start()
        self._subscribed.wait(10)

    def states(self, job_id: str) -> list[str]:
        """Return the states of a job, in order; a repeated state counts once."""
        self._catch_up()
        return list(self._states[job_id])

    def ends(self, job_id: str) -> list[str]:
        """Return the different terminal states of a job with their results, in order."""
        return list(self._ends[job_id])

    def was_reopened(self, job_id: str) -> bool:
        """Return whether a state of a running job was published after an end."""
        return job_id in self._reopened

    def look_back(self) -> None:
        """Wait until everything published before now is recorded, and record what is stored."""
        self._catch_up()
        with self._connection() as connection:
            self._look(connection)

    def close(self) -> None:
        """Stop the thread."""
        self._over.set()
        with suppress(redis.RedisError), self._connection() as connection:
            connection.publish(f"{_PREFIX}over", b"over")  # wakes the thread
        self._thread.join(10)

    def _run(self) -> None:
        while not self._over.is_set():
            with suppress(redis.RedisError), self._connection() as connection:
                self._listen(connection)
            self._over.wait(_RETRY)

    def _listen(self, connection: "redis.Redis") -> None:
        with connection.pubsub() as channel:  # type: ignore[no-untyped-call]  # redis-py's
            channel.psubscribe(f"{_PREFIX}*")
            while not self._over.is_set():
                message: Any = channel.get_message(timeout=0.5)
                if message is not None and message["type"] == "psubscribe":
                    self._look(connection)  # published before
                    self._subscribed.set()
                elif message is not None and message["type"] == "pmessage":
                    self._record(message["channel"], message["data"], is_published=True)

    def _look(self, connection: "redis.Redis") -> None:
        names = list(connection.scan_iter(f"{_PREFIX}*", count=1000))
        for name, text in zip(names, connection.mget(names) if names else (), strict=True):
            if text is not None:
                self._record(name, text)

    def _record(self, name: bytes, text: bytes | str, *, is_published: bool = False) -> None:
        job_id = name.decode().removeprefix(_PREFIX)
        try:
            meta = json.loads(text)
            state, result = meta["status"], meta["result"]
        except (ValueError, LookupError, TypeError):
            self._marks.add(job_id)  # a mark of this witness, or garbage from a test
            return
        if self._states[job_id][-1:] != [state]:
            self._states[job_id].append(state)
        # What is read may be newer than what is published next.
        if is_published and state in TERMINAL:
            self._ended.add(job_id)
        elif is_published and job_id in self._ended:
            self._reopened.add(job_id)
        end = json.dumps([state, _without_urls(result)], sort_keys=True)
        if state in TERMINAL and end not in self._ends[job_id]:
            self._ends[job_id].append(end)

    def _catch_up(self) -> None:
        """Publish a mark until it arrives: all messages before it have arrived too."""
        mark = f"mark-{uuid.uuid4()}"
        with self._connection() as connection:

            def arrived() -> bool:
                connection.publish(f"{_PREFIX}{mark}", b"mark")
                time.sleep(0.01)
                return mark in self._marks

            wait_until(arrived, "the witness receives its mark")

    def _connection(self) -> "redis.Redis":
        return opened(self._url, client_name=NAME, socket_connect_timeout=1)


def opened(url: str, **options: Any) -> "redis.Redis":
    """Open a connection to any broker that workers accept."""
    client = redis.Redis.from_url(config.redis_url(url), **options)
    make_resilient(client.connection_pool, url)
    return client


def _without_urls(result: Any) -> Any:
    """Return a result without the URLs of its images, which each answer signs anew."""
    images = result.get("images") if isinstance(result, dict) else None
    if not isinstance(images, list):
        return result
    urls = ("url", "url_expires_at")
    found = [
        {name: value for name, value in image.items() if name not in urls}
        if isinstance(image, dict)
        else image
        for image in images
    ]
    return result | {"images": found}
