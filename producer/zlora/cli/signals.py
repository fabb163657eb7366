"""Ctrl-C and the signals that end a program: which one came, and the question what to do then."""

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from functools import partial
from typing import Final

import click

# A terminal sends SIGHUP when it is closed.
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Answer(Enum):
    """Answer to the question whether to cancel jobs."""

    YES = auto()
    NO = auto()
    NOT_ASKED = auto()  # there is no terminal, or the signal did not come from one


class _Stage(Enum):
    """How far the end of the program is."""

    RUNNING = auto()
    ASKING = auto()
    ANSWERED = auto()


class _Received:
    """Signals of this process so far, and which of them still count.

    The exception of a signal handler is lost if it is raised in a destructor, so signals are also
    recorded here. If several come at once, as when a terminal is closed, the first interrupts.
    Another Ctrl-C interrupts until there is an answer, and any signal interrupts the question.
    After the answer, while jobs are cancelled, signals are ignored.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.stage = _Stage.RUNNING

    def clear(self) -> None:
        """Forget everything: one process may run several commands, as tests do."""
        self.numbers.clear()
        self.stage = _Stage.RUNNING

    def record(self, number: int) -> bool:
        """Record a signal and return whether it interrupts the program."""
        match self.stage:
            case _Stage.RUNNING:
                interrupts = not self.numbers or number == signal.SIGINT
            case _Stage.ASKING:
                interrupts = True
            case _Stage.ANSWERED:
                interrupts = False
        if interrupts:
            self.numbers.append(number)
        return interrupts


_received: Final = _Received()


def install() -> None:
    """Raise `KeyboardInterrupt` at each signal that ends a program, so that commands clean up."""
    _received.clear()
    _set_handlers()


def _set_handlers() -> None:
    for number in _handled():
        signal.signal(number, _interrupt)


def _handled() -> list[signal.Signals]:
    """Signals to handle: those that are ignored, as under nohup, stay ignored."""
    return [number for number in _ENDING if signal.getsignal(number) is not signal.SIG_IGN]


def _interrupt(number: int, _frame: object) -> None:
    if _received.record(number):
        raise KeyboardInterrupt


@contextmanager
def as_event() -> Iterator[asyncio.Event]:
    """Set an event of the running loop at a signal, instead of raising `KeyboardInterrupt`."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()

    def note(number: int) -> None:
        _received.record(number)
        event.set()

    handled = _handled()
    for number in handled:
        loop.add_signal_handler(number, partial(note, number))
    try:
        yield event
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
        _set_handlers()


def has_come() -> bool:
    """Return whether a signal has come that ends the program."""
    return bool(_received.numbers)


def check() -> None:
    """Raise `KeyboardInterrupt` if a signal has come whose exception may have been lost."""
    if _received.numbers:
        raise KeyboardInterrupt


def exit_status() -> int:
    """Return 128 plus the number of the signal; Ctrl-C counts only if no other signal came."""
    others = [number for number in _received.numbers if number != signal.SIGINT]
    return 128 + next(iter(others), signal.SIGINT)


def ask(question: str) -> Answer:
    """Ask once, if Ctrl-C was pressed at a terminal; ignore all signals after the answer.

    Another Ctrl-C and the end of the input mean no. Another signal ends the question.
    """
    last = _received.numbers[-1:]
    streams = (sys.stdin, sys.stderr)  # a stream that was closed before the start is None
    is_terminal = all(stream is not None and stream.isatty() for stream in streams)
    try:
        if last not in ([], [signal.SIGINT]) or not is_terminal:
            return Answer.NOT_ASKED
        return _confirm(question)
    finally:
        settle()


def settle() -> None:
    """Ignore all signals from now on: it is decided what happens to the jobs."""
    _received.stage = _Stage.ANSWERED


def _confirm(question: str) -> Answer:
    # An event loop may have replaced the handlers: while asking, signals must interrupt.
    before = {number: signal.signal(number, _interrupt) for number in _handled()}
    _received.stage = _Stage.ASKING
    try:
        return Answer.YES if click.confirm(question, default=True, err=True) else Answer.NO
    except (click.Abort, KeyboardInterrupt, OSError):  # OSError: the terminal is gone
        with suppress(OSError):
            click.echo(err=True)
        by_ctrl_c = _received.numbers[-1:] in ([], [signal.SIGINT])
        return Answer.NO if by_ctrl_c else Answer.NOT_ASKED
    finally:
        settle()
        for number, handler in before.items():
            signal.signal(number, handler)
