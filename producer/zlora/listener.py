"""One subscribing connection for all the jobs that a process waits for.

A worker's answer is stored and published under one name, by one command. Nothing that was published while nobody
listened comes again, so whoever waits is rung once its subscription holds, and after each loss of the connection.
"""

import asyncio
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from zlora import wire

Ring = Callable[[], None]

_SILENCE: Final = 5.0  # seconds without a word until Redis is asked for one; then as many until it counts as lost
_PAUSES: Final = (0.1, 2.0)  # seconds before the first try to connect again, and at most; doubled in between
_ENDING: Final = 5.0  # seconds


class Listener:
    """Rings at news of jobs, from a thread of its own that begins with the first watch, in each process anew."""

    def __init__(self, url: str, channel_of: Callable[[str], str]) -> None:
        """`url` is that of the result backend; `channel_of` names a job's channel there."""
        self._url, self._channel_of = url, channel_of
        self._ear: _Ear | None = None
        self._opening = threading.Lock()

    @contextmanager
    def watch(self, job_id: str, ring: Ring) -> Iterator[None]:
        """Ring at each answer to the job from now on, and where one may have been missed."""
        ear, channel = self._open(), self._channel_of(job_id)
        ear.add(channel, ring)
        try:
            yield
        finally:
            ear.remove(channel, ring)

    def away(self) -> float:
        """Seconds since the connection was lost; 0 where it is there, or not needed yet."""
        lost = self._ear.lost if self._ear else None
        return 0.0 if lost is None else time.monotonic() - lost

    def close(self) -> None:
        """End the thread, and give its connection back."""
        if self._ear is not None and self._ear.pid == os.getpid():
            self._ear.close()
        self._ear = None

    def _open(self) -> "_Ear":
        with self._opening:
            if self._ear is None or self._ear.pid != os.getpid():  # no thread outlives a fork
                self._ear = _Ear(self._url, self._channel_of(str(uuid.uuid4())))
            return self._ear


class _Ear:
    """The thread, its connection, and who is rung. All that touches the connection happens in the thread's loop."""

    def __init__(self, url: str, idle: str) -> None:
        self.pid, self.lost = os.getpid(), None
        self._url, self._idle = wire.redis_url(url), idle  # a channel without news, which holds the connection
        self._lock = threading.Lock()
        self._rings: dict[str, list[Ring]] = {}
        self._changed: set[str] = set()  # channels to subscribe to, or to leave
        self._change = asyncio.Event()
        self._over = False  # asked for besides the cancelling, which Python 3.11 loses in a `wait_for` that is done
        self._loop = asyncio.new_event_loop()
        self._listening = self._loop.create_task(self._listen())
        self._thread = threading.Thread(target=self._run, name="zlora-listener", daemon=True)
        self._thread.start()

    lost: float | None  # since when there is no connection, by the monotonic clock

    def add(self, channel: str, ring: Ring) -> None:
        """Ring at news in the channel, once the subscription holds."""
        with self._lock:
            self._rings.setdefault(channel, []).append(ring)
            self._changed.add(channel)
        self._call(self._change.set)

    def remove(self, channel: str, ring: Ring) -> None:
        """Ring there no more."""
        with self._lock:
            rings = self._rings[channel]
            rings.remove(ring)
            if not rings:
                del self._rings[channel]
            self._changed.add(channel)
        self._call(self._change.set)

    def close(self) -> None:
        """End the thread."""
        self._over = True
        self._call(self._listening.cancel)
        self._thread.join(_ENDING)

    def _call(self, action: Callable[[], Any]) -> None:
        with suppress(RuntimeError):  # the loop has ended: the client is closed
            self._loop.call_soon_threadsafe(action)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._listening)
        self._loop.close()

    async def _listen(self) -> None:
        shortest, longest = _PAUSES
        pause = shortest
        while not self._over:
            try:
                await self._connected()
            except* (redis.RedisError, OSError):
                if self.lost is None:
                    self.lost, pause = time.monotonic(), shortest
                    self._ring(None)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _connected(self) -> None:
        """Listen until the connection is lost, which raises."""
        options: dict[str, Any] = {
            "socket_timeout": wire.IMPATIENCE,
            "socket_connect_timeout": wire.IMPATIENCE,
            "client_name": "z-image-lora",
            "retry": Retry(NoBackoff(), 0),
        }
        async with redis.asyncio.Redis.from_url(self._url, **options) as client, client.pubsub() as pubsub:
            await pubsub.subscribe(self._idle)
            self.lost = None
            with self._lock:
                self._changed = set(self._rings)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow(pubsub))
                tasks.create_task(self._hear(pubsub))

    async def _follow(self, pubsub: Any) -> None:
        """Subscribe to the channels that somebody watches, and leave the others."""
        while not self._over:
            self._change.clear()
            with self._lock:
                changed, self._changed = self._changed, set()
                watched = changed & self._rings.keys()
            if watched:
                await pubsub.subscribe(*watched)
            if left := changed - watched:
                await pubsub.unsubscribe(*left)
            if not self._over:
                await self._change.wait()

    async def _hear(self, pubsub: Any) -> None:
        asked = False
        while not self._over:
            message = await pubsub.get_message(timeout=_SILENCE)
            if message is not None:
                asked = False
                if message["type"] in ("message", "subscribe"):
                    self._ring(message["channel"].decode())
            elif asked:
                raise redis.ConnectionError("Redis is silent")
            else:
                asked = True
                await pubsub.ping()

    def _ring(self, channel: str | None) -> None:
        """Ring those who watch a channel, or everybody."""
        with self._lock:
            found = [self._rings.get(channel, [])] if channel else list(self._rings.values())
            rings = [ring for group in found for ring in group]
        for ring in rings:
            ring()
