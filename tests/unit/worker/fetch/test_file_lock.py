"""Locks between processes: exclusive locks, files in use, and names that change meanwhile."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from zlora_worker.fetch.file_lock import hold, is_at, share, try_lock, unused, wait_for_lock


@contextmanager
def holding(path: Path) -> Iterator[int | None]:
    descriptor = hold(path)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def test_a_lock_is_exclusive_and_its_file_is_deleted_afterwards(tmp_path: Path) -> None:
    """Exclusive for each open file, so that threads are kept apart too."""
    lock = tmp_path / "lock"
    with try_lock(lock) as first, try_lock(lock) as second:
        assert first is not None
        assert second is None
        with try_lock(lock) as third:
            assert third is None
    assert not lock.exists()
    with try_lock(lock) as again:
        assert again is not None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_releases_the_lock(tmp_path: Path, error: type[BaseException]) -> None:
    for lock in (try_lock, wait_for_lock):
        with pytest.raises(error), lock(tmp_path / "lock"):
            raise error
        with try_lock(tmp_path / "lock") as descriptor:
            assert descriptor is not None


def test_a_lock_whose_name_another_file_has_taken_is_not_deleted(tmp_path: Path) -> None:
    """Another process locked a new file in a cleared folder: a third must not enter."""
    lock = tmp_path / "lock"
    first = try_lock(lock)
    assert first.__enter__() is not None
    lock.unlink()
    with try_lock(lock) as second:
        assert second is not None
        first.__exit__(None, None, None)

        with try_lock(lock) as third:
            assert third is None


def test_a_file_that_lost_its_name_before_it_was_locked_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between open and flock its owner has left, and another process has locked a new file."""
    lock, opened = tmp_path / "lock", os.open

    def late(*arguments: object) -> int:
        monkeypatch.undo()
        descriptor = opened(*arguments)  # type: ignore[arg-type]
        lock.unlink()
        assert other.__enter__() is not None
        return descriptor

    other = try_lock(lock)
    monkeypatch.setattr(os, "open", late)
    with try_lock(lock) as descriptor:
        assert descriptor is None
    assert lock.exists()
    other.__exit__(None, None, None)


def test_blocks_that_wait_for_a_lock_do_not_overlap(tmp_path: Path) -> None:
    """A sum that eight threads read and write inside loses nothing."""
    total = tmp_path / "total"
    total.write_text("0")

    def add(_: int) -> None:
        with wait_for_lock(tmp_path / "lock"):
            found = int(total.read_text())
            total.write_text("")
            total.write_text(str(found + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(100)))

    assert total.read_text() == "100"


def test_a_held_file_is_in_use_until_its_last_holder_leaves(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with holding(path) as first:
        with holding(path) as second:
            assert None not in (first, second)
        with unused(path) as is_unused:
            assert not is_unused
    with unused(path) as is_unused:
        assert is_unused


def test_a_shared_lock_admits_holders_and_keeps_the_file_in_use(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with try_lock(path) as descriptor:
        assert descriptor is not None
        share(descriptor)
        with holding(path) as holder, try_lock(path) as another, unused(path) as is_unused:
            assert holder is not None
            assert another is None
            assert not is_unused


def test_a_missing_file_is_neither_held_nor_unused(tmp_path: Path) -> None:
    with holding(tmp_path / "file") as held, unused(tmp_path / "file") as is_unused:
        assert held is None
        assert not is_unused


@pytest.mark.parametrize("is_deleted", [False, True])
def test_hold_waits_for_a_process_that_may_delete_the_file(
    tmp_path: Path, is_deleted: bool
) -> None:
    path = tmp_path / "file"
    path.touch()
    with ThreadPoolExecutor(1) as pool:
        with unused(path) as is_unused:
            found = pool.submit(hold, path)
            if is_deleted:
                path.unlink()
        descriptor = found.result(30)
    assert is_unused
    assert (descriptor is None) == is_deleted
    if descriptor is not None:
        os.close(descriptor)


@pytest.mark.parametrize("is_replaced", [True, False])
def test_is_at_notices_that_a_name_belongs_to_another_file(
    tmp_path: Path, is_replaced: bool
) -> None:
    path = tmp_path / "file"
    path.write_text("first")
    with holding(path) as descriptor:
        assert descriptor is not None
        assert is_at(descriptor, path)
        path.unlink()
        if is_replaced:
            path.write_text("second")

        assert not is_at(descriptor, path)


@pytest.mark.parametrize("look", [hold, unused])
def test_a_file_that_was_replaced_before_it_was_locked_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Path], object]
) -> None:
    """To delete the new file would take it from the process that uses it."""
    path, opened = tmp_path / "file", os.open
    path.write_text("first")

    def late(*arguments: object) -> int:
        monkeypatch.undo()
        descriptor = opened(*arguments)  # type: ignore[arg-type]
        path.unlink()
        path.write_text("second")
        return descriptor

    monkeypatch.setattr(os, "open", late)
    if look is unused:
        with unused(path) as is_unused:
            assert not is_unused
    else:
        assert hold(path) is None
