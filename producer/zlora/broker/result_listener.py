"""One subscribing connection for all the jobs that a process waits for.

A worker stores a state and publishes it by one command. What is published while nothing is
subscribed is lost, so a watcher is notified as soon as its subscription holds, and after each loss
of the connection: it then looks by itself.

After a fail-over a connection to the old primary may hold, and no worker publishes there any more.
So the name of the server is resolved anew every 10 s, and if another server answers there,
the connection counts as lost.
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
import redis.exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from zlora import config
from zlora.broker.celery_app import IMPATIENCE
from zlora.broker.connection import Primary
from zlora.errors import BrokerUnavailable

Notify = Callable[[], None]

_SILENCE: Final = 5.0  # seconds without data until a ping, and then until the connection is lost
_PAUSES: Final = (0.1, 2.0)  # seconds before connecting again: the first, doubled up to the last
_SERVER_CHECK: Final = 10.0  # seconds between two looks at which server has the name
_JOIN_TIMEOUT: Final = 5.0  # seconds

logger = logging.getLogger("zlora.broker.result_listener")


class Listener:
    """Notifies watchers from a thread, which starts with the first watch in each process."""

    def __init__(
        self, url: str, channel_of: Callable[[str], str], *, on_loss: Notify = lambda: None
    ) -> None:
        """Take the URL of the result backend, and a function from a job id to its channel there.

        `on_loss` is called in the thread at each loss of the connection, before the watchers.
        """
        self._url, self._channel_of, self._on_loss = url, channel_of, on_loss
        self._thread: _ListenerThread | None = None
        # Ends the thread of a client that is collected without `close`.
        self._stop_thread: weakref.finalize[Any, Any] | None = None
        self._starting, self._is_closed = threading.Lock(), False

    @contextmanager
    def watch(self, job_id: str, notify: Notify) -> Iterator[None]:
        """Call `notify` at each state of the job from now on, and if one may have been missed.

        Raises `BrokerUnavailable` if the listener is closed.
        """
        thread, channel = self._started(), self._channel_of(job_id)
        thread.change(_Change(channel, notify, begins=True))
        try:
            yield
        finally:
            thread.change(_Change(channel, notify, begins=False))

    def take(self, job_id: str) -> bytes | None:
        """Return the last state that was published for a watched job, once; None if there is none.

        It is the stored one, unless a newer one is about to be published.
        """
        thread = self._thread
        return None if thread is None else thread.published.pop(self._channel_of(job_id), None)

    def outage(self) -> float:
        """Seconds since the connection was lost; 0 if it holds, or is not needed yet."""
        lost = self._thread.lost if self._thread else None
        return 0.0 if lost is None else time.monotonic() - lost

    def losses(self) -> int:
        """Return how often the connection was lost."""
        return self._thread.losses if self._thread else 0

    def close(self) -> None:
        """Notify all watchers, end the thread, and give its connection back."""
        with self._starting:
            self._is_closed, thread = True, self._thread
        if self._stop_thread is not None and thread is not None:
            self._stop_thread()
            thread.join()

    def _started(self) -> "_ListenerThread":
        with self._starting:
            if self._is_closed:
                raise BrokerUnavailable("the client is closed")
            if self._thread is None or not self._thread.is_running():
                if self._stop_thread is not None:
                    self._stop_thread.detach()
                idle_channel = self._channel_of(str(uuid.uuid4()))
                self._thread = _ListenerThread(self._url, idle_channel, self._on_loss)
                self._stop_thread = weakref.finalize(self, self._thread.stop)
            return self._thread


class _Change(NamedTuple):
    """The beginning or the end of a watch."""

    channel: str
    notify: Notify
    begins: bool


class _ListenerThread:
    """The thread and its connection. Only the thread's own event loop touches its state.

    Other threads put changes into a queue without a lock: a watch may end wherever a generator is
    collected, also in the middle of another change.
    """

    lost: float | None  # since when there is no connection, by the monotonic clock
    losses: int
    published: dict[str, bytes]  # by channel; other threads take from it

    def __init__(self, url: str, idle_channel: str, on_loss: Notify) -> None:
        """Start the thread; a subscription to `idle_channel` keeps the connection open."""
        self.lost, self.losses, self._on_loss = None, 0, on_loss
        self.published = {}
        self._primary = Primary.of_url(url)
        self._pid = os.getpid()
        self._url, self._idle_channel = config.redis_url(url), idle_channel
        self._changes: deque[_Change] = deque()
        self._watchers: dict[str, list[Notify]] = {}
        self._changed, self._over = asyncio.Event(), asyncio.Event()
        # Kept beside the cancellation, which Python 3.11 loses in a `wait_for` that is done.
        self._is_broken = self._is_stopped = False
        self._loop = asyncio.new_event_loop()
        self._listening = self._loop.create_task(self._listen())
        self._thread = threading.Thread(target=self._run, name="zlora-listener", daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        """Return whether the thread runs in this process: threads do not survive a fork."""
        return self._pid == os.getpid() and self._thread.is_alive()

    def change(self, change: _Change) -> None:
        """Begin or end a watch soon."""
        self._changes.append(change)
        self._call(self._changed.set)

    def stop(self) -> None:
        """Notify all watchers and end the thread, soon."""

        def end() -> None:
            self._break()
            self._listening.cancel()

        if self._pid == os.getpid():
            self._is_stopped = True
            self._call(end)

    def join(self) -> None:
        """Wait until the thread has ended."""
        if self._pid == os.getpid() and threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_TIMEOUT)

    def _call(self, action: Callable[[], Any]) -> None:
        with suppress(RuntimeError):  # the loop has ended: the client is closed
            self._loop.call_soon_threadsafe(action)

    def _break(self) -> None:
        self._is_broken = True
        self._changed.set()
        self._over.set()

    @property
    def _is_ending(self) -> bool:
        return self._is_broken or self._is_stopped

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._listening)
        self._apply_changes()
        self._notify_all()
        self._loop.close()

    async def _listen(self) -> None:
        shortest, longest = _PAUSES
        pause = shortest
        while not self._is_stopped:
            try:
                await self._listen_once()
            # The thread's boundary: after any error watchers look, and the thread reconnects.
            except* Exception as errors:  # noqa: BLE001
                if self.lost is None:
                    self.lost, pause = time.monotonic(), shortest
                    self.losses += 1
                    self._on_loss()
                    reason = errors.exceptions[0]
                    logger.info("connection for results lost, connecting again: %s", reason)
                self._notify_all()
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _listen_once(self) -> None:
        """Listen until the connection is lost, which raises."""
        self._is_broken = False
        self._over.clear()
        async with await self._open() as client, client.pubsub() as pubsub:
            self._apply_changes()
            server = await _server_of(client)
            await pubsub.subscribe(self._idle_channel, *self._watchers)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._subscribe(pubsub))
                    tasks.create_task(self._receive(pubsub))
                    if server is not None:
                        tasks.create_task(self._check_server(server))
            finally:
                _abort(pubsub.connection)

    async def _open(self) -> "redis.asyncio.Redis":
        """Return a client of the server that has the name now; it connects at the first use."""
        options: dict[str, Any] = {
            "socket_timeout": IMPATIENCE,
            "socket_connect_timeout": IMPATIENCE,
            "client_name": "z-image-lora",
            # No retry within a command: its new connection would be read by two tasks.
            "retry": Retry(NoBackoff(), 0, supported_errors=()),
        }
        client = redis.asyncio.Redis.from_url(self._url, **options)
        if self._primary is not None:
            host, port = await asyncio.to_thread(self._primary.address)
            client.connection_pool.connection_kwargs |= {"host": host, "port": port}
        return client

    async def _check_server(self, server: str) -> None:
        """Raise `redis.ConnectionError` once the name belongs to another server."""
        while not self._is_ending:
            with suppress(TimeoutError):
                async with asyncio.timeout(_SERVER_CHECK):
                    await self._over.wait()
                    return
            found = server
            # A server that does not answer is noticed by the subscription itself.
            with suppress(redis.RedisError, OSError):
                async with await self._open() as client:
                    found = await _server_of(client) or server
            if found != server:
                raise redis.ConnectionError("the name of Redis belongs to another server")

    async def _subscribe(self, pubsub: Any) -> None:
        """Subscribe to the channels that are watched, and unsubscribe from the others."""
        try:
            while not self._is_ending:
                self._changed.clear()
                changed = self._apply_changes()
                # A second subscription is confirmed again, which notifies the new watcher.
                if watched := changed & self._watchers.keys():
                    await pubsub.subscribe(*watched)
                if left := changed - self._watchers.keys():
                    await pubsub.unsubscribe(*left)
                if not self._is_ending:
                    await self._changed.wait()
        finally:
            self._break()

    def _apply_changes(self) -> set[str]:
        """Begin and end the watches in the queue; return their channels."""
        changed = set()
        while self._changes:
            channel, notify, begins = self._changes.popleft()
            changed.add(channel)
            watchers = self._watchers.setdefault(channel, [])
            if begins:
                watchers.append(notify)
            else:
                watchers.remove(notify)
            if not watchers:
                del self._watchers[channel]
                self.published.pop(channel, None)
        return changed

    async def _receive(self, pubsub: Any) -> None:
        try:
            has_pinged = False
            while not self._is_ending:
                message = await pubsub.get_message(timeout=_SILENCE)
                if message is not None:
                    has_pinged = False
                    self._handle(message["type"], message["channel"], message["data"])
                elif has_pinged:
                    raise redis.ConnectionError("Redis does not answer a ping")
                else:
                    has_pinged = True
                    await pubsub.ping()
        finally:
            self._break()

    def _handle(self, kind: str, channel: bytes | None, data: Any) -> None:
        if kind == "subscribe":
            self.lost = None
        if kind not in ("message", "subscribe") or channel is None:
            return
        name = channel.decode()
        watchers = self._watchers.get(name, [])
        if kind == "message" and watchers:
            self.published[name] = data
        for notify in watchers:
            notify()

    def _notify_all(self) -> None:
        self.published.clear()  # others may have been missed
        for watchers in list(self._watchers.values()):
            for notify in watchers:
                notify()


async def _server_of(client: "redis.asyncio.Redis") -> str | None:
    """Return the id of the running server; None if this user has no right to INFO."""
    with suppress(redis.exceptions.NoPermissionError):
        found: dict[str, Any] = await client.info("server")
        return found.get("run_id")
    return None


def _abort(connection: Any) -> None:
    """End a connection now: the farewell of TLS takes turns of the loop, which may not come."""
    writer = getattr(connection, "_writer", None)
    if writer is not None:
        writer.transport.abort()
