"""The store folder, and the store that a URL means."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier, Event
from typing import Final
from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.servers import settings, untimed
from zlora.errors import StoreFailed
from zlora_worker.results.store import FolderStore, open_store

KEY: Final = "runs/job-1/outputs/0.png"
PNG: Final = "image/png"


def stored(folder: Path) -> list[str]:
    """Return all files under a folder, with drafts."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read(url: str) -> bytes:
    parts = urlsplit(url)
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("file", "", "", "")
    return Path(unquote(parts.path)).read_bytes()


# --- the folder


def test_an_object_is_read_back_by_its_key_and_its_url(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "a store, 100% é?#")
    url = store.url(KEY, 60)
    assert stored(tmp_path) == []  # a URL creates nothing

    assert store.put_new(KEY, b"content", PNG) is True

    assert store.get(KEY) == read(url) == b"content"
    assert store.url(KEY, 60) == url
    assert stored(tmp_path / "a store, 100% é?#") == [KEY]


@hypothesis_settings(
    untimed, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(first=st.binary(max_size=100), second=st.binary(max_size=100))
def test_an_object_stays_until_it_is_deleted(tmp_path: Path, first: bytes, second: bytes) -> None:
    """A redelivered job stores the same keys, and its first image may have been seen."""
    store = FolderStore(tmp_path)
    store.delete(KEY)
    assert store.get(KEY) is None

    assert store.put_new(KEY, first, PNG) is True
    assert store.put_new(KEY, second, PNG) is False
    assert store.get(KEY) == first
    assert stored(tmp_path) == [KEY]

    store.delete(KEY)
    assert store.get(KEY) is None
    assert stored(tmp_path) == []
    assert store.put_new(KEY, second, PNG) is True
    assert store.get(KEY) == second


def test_a_reader_of_a_deleted_file_reads_all_of_it(tmp_path: Path) -> None:
    """A new object takes the name, and the old file is never written to."""
    store = FolderStore(tmp_path)
    store.put_new(KEY, b"old", PNG)

    with (tmp_path / KEY).open("rb") as reader:
        store.delete(KEY)
        store.put_new(KEY, b"longer and new", PNG)
        assert reader.read() == b"old"


def test_other_users_may_read_the_files(tmp_path: Path) -> None:
    """A web server runs as another user than the worker."""
    FolderStore(tmp_path).put_new(KEY, b"content", PNG)

    assert stat.S_IMODE((tmp_path / KEY).stat().st_mode) == 0o644


# --- concurrent writers


def test_exactly_one_of_several_threads_creates_an_object(
    tmp_path: Path,
) -> None:
    store, writers, rounds = FolderStore(tmp_path), 4, 50
    start = Barrier(writers)

    def write(writer: int) -> list[bool]:
        created = []
        for index in range(rounds):
            start.wait(60)
            created.append(store.put_new(f"runs/{index}.png", bytes([writer]) * 10_000, PNG))
        return created

    with ThreadPoolExecutor(writers) as pool:
        created = list(pool.map(write, range(writers)))

    for index, outcomes in enumerate(zip(*created, strict=True)):
        assert sum(outcomes) == 1
        assert store.get(f"runs/{index}.png") == bytes([outcomes.index(True)]) * 10_000
    assert len(stored(tmp_path)) == rounds  # and no draft


# Opens a store in a process of its own, in the folder of its first argument.
WRITE: Final = """
import os, signal, sys
from pathlib import Path
from zlora_worker.results.store import FolderStore

kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
link, store = os.link, FolderStore(Path(sys.argv[1]))
"""
RACE: Final = """
print("ready", flush=True)
sys.stdin.readline()
data = sys.argv[2].encode() * 10_000
won = [i for i in range(60) if store.put_new(f"runs/{i}.png", data, "image/png")]
print(*won)
"""


def test_exactly_one_of_several_processes_creates_an_object(
    tmp_path: Path,
) -> None:
    """Two workers have the same job if the broker redelivers it while the first still works."""
    writers = ["a", "b", "c"]
    processes = [start_python(WRITE + RACE, str(tmp_path), writer) for writer in writers]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    won = {
        writer: process.communicate(timeout=60)[0].split()
        for writer, process in zip(writers, processes, strict=True)
    }

    winner = {int(index): writer for writer, indices in won.items() for index in indices}
    assert sum(map(len, won.values())) == len(winner) == 60
    assert all(
        FolderStore(tmp_path).get(f"runs/{i}.png") == writer.encode() * 10_000
        for i, writer in winner.items()
    )
    assert len(stored(tmp_path)) == 60


def start_python(script: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_reader_sees_nothing_or_the_whole_object(tmp_path: Path) -> None:
    store, looked, done = FolderStore(tmp_path), Event(), Event()
    wholes, seen = [bytes([index]) * 300_000 for index in range(40)], set()

    def look() -> None:
        while not done.is_set():
            if (found := store.get(KEY)) is not None:
                seen.add(found)
                looked.set()

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(look)
        try:
            for whole in wholes:
                looked.clear()
                assert store.put_new(KEY, whole, PNG)
                assert looked.wait(60)
                store.delete(KEY)
        finally:
            done.set()
        reader.result()

    assert seen <= set(wholes)


def test_a_draft_is_synced_before_its_link_and_the_folder_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss no name is without its bytes, and no stored object is gone."""
    store, link, fsync, done = FolderStore(tmp_path / "store"), os.link, os.fsync, list[str]()

    def look_and_sync(file: int) -> None:
        found = Path(os.readlink(f"/proc/self/fd/{file}"))
        if found.is_file():
            assert found.read_bytes() == b"content"
        done.append("draft" if found.is_file() else str(found.relative_to(tmp_path)))
        fsync(file)

    def look_and_link(draft: str, path: Path) -> None:
        assert not path.exists()
        link(draft, path)
        done.append("link")

    monkeypatch.setattr(os, "fsync", look_and_sync)
    monkeypatch.setattr(os, "link", look_and_link)
    store.put_new(KEY, b"content", PNG)
    store.put_new(f"{KEY}-2", b"content", PNG)

    folder = f"store/{Path(KEY).parent}"
    made = [str(Path(folder).parents[index]) for index in range(len(Path(folder).parts))]
    assert sorted(done[: len(made)]) == sorted(made)
    assert done[len(made) :] == ["draft", "link", folder, "draft", "link", folder]


def test_a_file_system_that_cannot_sync_folders_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse(file: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file}")).is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(file)

    monkeypatch.setattr(os, "fsync", refuse)

    assert FolderStore(tmp_path).put_new(KEY, b"content", PNG) is True


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("os.link = lambda *paths: kill()", None),
        ("os.link = lambda *paths: (link(*paths), kill())", b"whole"),
    ],
    ids=["before the link", "after the link"],
)
def test_a_killed_writer_leaves_nothing_or_the_whole_object(
    tmp_path: Path, fault: str, found: bytes | None
) -> None:
    """The draft that it leaves is no object, and does not hinder the next writer."""
    script = f"{WRITE}\n{fault}\nstore.put_new({KEY!r}, b'whole', 'image/png')"
    process = start_python(script, str(tmp_path))
    process.communicate(timeout=60)

    assert process.returncode == -signal.SIGKILL
    drafts = [name for name in stored(tmp_path) if "/.draft-" in name]
    assert len(drafts) == 1
    store = FolderStore(tmp_path)
    assert store.get(KEY) == found
    assert store.put_new(KEY, b"later", PNG) is (found is None)
    assert store.get(KEY) == (found or b"later")


# --- folders that fail


@pytest.mark.parametrize("place", ["", "runs", "runs/job-1/outputs"])
def test_a_file_in_place_of_a_folder_fails_the_store(tmp_path: Path, place: str) -> None:
    """It is taken neither for the object nor for its absence."""
    store, file = FolderStore(tmp_path / "store"), tmp_path / "store" / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("not a folder")

    for call in calls_of(store):
        with pytest.raises(
            StoreFailed, match=f"{KEY} cannot be .* the store folder: (File exists|Not a dir)"
        ) as raised:
            call()
        assert raised.value.retryable

    assert file.read_text() == "not a folder"


def calls_of(store: FolderStore) -> list[Callable[[], object]]:
    """Return each operation of the store, with `KEY`."""
    return [
        lambda: store.put_new(KEY, b"content", PNG),
        lambda: store.get(KEY),
        lambda: store.delete(KEY),
    ]


def test_a_pipe_in_place_of_the_file_fails_the_store(tmp_path: Path) -> None:
    """Reading it would wait for ever."""
    (tmp_path / KEY).parent.mkdir(parents=True)
    os.mkfifo(tmp_path / KEY)

    with pytest.raises(StoreFailed, match="not a regular file"):
        FolderStore(tmp_path).get(KEY)


def test_a_folder_in_place_of_the_file_is_left_alone(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    (tmp_path / KEY).mkdir(parents=True)

    assert store.put_new(KEY, b"content", PNG) is False
    for call in calls_of(store)[1:]:
        with pytest.raises(StoreFailed, match=r"Is a directory|not a regular file"):
            call()

    assert (tmp_path / KEY).is_dir()
    assert stored(tmp_path) == []


@pytest.mark.parametrize("size", [2_000, 100_000], ids=["at the flush", "at the write"])
def test_a_full_disk_fails_the_store_and_leaves_no_draft(tmp_path: Path, size: int) -> None:
    """Otherwise each job would fill the disk further. With room again, the object is stored."""
    store = FolderStore(tmp_path)

    with files_of_at_most(1000), pytest.raises(StoreFailed, match="File too large"):
        store.put_new(KEY, bytes(size), PNG)

    assert stored(tmp_path) == []
    assert store.get(KEY) is None
    assert store.put_new(KEY, bytes(size), PNG) is True
    assert store.get(KEY) == bytes(size)


def test_a_stored_object_needs_no_room_on_a_full_disk(tmp_path: Path) -> None:
    """A redelivered job finds the images that it has stored."""
    store = FolderStore(tmp_path)
    store.put_new(KEY, b"first", PNG)

    with files_of_at_most(1000):
        assert store.put_new(KEY, bytes(100_000), PNG) is False


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the kernel refuse writes of this process past `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_process_without_file_handles_fails_the_store(tmp_path: Path) -> None:
    """An object that cannot be opened is not taken for an absent one."""
    store = FolderStore(tmp_path)
    store.put_new(KEY, b"content", PNG)

    with no_more_files():
        with pytest.raises(StoreFailed, match="Too many open files"):
            store.put_new("runs/job-1/outputs/1.png", b"content", PNG)
        with pytest.raises(StoreFailed, match="Too many open files"):
            store.get(KEY)

    assert stored(tmp_path) == [KEY]


@contextmanager
def no_more_files() -> Iterator[None]:
    """Let this process open no more files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_a_file_system_without_hard_links_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Such as FAT, some FUSE and network file systems: the operator must choose another folder."""

    def link(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)

    with pytest.raises(StoreFailed, match=f"must support hard links .{os.strerror(number)}"):
        FolderStore(tmp_path).put_new(KEY, b"content", PNG)

    assert stored(tmp_path) == []


# --- which store


def test_a_file_url_means_a_folder(tmp_path: Path) -> None:
    store = open_store(settings(tmp_path, ZLORA_STORE=(tmp_path / "a b").as_uri()))

    assert store.put_new("key", b"x", PNG)
    assert read(store.url("key", 60)) == b"x"
    assert stored(tmp_path) == ["a b/key"]


def test_the_default_store_is_in_the_data_folder(tmp_path: Path) -> None:
    open_store(settings(tmp_path)).put_new("key", b"x", PNG)

    assert stored(tmp_path) == ["store/key"]
