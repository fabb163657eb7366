"""The sidecar as the parent sees it, with a program in its place that hangs or does not start."""

import errno
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from support.processes import wait_until
from zlora_worker.celery_hooks import sidecar_process
from zlora_worker.celery_hooks.held_messages import HeldMessages
from zlora_worker.celery_hooks.sidecar_process import SidecarProcess


class Parent:
    """Starts `program` as its sidecar, and looks at it as often as a test waits."""

    def __init__(self, program: Path) -> None:
        self.program, self.faults = program, list[str]()
        held = HeldMessages(str(program.parent), program.parent, max_bytes=10**6)
        held.open()
        self.sidecar = SidecarProcess(None, held, timeout=1, count=self.faults.append)

    def looks_until_counted(self, *faults: str) -> None:
        def look() -> bool:
            self.sidecar.look()
            return self.faults == list(faults)

        wait_until(look, f"the faults are {faults}")


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parent]:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(sidecar_process, "_RESTART_AFTER", 0.1)
    made = Parent(program)
    made.sidecar.start()
    yield made
    made.sidecar.stop()


def test_a_sidecar_without_a_sign_of_life_is_replaced_each_time(parent: Parent) -> None:
    parent.looks_until_counted("hung")
    parent.looks_until_counted("hung", "hung")


def test_a_sidecar_that_cannot_be_started_is_counted_and_started_later(
    parent: Parent, caplog: pytest.LogCaptureFixture
) -> None:
    """The look itself raises nothing: the parent has more to do."""
    moved = parent.program.rename(parent.program.with_name("moved"))
    parent.looks_until_counted("not_started")
    assert "cannot be started" in caplog.text

    moved.rename(parent.program)

    def look() -> bool:
        parent.sidecar.look()
        return parent.faults[-1] == "hung"

    wait_until(look, "a sidecar was started, and hangs")


def test_a_parent_without_free_handles_starts_a_sidecar_later(
    parent: Parent, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as handles:
        handles.setattr(os, "pipe", no_handles)
        parent.looks_until_counted("not_started")

    # the one that was killed is counted, too, before the new one hangs
    parent.looks_until_counted("not_started", "ended", "hung")


def test_no_sidecar_is_started_after_the_stop(parent: Parent) -> None:
    parent.sidecar.stop()
    time.sleep(0.2)
    parent.sidecar.look()

    assert parent.faults == []


def no_handles() -> NoReturn:
    raise OSError(errno.EMFILE, "Too many open files")
