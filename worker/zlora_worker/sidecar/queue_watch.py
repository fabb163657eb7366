"""Look at the keys of a queue when they have changed, rather than again and again."""

import logging
import time
from collections.abc import Callable, Sequence
from threading import Thread
from typing import TYPE_CHECKING, Final

from redis import RedisError
from zlora.broker.key_watch import KeyWatch

from zlora_worker.sidecar.heartbeat import Heartbeat

if TYPE_CHECKING:
    import redis

_EVERY: Final = 0.5  # seconds between two looks at what changes all the time
_BURST: Final = 10  # looks in a row without such a pause
_MAX_WAIT: Final = 5.0  # seconds without a change until a ping: the connection may be dead
_ERROR_PAUSE: Final = 2.0  # seconds until the next look if Redis does not answer

Look = Callable[["redis.Redis", Sequence[str]], object]

logger = logging.getLogger(__name__)


class _Watched:
    """Keys with their look, and those of them that it has not read since they changed."""

    def __init__(self, keys: Sequence[str], look: Look) -> None:
        self.keys, self.look = keys, look
        self.changed: list[str] = []
        self.next = 0.0  # when the next look is due, on the monotonic clock

    def add(self, changed: set[str] | None) -> None:
        """Remember which keys have changed; None if any may have."""
        self.changed = [
            key for key in self.keys if changed is None or key in changed or key in self.changed
        ]

    def pace(self, now: float) -> None:
        """Set the time of the next look: at once after a silence, else one in `_EVERY` seconds."""
        self.next = max(self.next, now - (_BURST - 1) * _EVERY) + _EVERY


class QueueWatch:
    """Calls each look once, and then whenever keys have changed that the look has read."""

    def __init__(self, broker_url: str) -> None:
        self._watch = KeyWatch(broker_url, every=_EVERY)
        self._watched: list[_Watched] = []
        self._is_outdated = False

    def add(self, keys: Sequence[str], look: Look) -> None:
        """Call `look` with a client and those of the keys that it must read again by this client.

        Pipelines do not count, since they have connections of their own. The look may raise
        `redis.RedisError`. To be called before the start.
        """
        self._watched.append(_Watched(keys, look))

    def start(self, heartbeat: Heartbeat, *, seconds: float) -> None:
        """Watch in a thread until the process ends; it hangs if a look takes so many seconds."""
        beat = heartbeat.part("the watch of the queue", seconds=seconds)
        Thread(target=self._work, args=(beat,), name="queue-watch", daemon=True).start()

    def step(self, timeout: float) -> None:
        """Wait up to `timeout` seconds for a change, and look; raise `redis.RedisError`."""
        if self._is_outdated:
            self._is_outdated = False
            self._watch.forget()
        now = time.monotonic()
        pauses = (watched.next - now for watched in self._watched if watched.changed)
        changed = self._watch.wait(max(0.0, min((timeout, *pauses))))
        now = time.monotonic()
        for watched in self._watched:
            watched.add(changed)
            if watched.changed and now >= watched.next:
                watched.pace(now)
                self._look(watched)

    def _look(self, watched: _Watched) -> None:
        try:
            watched.look(self._watch.redis, watched.changed)
        except Exception:  # raised again: what was not read is not announced again
            self._watch.forget()
            raise
        watched.changed = []

    def reconnect(self) -> None:
        """Connect anew soon: after a fail-over the connection may be to the old primary."""
        self._is_outdated = True  # the thread may be using the connection now

    def _work(self, beat: Callable[[], None]) -> None:
        while True:
            beat()
            try:
                self.step(_MAX_WAIT)
            except RedisError as error:
                logger.debug("no look at the queue for %.0f s: %s", _ERROR_PAUSE, error)
                time.sleep(_ERROR_PAUSE)
            except Exception as error:  # noqa: BLE001 - thread boundary: no webhooks without it
                # The error's text may contain an address with its secrets.
                logger.error("no look at the queue: %s", type(error).__name__)  # noqa: TRY400
                time.sleep(_ERROR_PAUSE)
