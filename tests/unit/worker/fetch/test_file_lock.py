"""Locks between processes: who is alone inside, who uses a file, and names that come and go meanwhile."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from zlora_worker.fetch.file_lock import alone, in_turn, in_use, is_at, unused


@contextmanager
def using(path: Path) -> Iterator[int | None]:
    descriptor = in_use(path)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def test_one_is_alone_inside_and_the_lock_is_gone_afterwards(tmp_path: Path) -> None:
    """Not one process: one opening, so that threads are kept apart too."""
    lock = tmp_path / "lock"
    with alone(lock) as first, alone(lock) as second:
        assert (first, second) == (True, False)
        with alone(lock) as third:
            assert not third
    assert not lock.exists()
    with alone(lock) as again:
        assert again


def test_of_several_locks_all_are_taken_or_none(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    with alone(two):
        with alone(one, two) as mine:
            assert not mine
        with alone(one) as mine:
            assert mine
    with alone(one, two) as mine, alone(one) as first, alone(two) as second:
        assert (mine, first, second) == (True, False, False)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_lock_ends_with_an_error_inside(tmp_path: Path, error: type[BaseException]) -> None:
    for lock in (alone, in_turn):
        with pytest.raises(error), lock(tmp_path / "lock"):
            raise error
        assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_name_is_another_s_is_not_unlinked(tmp_path: Path) -> None:
    """Somebody cleared the folder, and the next came in: a third must not."""
    lock = tmp_path / "lock"
    first = alone(lock)
    assert first.__enter__()
    lock.unlink()
    with alone(lock) as second:
        assert second
        first.__exit__(None, None, None)

        with alone(lock) as third:
            assert not third


def test_a_lock_that_was_unlinked_before_it_was_taken_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the opening and the taking its holder has left, and another is inside with a new one."""
    lock, opened = tmp_path / "lock", os.open

    def late(*arguments: object) -> int:
        monkeypatch.undo()
        descriptor = opened(*arguments)  # type: ignore[arg-type]
        lock.unlink()
        assert other.__enter__()
        return descriptor

    other = alone(lock)
    monkeypatch.setattr(os, "open", late)
    with alone(lock) as mine:
        assert not mine
    assert lock.exists()
    other.__exit__(None, None, None)


def test_turns_do_not_overlap(tmp_path: Path) -> None:
    """A sum that is read and written inside loses none of what eight threads add."""
    total = tmp_path / "total"
    total.write_text("0")

    def add(_: int) -> None:
        with in_turn(tmp_path / "lock"):
            found = int(total.read_text())
            total.write_text("")
            total.write_text(str(found + 1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(400)))

    assert total.read_text() == "400"
    assert not (tmp_path / "lock").exists()


def test_a_file_in_use_is_not_unused(tmp_path: Path) -> None:
    """By one or by several; and it is again when the last has left."""
    path = tmp_path / "file"
    path.touch()
    with using(path) as first:
        with using(path) as second:
            assert None not in (first, second)
        with unused(path) as free:
            assert not free
    with unused(path) as free:
        assert free


def test_a_file_that_is_not_there_is_neither(tmp_path: Path) -> None:
    with using(tmp_path / "file") as used, unused(tmp_path / "file") as free:
        assert (used, free) == (None, False)


def test_whoever_comes_while_a_file_goes_has_none(tmp_path: Path) -> None:
    """And whoever comes while somebody only looks has it."""
    path = tmp_path / "file"
    for goes in (False, True):
        path.touch()
        with ThreadPoolExecutor(1) as pool:
            with unused(path) as free:
                found = pool.submit(in_use, path)
                if goes:
                    path.unlink()
            descriptor = found.result(30)
        assert free
        assert (descriptor is None) == goes
        if descriptor is not None:
            os.close(descriptor)


@pytest.mark.parametrize("again", [True, False])
def test_a_name_that_is_another_file_s_is_seen(tmp_path: Path, again: bool) -> None:
    path = tmp_path / "file"
    path.write_text("first")
    with using(path) as descriptor:
        assert descriptor is not None
        assert is_at(descriptor, path)
        path.unlink()
        if again:
            path.write_text("second")

        assert not is_at(descriptor, path)


@pytest.mark.parametrize("look", [in_use, unused])
def test_a_file_that_lost_its_name_before_it_was_taken_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, look: Callable[[Path], object]
) -> None:
    """Another has it by then: to delete that one would take it from who uses it."""
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
        with unused(path) as free:
            assert not free
    else:
        assert in_use(path) is None
