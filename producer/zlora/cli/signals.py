"""Ctrl-C and the signals that end a program: which has come, and whether somebody can be asked about it."""

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from functools import partial
from typing import Final

import click

_ENDS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last where a terminal is closed


class Answer(Enum):
    """To the question whether jobs are to be cancelled."""

    YES = auto()
    NO = auto()
    NOBODY = auto()  # can be asked


class _Stage(Enum):
    """How far the end is."""

    RUNNING = auto()
    ASKING = auto()
    ANSWERED = auto()


class _Ear:
    """What came: an exception that strikes in a destructor is lost. What comes while jobs are cancelled is not heard.

    Of several signals that come at once, as where a terminal is closed, the first interrupts. Another Ctrl-C does
    until there is an answer; any signal is one.
    """

    def __init__(self) -> None:
        self.came: list[int] = []
        self.stage = _Stage.RUNNING

    def clear(self) -> None:
        """Begin anew: one process may run several commands, as tests do."""
        self.came.clear()
        self.stage = _Stage.RUNNING

    def hears(self, number: int) -> bool:
        """Note a signal; whether it interrupts what runs."""
        match self.stage:
            case _Stage.RUNNING:
                heard = not self.came or number == signal.SIGINT
            case _Stage.ASKING:
                heard = True
            case _Stage.ANSWERED:
                heard = False
        if heard:
            self.came.append(number)
        return heard


_ear: Final = _Ear()


def install() -> None:
    """From now on whatever runs is interrupted by `KeyboardInterrupt`, and cleans up behind itself."""
    _ear.clear()
    _raise_at_ends()


def _raise_at_ends() -> None:
    for end in _heard():
        signal.signal(end, _end)


def _heard() -> list[signal.Signals]:
    """Not what is ignored, as nohup has it."""
    return [end for end in _ENDS if signal.getsignal(end) is not signal.SIG_IGN]


def _end(number: int, _frame: object) -> None:
    if _ear.hears(number):
        raise KeyboardInterrupt


@contextmanager
def as_event() -> Iterator[asyncio.Event]:
    """Within an event loop: the signals set an event, and interrupt nothing but the question."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()

    def note(number: int) -> None:
        _ear.hears(number)
        event.set()

    heard = _heard()
    for end in heard:
        loop.add_signal_handler(end, partial(note, end))
    try:
        yield event
    finally:
        for end in heard:
            loop.remove_signal_handler(end)
        _raise_at_ends()


def has_come() -> bool:
    """Whether a signal asked for the end."""
    return bool(_ear.came)


def check() -> None:
    """Raise the `KeyboardInterrupt` that was lost."""
    if _ear.came:
        raise KeyboardInterrupt


def exit_status() -> int:
    """As a shell has it of a program that a signal ends; Ctrl-C counts where no other has come."""
    others = [number for number in _ear.came if number != signal.SIGINT]
    return 128 + next(iter(others), signal.SIGINT)


def ask(question: str) -> Answer:
    """Ask, once, and only who pressed Ctrl-C at a terminal. From the answer on no signal is heard any more.

    Another Ctrl-C is a no, and so is the end of the input. Another signal ends the question.
    """
    by_ctrl_c = not _ear.came or _ear.came[-1] == signal.SIGINT
    try:
        return _asked(question) if by_ctrl_c and _is_terminal() else Answer.NOBODY
    finally:
        settle()


def settle() -> None:
    """What is to become of jobs is known, asked for or not: no signal is heard any more."""
    _ear.stage = _Stage.ANSWERED


def _is_terminal() -> bool:
    """A stream that was closed before the program's start is None."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stderr))


def _asked(question: str) -> Answer:
    with _interrupting():
        try:
            return Answer.YES if click.confirm(question, default=True, err=True) else Answer.NO
        except (click.Abort, KeyboardInterrupt, OSError):  # the last where the terminal has gone
            with suppress(OSError):
                click.echo(err=True)
            return Answer.NO if _ear.came[-1:] in ([], [signal.SIGINT]) else Answer.NOBODY


@contextmanager
def _interrupting() -> Iterator[None]:
    """Signals interrupt, also where an event loop has others to take them."""
    before = {end: signal.signal(end, _end) for end in _heard()}
    _ear.stage = _Stage.ASKING
    try:
        yield
    finally:
        settle()
        for end, handler in before.items():
            signal.signal(end, handler)
