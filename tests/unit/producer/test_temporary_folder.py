"""Temporary folders: each process has its own, and those of killed processes are removed."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from zlora import temporary_folder as module
from zlora.temporary_folder import temporary_folder

HOUR: Final = 3600
OWNER: Final = """
import sys, time
from zlora.temporary_folder import temporary_folder
with temporary_folder("zlora-", parent=sys.argv[1]) as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


@contextmanager
def owner(place: Path) -> Iterator[Path]:
    """Run a process with a temporary folder, which gets an hour older; kill it after the block."""
    command = [sys.executable, "-c", OWNER, str(place)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        folder = Path(process.stdout.readline().strip())
        age(folder)
        try:
            yield folder
        finally:
            process.kill()
            process.wait()


def age(folder: Path) -> None:
    then = time.time() - HOUR
    os.utime(folder / ".lock", (then, then))


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_live_one_stays(
    tmp_path: Path,
) -> None:
    with owner(tmp_path) as killed:
        (killed / "file").touch()
    with owner(tmp_path) as alive, temporary_folder("zlora-", parent=str(tmp_path)) as own:
        assert not killed.exists()
        assert sorted(tmp_path.iterdir()) == sorted([alive, own])
    assert not own.exists()


def test_other_folders_stay(tmp_path: Path) -> None:
    """Those without a lock are of earlier versions; a young one may not have its lock yet."""
    foreign, older, young, link = (
        tmp_path / name for name in ("x", "zlora-a", "zlora-b", "zlora-c")
    )
    for folder in (foreign, older, young):
        folder.mkdir()
    for folder in (foreign, young):
        (folder / ".lock").touch()
    age(foreign)
    link.symlink_to(foreign)

    with temporary_folder("zlora-", parent=str(tmp_path)):
        assert {foreign, older, young, link} <= set(tmp_path.iterdir())


def test_a_start_removes_a_bounded_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_REMOVED", 2)
    for number in range(3):
        folder = tmp_path / f"zlora-{number}"
        folder.mkdir()
        (folder / ".lock").touch()
        age(folder)

    with temporary_folder("zlora-", parent=str(tmp_path)) as own:
        assert len(set(tmp_path.iterdir()) - {own}) == 1
