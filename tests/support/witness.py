"""What was ever shown of the jobs on a broker, to whoever asked at the right moment."""

import json
import time
import uuid
from collections import defaultdict
from contextlib import suppress
from threading import Event, Thread
from typing import Any, Final

import redis
from support.processes import wait_until
from zlora import JobState

NAME: Final = "witness"  # of its connection: a fault that cuts others leaves it alone
TERMINAL: Final = (JobState.SUCCESS, JobState.FAILURE, JobState.REVOKED)

_PREFIX: Final = "celery-task-meta-"
_AGAIN: Final = 0.02  # seconds until the next try where Redis is away


class Witness:
    """Hears each state as Celery's result backend publishes it, in a thread.

    While Redis restarts nobody can show anything; what is stored when this is back is taken as shown.
    """

    def __init__(self, url: str) -> None:
        self._url, self._over, self._listens = url, Event(), Event()
        self._states: dict[str, list[str]] = defaultdict(list)
        self._verdicts: dict[str, list[str]] = defaultdict(list)
        self._marks: set[str] = set()
        self._thread = Thread(target=self._run, name="witness", daemon=True)
        self._thread.start()
        self._listens.wait(10)

    def states(self, job_id: str) -> list[str]:
        """The states of a job, in order; one that is repeated counts once."""
        self._catch_up()
        return list(self._states[job_id])

    def verdicts(self, job_id: str) -> list[str]:
        """The terminal states of a job with what they say, each that differs from all before it."""
        return list(self._verdicts[job_id])

    def look_back(self) -> None:
        """Wait until all that was shown before now is heard, and look at what is stored."""
        self._catch_up()
        with self._connection() as connection:
            self._look(connection)

    def close(self) -> None:
        """Hear no more."""
        self._over.set()
        with suppress(redis.RedisError), self._connection() as connection:
            connection.publish(f"{_PREFIX}over", b"over")  # so that it need not wait
        self._thread.join(10)

    def _run(self) -> None:
        while not self._over.is_set():
            with suppress(redis.RedisError), self._connection() as connection:
                self._listen(connection)
            self._over.wait(_AGAIN)

    def _listen(self, connection: "redis.Redis") -> None:
        with connection.pubsub() as channel:  # type: ignore[no-untyped-call]  # redis-py's
            channel.psubscribe(f"{_PREFIX}*")
            while not self._over.is_set():
                message: Any = channel.get_message(timeout=0.5)
                if message is not None and message["type"] == "psubscribe":
                    self._look(connection)  # what was shown before
                    self._listens.set()
                elif message is not None and message["type"] == "pmessage":
                    self._hear(message["channel"], message["data"])

    def _look(self, connection: "redis.Redis") -> None:
        names = list(connection.scan_iter(f"{_PREFIX}*", count=1000))
        for name, text in zip(names, connection.mget(names) if names else (), strict=True):
            if text is not None:
                self._hear(name, text)

    def _hear(self, name: bytes, text: bytes | str) -> None:
        job_id = name.decode().removeprefix(_PREFIX)
        try:
            meta = json.loads(text)
            state, result = meta["status"], meta["result"]
        except (ValueError, LookupError, TypeError):
            self._marks.add(job_id)  # one's own, or a stranger's bytes
            return
        if self._states[job_id][-1:] != [state]:
            self._states[job_id].append(state)
        verdict = json.dumps([state, result], sort_keys=True)
        if state in TERMINAL and verdict not in self._verdicts[job_id]:
            self._verdicts[job_id].append(verdict)

    def _catch_up(self) -> None:
        """Messages come in order, so that one's own mark is the last of them. Lost in a restart it is sent again."""
        mark = f"mark-{uuid.uuid4()}"
        with self._connection() as connection:

            def is_heard() -> bool:
                connection.publish(f"{_PREFIX}{mark}", b"mark")
                time.sleep(0.01)
                return mark in self._marks

            wait_until(is_heard, "the witness hears its own mark")

    def _connection(self) -> "redis.Redis":
        return redis.Redis.from_url(self._url, client_name=NAME, socket_connect_timeout=1)
