"""Notice changes of keys in Redis without asking for them.

Redis remembers which keys a connection has read, and announces the first change of each to that
connection, whoever makes it ("tracking" in
https://valkey.io/topics/client-side-caching/, in its default mode). What changes often costs no
more than what changes once per read.
"""

import time
from contextlib import suppress
from typing import Any, Final

import redis

from zlora.broker.celery_app import IMPATIENCE
from zlora.broker.job_store import connect

_RESP: Final = 3  # the version of the protocol with announcements between answers


class KeyWatch:
    """A connection to Redis on which reads are watched. It connects at the first use.

    Without announcements (another server, a user without the right to `CLIENT TRACKING`) all keys
    count as changed once in `every` seconds, and the caller reads them again.
    """

    def __init__(self, url: str, *, every: float, seconds: float = IMPATIENCE) -> None:
        """Take the URL of Redis, and the seconds to wait for its answers."""
        self._connector = connect(url, seconds=seconds)
        self._connector.connection_pool.connection_kwargs.setdefault("protocol", _RESP)
        self._every, self._next = every, 0.0
        self._client: Any = None
        self._is_told = False
        self._changed: set[str] | None = None  # None if any key may have changed

    @property
    def redis(self) -> Any:  # the stubs of redis-py mix synchronous and asynchronous results
        """The client of this connection; what it reads is watched. Raises `redis.RedisError`.

        Its pipelines have other connections.
        """
        if self._client is None:
            client: Any = self._connector.client()  # type: ignore[no-untyped-call]  # redis-py's
            connection = client.connection
            connection.register_connect_callback(self._begin)
            self._begin(connection)
            self._client = client
        return self._client

    def wait(self, timeout: float = 0.0) -> set[str] | None:
        """Return the keys that have changed since they were read, or None if any may have.

        Waits for up to `timeout` seconds for the first one. Raises `redis.RedisError` at the first
        use if Redis cannot be reached.
        """
        client = self.redis
        with client.single_connection_lock:
            if not self._is_told:
                time.sleep(max(0.0, min(timeout, self._next - time.monotonic())))
                if time.monotonic() < self._next:
                    return set()
                self._next = time.monotonic() + self._every
                return None
            self._receive(client.connection, timeout)
            changed, self._changed = self._changed, set()
            return changed

    def forget(self) -> None:
        """Connect anew at the next use: any key may have changed."""
        if self._client is not None:
            self._client.connection.disconnect()

    def _receive(self, connection: Any, timeout: float) -> None:
        """Take in what Redis announces; wait for up to `timeout` seconds for the first of it."""
        try:
            if timeout:
                connection.check_health()  # takes in what has arrived
            if self._changed is None or self._changed:
                timeout = 0.0
            while connection.is_connected and connection.can_read(timeout):
                connection.read_response(push_request=True)
                timeout = 0.0
        except (redis.ConnectionError, redis.TimeoutError):
            connection.disconnect()
        if not connection.is_connected:  # the next read connects anew
            self._changed = None

    def _begin(self, connection: Any) -> None:
        """Ask for announcements on a new connection."""
        self._changed, self._is_told = None, False
        if int(connection.protocol) < _RESP:
            return
        connection._parser.set_invalidation_push_handler(self._note)  # noqa: SLF001 - no public way
        connection.send_command("CLIENT", "TRACKING", "ON", check_health=False)
        with suppress(redis.ResponseError):
            connection.read_response()
            self._is_told = True

    def _note(self, announcement: list[Any]) -> None:
        _, keys = announcement
        if keys is None:  # the database is empty now
            self._changed = None
        elif self._changed is not None:
            self._changed.update(keys)
