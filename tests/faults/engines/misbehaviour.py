"""What a model, its driver or its machine may do in the middle of a job."""

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

from faults.engines import journal
from zlora.errors import GenerationFailed, OutOfMemory


class Spoilable(Protocol):
    """An engine whose base can be spoiled."""

    spoiled: bool


Orders = Mapping[str, Any]


def misbehave(engine: Spoilable, told: Orders) -> None:
    """Do what the orders say: one word always, or a list of words in turn, one each time, and then nothing."""
    if word := _turn(told):
        journal.write("fault", label=told["label"], do=word)
        MISBEHAVIOURS[word](engine, told)


def _turn(told: Orders) -> str | None:
    """Whose turn it is: counted by files, which outlive the process."""
    if isinstance(told["do"], str):
        return told["do"]
    for count, word in enumerate(told["do"]):
        try:
            Path(os.environ["FAKE_MARKS"], f"{told['label']}-{count}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return str(word)
    return None


def _nothing(_engine: Spoilable, _told: Orders) -> None:
    """All is well, this time."""


def _kill_child(_engine: Spoilable, _told: Orders) -> None:
    """What the kernel does to a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_worker(_engine: Spoilable, _told: Orders) -> None:
    """Parent first; the child's end follows it."""
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _hang(_engine: Spoilable, _told: Orders) -> NoReturn:
    """A kernel that never returns: no Python exception ends it."""
    while True:
        try:
            time.sleep(60)
        except BaseException:  # noqa: BLE001, S112 - this is the fault
            continue


def _sleep(_engine: Spoilable, told: Orders) -> None:
    """One slow step, which a signal may end."""
    time.sleep(told["seconds"])


def _raise(_engine: Spoilable, told: Orders) -> NoReturn:
    """A fault that nobody foresaw."""
    raise RuntimeError(told.get("message", "a kernel failed"))


def _oom(_engine: Spoilable, _told: Orders) -> NoReturn:
    """No memory for this picture."""
    raise OutOfMemory("the picture needs more memory than the fake has")


def _nan(_engine: Spoilable, _told: Orders) -> NoReturn:
    """No numbers in the picture."""
    raise GenerationFailed("the picture has NaN or Inf values")


def _dirty(engine: Spoilable, _told: Orders) -> None:
    """A weight of the base stays changed."""
    engine.spoiled = True


MISBEHAVIOURS: Final[dict[str, Callable[[Spoilable, Orders], None]]] = {
    "nothing": _nothing,
    "kill-child": _kill_child,
    "kill-worker": _kill_worker,
    "hang": _hang,
    "sleep": _sleep,
    "raise": _raise,
    "oom": _oom,
    "nan": _nan,
    "dirty": _dirty,
}
