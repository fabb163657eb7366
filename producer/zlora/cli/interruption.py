"""Ctrl-C and the signals that end a program: which has come, and whether somebody can be asked about it."""

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import click

_ENDS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # the last where a terminal is closed
_came: Final[list[int]] = []  # an exception that strikes in a destructor is lost: what came stays here


def install() -> None:
    """From now on whatever runs is interrupted by `KeyboardInterrupt`, and cleans up behind itself."""
    _came.clear()
    _raise_at_ends()


def _raise_at_ends() -> None:
    for end in _heard():
        signal.signal(end, _end)


def _heard() -> list[signal.Signals]:
    """Not what is ignored, as nohup has it."""
    return [end for end in _ENDS if signal.getsignal(end) is not signal.SIG_IGN]


def _end(number: int, _frame: object) -> None:
    _came.append(number)
    raise KeyboardInterrupt


@contextmanager
def as_event() -> Iterator[asyncio.Event]:
    """Within an event loop: the signals set an event, and interrupt nothing."""
    loop, event = asyncio.get_running_loop(), asyncio.Event()

    def note(number: int) -> None:
        _came.append(number)
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
    return bool(_came)


def check() -> None:
    """Raise the `KeyboardInterrupt` that was lost."""
    if _came:
        raise KeyboardInterrupt


def exit_status() -> int:
    """As a shell has it of a program that a signal ends."""
    return 128 + (_came[0] if _came else signal.SIGINT)


def cancels(question: str) -> bool:
    """Whether jobs are to be cancelled: asked once, and only who pressed Ctrl-C at a terminal; else they are.

    Another Ctrl-C is a no.
    """
    if _came and _came[-1] != signal.SIGINT:
        return True
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    try:
        return click.confirm(question, default=True, err=True)
    except (click.Abort, KeyboardInterrupt):
        click.echo(err=True)
        return False
