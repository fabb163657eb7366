"""Upkeep of the cache: leftovers are deleted, files are verified, and files are pruned."""

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
from zlora_worker.fetch.file_lock import try_lock
from zlora_worker.fetch.transfer import Fetched

ONE, TWO, THREE = (lora_bytes(fill) for fill in (1, 2, 3))
SIZE = len(ONE)


def test_upkeep_deletes_only_what_no_process_uses(tmp_path: Path) -> None:
    """Files, their records, and the draft of a running process stay."""
    with serving(by_path({"/a": ONE, "/b": TWO})) as host, caching(tmp_path, host) as cache:
        one, two = (got(cache, Asset(url=f"{host.url}/{name}")) for name in "ab")
        two.path.unlink()
        running, ended = (Asset(url=f"{host.url}/{name}") for name in ("running", "ended"))
        lock = cache._draft(running)
        for asset in (running, ended):
            cache._draft(asset).write_bytes(b"half a file")
        (tmp_path / "loras/locks/left").touch()
        with try_lock(lock):
            cache.tidy()

            assert list((tmp_path / "loras/drafts").iterdir()) == [cache._draft(running)]
            assert list((tmp_path / "loras/locks").iterdir()) == []
        cache.tidy()

        assert kept(tmp_path) == named(ONE)
        assert [entry.sha256 for _, entry in cache.index.entries()] == [one.sha256]
        assert [path.stem for path in (tmp_path / "loras/verified").iterdir()] == [one.sha256]


def test_upkeep_creates_missing_folders(tmp_path: Path) -> None:
    with caching(tmp_path) as cache:
        shutil.rmtree(tmp_path / "loras")
        cache.tidy()

        assert kept(tmp_path) == {}


def test_the_record_of_a_new_file_survives_a_simultaneous_upkeep(tmp_path: Path) -> None:
    """Another process adds the file and its record while the upkeep runs."""
    with serving(reply(status=500)) as host, caching(tmp_path, host) as cache:
        asset, entries = Asset(url=f"{host.url}/a"), cache.index.entries

        def late() -> Iterator[tuple[Path, Entry]]:
            cache.file(digest(ONE)).write_bytes(ONE)
            cache.index.remember(
                asset.address, Fetched(sha256=digest(ONE), size=SIZE), at=time.time()
            )
            yield from entries()

        cache.index.entries = late  # type: ignore[method-assign]
        cache.tidy()

        assert got(cache, asset, since=0).tier == "disk"
        assert host.requests == []


def test_verify_deletes_damaged_files_and_does_not_count_as_a_use(tmp_path: Path) -> None:
    with (
        serving(by_path({"/a": ONE, "/b": TWO, "/c": THREE})) as host,
        caching(tmp_path, host) as cache,
    ):
        files = [got(cache, Asset(url=f"{host.url}/{name}")) for name in "abc"]
        overwrite(files[1].path, bytes(SIZE))
        before = [os.stat(file.path).st_atime_ns for file in files]

        found = dict(cache.budget.verify())

        assert found == {digest(ONE): "sound", digest(TWO): "dropped", digest(THREE): "sound"}
        assert [os.stat(files[index].path).st_atime_ns for index in (0, 2)] == [
            before[0],
            before[2],
        ]
        assert kept(tmp_path) == named(ONE, THREE)


def overwrite(path: Path, data: bytes) -> None:
    """Write in place, and restore the modification time."""
    found = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


# --- prune


@contextmanager
def three_files(folder: Path) -> Iterator[Cache]:
    """Yield a cache with files that were used 20, 10 and 5 seconds ago."""
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
def test_prune_evicts_the_least_recently_used_files(
    tmp_path: Path, options: dict[str, int], left: list[bytes]
) -> None:
    with three_files(tmp_path) as cache:
        pruned = cache.budget.prune(**options)

        assert kept(tmp_path) == named(*left)
        gone = 3 - len(left)
        assert pruned == Pruned(files=gone, size=gone * SIZE, in_use=0)


def test_prune_keeps_and_counts_files_in_use(tmp_path: Path) -> None:
    with three_files(tmp_path) as cache, cache.files([pinned(ONE)]):
        age(cache.file(digest(ONE)), 20)
        assert cache.budget.prune(max_bytes=2 * SIZE) == Pruned(files=1, size=SIZE, in_use=1)
        assert kept(tmp_path) == named(ONE, THREE)

        assert cache.budget.prune() == Pruned(files=1, size=SIZE, in_use=1)
        assert kept(tmp_path) == named(ONE)


def test_prune_deletes_drafts_of_ended_processes(tmp_path: Path) -> None:
    with three_files(tmp_path) as cache:
        cache._draft(pinned(ONE)).write_bytes(ONE)
        cache.budget.prune(max_bytes=3 * SIZE)

        assert kept(tmp_path) == named(ONE, TWO, THREE)
