"""Upkeep of the cache: what is over goes, what lives stays, files are checked, and files are let go."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.servers import by_path, caching, digest, got, kept, lora_bytes, named, reply, serving
from zlora.schema import Asset
from zlora_worker.fetch.cache import Cache
from zlora_worker.fetch.cache_index import Entry
from zlora_worker.fetch.eviction import Pruned
from zlora_worker.fetch.file_lock import alone
from zlora_worker.fetch.transfer import Fetched

ONE, TWO, THREE = (lora_bytes(fill) for fill in (1, 2, 3))
SIZE = len(ONE)


def test_upkeep_leaves_what_lives(tmp_path: Path) -> None:
    """Files, what is known of them, and the lock and draft of a living process; the rest goes."""
    with serving(by_path({"/a": ONE, "/b": TWO})) as host, caching(tmp_path, host) as cache:
        one, two = (got(cache, Asset(url=f"{host.url}/{name}")) for name in "ab")
        two.path.unlink()
        living, dead = (Asset(url=f"{host.url}/{name}") for name in ("living", "dead"))
        (lock,) = cache._turn(living).locks
        for asset in (living, dead):
            cache._turn(asset).draft.write_bytes(b"half a file")
        (tmp_path / "loras/locks/left").touch()
        with alone(lock):
            cache.tidy()

            assert list((tmp_path / "loras/drafts").iterdir()) == [cache._turn(living).draft]
            assert list((tmp_path / "loras/locks").iterdir()) == [lock]
        cache.tidy()

        assert kept(tmp_path) == named(ONE)
        assert [entry.sha256 for _, entry in cache.index.entries()] == [one.sha256]
        assert [path.stem for path in (tmp_path / "loras/sound").iterdir()] == [one.sha256]


def test_upkeep_fills_in_what_somebody_cleared(tmp_path: Path) -> None:
    with caching(tmp_path) as cache:
        shutil.rmtree(tmp_path / "loras")
        cache.tidy()

        assert kept(tmp_path) == {}


def test_what_is_known_of_a_file_goes_only_after_the_file(tmp_path: Path) -> None:
    """Not what another process remembers of one that came meanwhile: here in the midst of the upkeep."""
    with serving(reply(status=500)) as host, caching(tmp_path, host) as cache:
        asset, entries = Asset(url=f"{host.url}/a"), cache.index.entries

        def late() -> Iterator[tuple[Path, Entry]]:
            cache.file(digest(ONE)).write_bytes(ONE)
            cache.index.remember(
                asset.address, Fetched(sha256=digest(ONE), size=SIZE), asked=time.time()
            )
            yield from entries()

        cache.index.entries = late  # type: ignore[method-assign]
        cache.tidy()

        assert got(cache, asset, since=0).tier == "disk"
        assert host.requests == []


def test_a_check_of_all_files_drops_the_damaged_and_is_no_use(tmp_path: Path) -> None:
    with (
        serving(by_path({"/a": ONE, "/b": TWO, "/c": THREE})) as host,
        caching(tmp_path, host) as cache,
    ):
        files = [got(cache, Asset(url=f"{host.url}/{name}")) for name in "abc"]
        overwrite(files[1].path, bytes(SIZE))
        before = [os.stat(file.path).st_atime_ns for file in files]

        found = dict(cache.space.verify())

        assert found == {digest(ONE): "sound", digest(TWO): "dropped", digest(THREE): "sound"}
        assert [os.stat(files[index].path).st_atime_ns for index in (0, 2)] == [
            before[0],
            before[2],
        ]
        assert kept(tmp_path) == named(ONE, THREE)


def overwrite(path: Path, data: bytes) -> None:
    """In place, and with the time of change that it had."""
    found = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


# --- letting go


@contextmanager
def three_files(folder: Path) -> Iterator[Cache]:
    """A cache with files that were used 20, 10 and 5 seconds ago."""
    with (
        serving(by_path({"/0": ONE, "/1": TWO, "/2": THREE})) as host,
        caching(folder, host) as cache,
    ):
        for index, seconds in enumerate((20, 10, 5)):
            age(got(cache, Asset(url=f"{host.url}/{index}")).path, seconds)
        yield cache


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds, path.stat().st_mtime))


def pinned(data: bytes) -> Asset:
    return Asset(url="https://nowhere.invalid/a", sha256=digest(data))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ({"max_bytes": 3 * SIZE}, [ONE, TWO, THREE]),
        ({"max_bytes": 2 * SIZE}, [TWO, THREE]),
        ({"max_bytes": 2 * SIZE - 1}, [THREE]),
        ({"older_than": 15}, [TWO, THREE]),
        ({"older_than": 99}, [ONE, TWO, THREE]),
        ({}, []),
    ],
)
def test_files_go_by_their_last_use(
    tmp_path: Path, options: dict[str, int], left: list[bytes]
) -> None:
    with three_files(tmp_path) as cache:
        pruned = cache.space.prune(**options)

        assert kept(tmp_path) == named(*left)
        gone = 3 - len(left)
        assert pruned == Pruned(files=gone, size=gone * SIZE, in_use=0)


def test_files_in_use_stay_and_are_counted(tmp_path: Path) -> None:
    with three_files(tmp_path) as cache, cache.files([pinned(ONE)]):
        age(cache.file(digest(ONE)), 20)
        assert cache.space.prune(max_bytes=2 * SIZE) == Pruned(files=1, size=SIZE, in_use=1)
        assert kept(tmp_path) == named(ONE, THREE)

        assert cache.space.prune() == Pruned(files=1, size=SIZE, in_use=1)
        assert kept(tmp_path) == named(ONE)


def test_a_draft_of_a_dead_process_goes_with_them(tmp_path: Path) -> None:
    with three_files(tmp_path) as cache:
        cache._turn(pinned(ONE)).draft.write_bytes(ONE)
        cache.space.prune(max_bytes=3 * SIZE)

        assert kept(tmp_path) == named(ONE, TWO, THREE)
