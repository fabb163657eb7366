"""One subscribing connection for all the jobs that a process waits for.

A worker's answer is stored and published under one name, by one command. Nothing that was published while nobody
listened comes again, so whoever waits is rung once its subscription holds, and after each loss of the connection.
"""

import asyncio
import logging
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from zlora import config
from zlora.broker.celery_app import IMPATIENCE
from zlora.errors import BrokerUnavailable

Ring = Callable[[], None]

_SILENCE: Final = (
    5.0  # seconds without a word until Redis is asked for one; then as many until it counts as lost
)
_PAUSES: Final = (
    0.1,
    2.0,
)  # seconds before the first try to connect again, and at most; doubled in between
_ENDING: Final = 5.0  # seconds

logger = logging.getLogger("zlora.broker.result_listener")


class Listener:
    """Rings at news of jobs, from a thread of its own that begins with the first watch, in each process anew."""

    def __init__(self, url: str, channel_of: Callable[[str], str]) -> None:
        """`url` is that of the result backend; `channel_of` names a job's channel there."""
        self._url, self._channel_of = url, channel_of
        self._ear: _Ear | None = None
        self._stop_ear: weakref.finalize[Any, Any] | None = None  # for a client that nobody closes
        self._opening, self._is_closed = threading.Lock(), False

    @contextmanager
    def watch(self, job_id: str, ring: Ring) -> Iterator[None]:
        """Ring at each answer to the job from now on, and where one may have been missed.

        Raises `BrokerUnavailable` where the listener is closed.
        """
        ear, channel = self._open(), self._channel_of(job_id)
        ear.ask(_Watch(channel, ring, begins=True))
        try:
            yield
        finally:
            ear.ask(_Watch(channel, ring, begins=False))

    def away(self) -> float:
        """Seconds since the connection was lost; 0 where it is there, or not needed yet."""
        lost = self._ear.lost if self._ear else None
        return 0.0 if lost is None else time.monotonic() - lost

    def close(self) -> None:
        """Ring everybody, end the thread, and give its connection back; nothing is watched any more."""
        with self._opening:
            self._is_closed, ear = True, self._ear
        if self._stop_ear is not None and ear is not None:
            self._stop_ear()
            ear.join()

    def _open(self) -> "_Ear":
        with self._opening:
            if self._is_closed:
                raise BrokerUnavailable("the client is closed")
            if self._ear is None or not self._ear.listens():
                if self._stop_ear is not None:
                    self._stop_ear.detach()
                self._ear = _Ear(self._url, self._channel_of(str(uuid.uuid4())))
                self._stop_ear = weakref.finalize(self, self._ear.stop)
            return self._ear


class _Watch(NamedTuple):
    """Somebody begins to watch a channel, or ends."""

    channel: str
    ring: Ring
    begins: bool


class _Ear:
    """The thread and its connection. All that it knows is touched in its own loop.

    What others ask of it is put into a queue without a lock: a watch may end wherever a generator is collected, also
    in the middle of another's.
    """

    lost: float | None  # since when there is no connection, by the monotonic clock

    def __init__(self, url: str, idle: str) -> None:
        self.lost = None
        self._pid = os.getpid()
        self._url, self._idle = (
            config.redis_url(url),
            idle,
        )  # a channel without news, which holds the connection
        self._asked: deque[_Watch] = deque()
        self._rings: dict[str, list[Ring]] = {}
        self._change = asyncio.Event()
        # Asked for besides the cancelling, which Python 3.11 loses in a `wait_for` that is done.
        self._broken = self._over = False
        self._loop = asyncio.new_event_loop()
        self._listening = self._loop.create_task(self._listen())
        self._thread = threading.Thread(target=self._run, name="zlora-listener", daemon=True)
        self._thread.start()

    def listens(self) -> bool:
        """Whether its thread is there: none outlives a fork."""
        return self._pid == os.getpid() and self._thread.is_alive()

    def ask(self, watch: _Watch) -> None:
        """Begin or end a watch soon."""
        self._asked.append(watch)
        self._call(self._change.set)

    def stop(self) -> None:
        """Ring everybody and end the thread, soon."""
        if self._pid == os.getpid():
            self._over = True
            self._call(self._end)

    def join(self) -> None:
        """Wait for that."""
        if self._pid == os.getpid() and threading.current_thread() is not self._thread:
            self._thread.join(_ENDING)

    def _end(self) -> None:
        self._break()
        self._listening.cancel()

    def _break(self) -> None:
        self._broken = True
        self._change.set()

    @property
    def _ends(self) -> bool:
        return self._broken or self._over

    def _call(self, action: Callable[[], Any]) -> None:
        with suppress(RuntimeError):  # the loop has ended: the client is closed
            self._loop.call_soon_threadsafe(action)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._listening)
        self._take()
        self._ring_all()
        self._loop.close()

    async def _listen(self) -> None:
        shortest, longest = _PAUSES
        pause = shortest
        while not self._over:
            try:
                await self._connected()
            # The thread's boundary: whatever ends a connection, those who wait are rung, and there is another one.
            except* Exception as errors:  # noqa: BLE001
                if self.lost is None:
                    self.lost, pause = time.monotonic(), shortest
                    logger.info("results are not heard for now: %s", errors.exceptions[0])
                self._ring_all()
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _connected(self) -> None:
        """Listen until the connection is lost, which raises."""
        self._broken = False
        options: dict[str, Any] = {
            "socket_timeout": IMPATIENCE,
            "socket_connect_timeout": IMPATIENCE,
            "client_name": "z-image-lora",
            # Not even within a command: it would read beside whoever reads already.
            "retry": Retry(NoBackoff(), 0, supported_errors=()),
        }
        async with (
            redis.asyncio.Redis.from_url(self._url, **options) as client,
            client.pubsub() as pubsub,
        ):
            self._take()
            await pubsub.subscribe(self._idle, *self._rings)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow(pubsub))
                tasks.create_task(self._hear(pubsub))

    async def _follow(self, pubsub: Any) -> None:
        """Subscribe to the channels that somebody watches, and leave the others."""
        try:
            while not self._ends:
                self._change.clear()
                changed = self._take()
                if watched := changed & self._rings.keys():
                    await pubsub.subscribe(
                        *watched
                    )  # those that are subscribed to are confirmed once more
                if left := changed - self._rings.keys():
                    await pubsub.unsubscribe(*left)
                if not self._ends:
                    await self._change.wait()
        finally:
            self._break()

    def _take(self) -> set[str]:
        """Do what was asked for; the channels that it was about."""
        changed = set()
        while self._asked:
            watch = self._asked.popleft()
            changed.add(watch.channel)
            rings = self._rings.setdefault(watch.channel, [])
            if watch.begins:
                rings.append(watch.ring)
            else:
                rings.remove(watch.ring)
            if not rings:
                del self._rings[watch.channel]
        return changed

    async def _hear(self, pubsub: Any) -> None:
        try:
            asked = False
            while not self._ends:
                message = await pubsub.get_message(timeout=_SILENCE)
                if message is not None:
                    asked = False
                    self._told(message["type"], message["channel"])
                elif asked:
                    raise redis.ConnectionError("Redis is silent")
                else:
                    asked = True
                    await pubsub.ping()
        finally:
            self._break()

    def _told(self, kind: str, channel: bytes | None) -> None:
        if kind == "subscribe":
            self.lost = None
        if kind in ("message", "subscribe") and channel is not None:
            for ring in self._rings.get(channel.decode(), []):
                ring()

    def _ring_all(self) -> None:
        for rings in list(self._rings.values()):
            for ring in rings:
                ring()
