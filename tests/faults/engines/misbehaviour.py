"""What a model, its driver or its machine can do in the middle of a job."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

from faults.engines import journal
from zlora.errors import GenerationFailed, LoraUnreachable, OutOfMemory


class Corruptible(Protocol):
    """A pipeline whose base weights can be left changed."""

    corrupted: bool


Orders = Mapping[str, Any]


def misbehave(pipeline: Corruptible, orders: Orders) -> None:
    """Do the word of `orders["do"]`; of a list of words, each once and then nothing."""
    word = orders["do"]
    if not isinstance(word, str):
        word = _next_of(word, orders["label"])
    if word:
        journal.write("fault", label=orders["label"], do=word)
        MISBEHAVIOURS[word](pipeline, orders)


def _next_of(words: list[str], label: str) -> str | None:
    """Return the first unused word; files count, because the process may be killed."""
    for count, word in enumerate(words):
        try:
            Path(os.environ["FAKE_MARKS"], f"{label}-{count}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return word
    return None


def _nothing(_pipeline: Corruptible, _orders: Orders) -> None:
    """Let this image be drawn."""


def _kill_child(_pipeline: Corruptible, _orders: Orders) -> None:
    """Kill the child process, as the kernel does if memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def _exit(_pipeline: Corruptible, _orders: Orders) -> NoReturn:
    """End the child process as a library may do."""
    raise SystemExit(1)


class _Panic(BaseException):
    """Error of a library written in Rust, such as tokenizers, that has a bug."""


def _panic(_pipeline: Corruptible, _orders: Orders) -> NoReturn:
    """Raise what no `except Exception` catches."""
    raise _Panic("called `Option::unwrap()` on a `None` value")


def _end_child(_pipeline: Corruptible, _orders: Orders) -> None:
    """End the child process by SIGTERM, as earlyoom and systemd-oomd do first."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)


def _kill_worker(_pipeline: Corruptible, _orders: Orders) -> None:
    """Kill the parent process, then the child process."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(_pipeline: Corruptible, _orders: Orders) -> NoReturn:
    """Never return and ignore every exception, as a GPU kernel that hangs."""
    while True:
        try:
            time.sleep(60)
        except BaseException:  # noqa: BLE001, S112 - this is the fault
            continue


def _sleep(_pipeline: Corruptible, orders: Orders) -> None:
    """Take one slow step, which a signal can end."""
    time.sleep(orders["seconds"])


def _raise(_pipeline: Corruptible, orders: Orders) -> NoReturn:
    """Raise an error that the worker does not know."""
    raise RuntimeError(orders.get("message", "a kernel failed"))


def _oom(_pipeline: Corruptible, _orders: Orders) -> NoReturn:
    """Run out of memory."""
    raise OutOfMemory("the image needs more memory than the fake model has")


def _nan(_pipeline: Corruptible, _orders: Orders) -> NoReturn:
    """Fail as if the image had NaN values."""
    raise GenerationFailed("the image has NaN or Inf values")


def _unreachable(_pipeline: Corruptible, _orders: Orders) -> None:
    """Fail with an error that is tried again."""
    raise LoraUnreachable("a server that a test takes away")


def _dirty(pipeline: Corruptible, _orders: Orders) -> None:
    """Leave a weight of the base model changed."""
    pipeline.corrupted = True


MISBEHAVIOURS: Final[dict[str, Callable[[Corruptible, Orders], None]]] = {
    "nothing": _nothing,
    "kill-child": _kill_child,
    "exit": _exit,
    "panic": _panic,
    "end-child": _end_child,
    "kill-worker": _kill_worker,
    "hang": _hang,
    "sleep": _sleep,
    "raise": _raise,
    "oom": _oom,
    "nan": _nan,
    "unreachable": _unreachable,
    "dirty": _dirty,
}
