"""The store folder, and which store a URL means."""

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
from zlora.schema import image_key, manifest_key
from zlora_worker.results.store import FolderStore, open_store

KEY: Final = "runs/job-1/outputs/0.png"
PICTURE: Final = "image/png"


def stored(folder: Path) -> list[str]:
    """All files under a folder, drafts included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def read(url: str) -> bytes:
    parts = urlsplit(url)
    assert (parts.scheme, parts.netloc, parts.query, parts.fragment) == ("file", "", "", "")
    return Path(unquote(parts.path)).read_bytes()


# --- keys


def test_keys_lie_under_the_job_s_own_prefix() -> None:
    assert image_key("job-1", 3, "webp") == "runs/job-1/outputs/3.webp"
    assert manifest_key("job-1") == "runs/job-1/manifest.json"


# --- the folder


def test_what_is_put_is_read_back_under_its_key_and_its_url(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "a store, 100% é?#")
    url = store.url(KEY, 60)
    assert stored(tmp_path) == []  # asking where it will be makes nothing

    assert store.put_new(KEY, b"picture", PICTURE) is True

    assert store.get(KEY) == read(url) == b"picture"
    assert store.url(KEY, 60) == url
    assert stored(tmp_path / "a store, 100% é?#") == [KEY]


@hypothesis_settings(untimed, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.binary(max_size=100), second=st.binary(max_size=100))
def test_what_is_there_stays_until_it_is_deleted(
    tmp_path: Path, first: bytes, second: bytes
) -> None:
    """A job that is drawn again after a redelivery stores the same keys, and people may have seen the first picture."""
    store = FolderStore(tmp_path)
    store.delete(KEY)
    assert store.get(KEY) is None

    assert store.put_new(KEY, first, PICTURE) is True
    assert store.put_new(KEY, second, PICTURE) is False
    assert store.get(KEY) == first
    assert stored(tmp_path) == [KEY]

    store.delete(KEY)
    assert store.get(KEY) is None
    assert stored(tmp_path) == []
    assert store.put_new(KEY, second, PICTURE) is True
    assert store.get(KEY) == second


def test_a_reader_of_a_deleted_file_keeps_it_whole(tmp_path: Path) -> None:
    """What comes after it takes the name; the old bytes are never written to."""
    store = FolderStore(tmp_path)
    store.put_new(KEY, b"old", PICTURE)

    with (tmp_path / KEY).open("rb") as reader:
        store.delete(KEY)
        store.put_new(KEY, b"longer and new", PICTURE)
        assert reader.read() == b"old"


def test_others_may_read_what_is_stored(tmp_path: Path) -> None:
    """A draft is private to the worker's user; a web server runs as another."""
    FolderStore(tmp_path).put_new(KEY, b"picture", PICTURE)

    assert stat.S_IMODE((tmp_path / KEY).stat().st_mode) == 0o644


# --- one key, many hands


def test_of_many_threads_exactly_one_creates_the_object_and_its_bytes_are_there(
    tmp_path: Path,
) -> None:
    store, hands, rounds = FolderStore(tmp_path), 4, 100
    start = Barrier(hands)

    def write(hand: int) -> list[bool]:
        created = []
        for index in range(rounds):
            start.wait(60)
            created.append(store.put_new(f"runs/{index}.png", bytes([hand]) * 10_000, PICTURE))
        return created

    with ThreadPoolExecutor(hands) as pool:
        created = list(pool.map(write, range(hands)))

    for index, answers in enumerate(zip(*created, strict=True)):
        assert sum(answers) == 1
        assert store.get(f"runs/{index}.png") == bytes([answers.index(True)]) * 10_000
    assert len(stored(tmp_path)) == rounds  # and no draft


# Storing under `KEY` in a process of its own, in the folder that it is told; faults come before it.
WRITE: Final = """
import os, signal, sys
from pathlib import Path
from zlora_worker.results.store import FolderStore

die, link, store = lambda: os.kill(os.getpid(), signal.SIGKILL), os.link, FolderStore(Path(sys.argv[1]))
"""
RACE: Final = """
print("ready", flush=True)
sys.stdin.readline()
won = [i for i in range(200) if store.put_new(f"runs/{i}.png", sys.argv[2].encode() * 10_000, "image/png")]
print(*won)
"""


def test_of_many_processes_exactly_one_creates_the_object_and_its_bytes_are_there(
    tmp_path: Path,
) -> None:
    """Two workers have the same job where one was slow, and the broker gave it to the other."""
    hands = ["a", "b", "c"]
    processes = [start_python(WRITE + RACE, str(tmp_path), hand) for hand in hands]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    won = {
        hand: process.communicate(timeout=60)[0].split()
        for hand, process in zip(hands, processes, strict=True)
    }

    winner = {int(index): hand for hand, indices in won.items() for index in indices}
    assert sum(map(len, won.values())) == len(winner) == 200
    assert all(
        FolderStore(tmp_path).get(f"runs/{i}.png") == hand.encode() * 10_000
        for i, hand in winner.items()
    )
    assert len(stored(tmp_path)) == 200


def start_python(script: str, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_reader_sees_nothing_or_the_whole_object(tmp_path: Path) -> None:
    store, looked, done = FolderStore(tmp_path), Event(), Event()
    wholes, seen = [bytes([index]) * 300_000 for index in range(100)], set()

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
                assert store.put_new(KEY, whole, PICTURE)
                assert looked.wait(60)
                store.delete(KEY)
        finally:
            done.set()
        reader.result()

    assert seen <= set(wholes)


def test_a_draft_is_whole_on_disk_before_it_is_linked_and_its_name_when_it_is_said_to_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power loss a name must not be there without its bytes, nor a result be gone that was told."""
    store, link, fsync, done = FolderStore(tmp_path / "store"), os.link, os.fsync, list[str]()

    def look_and_sync(file: int) -> None:
        found = Path(os.readlink(f"/proc/self/fd/{file}"))
        if found.is_file():
            assert found.read_bytes() == b"picture"
        done.append("draft" if found.is_file() else str(found.relative_to(tmp_path)))
        fsync(file)

    def look_and_link(draft: str, path: Path) -> None:
        assert not path.exists()
        link(draft, path)
        done.append("link")

    monkeypatch.setattr(os, "fsync", look_and_sync)
    monkeypatch.setattr(os, "link", look_and_link)
    store.put_new(KEY, b"picture", PICTURE)
    store.put_new(f"{KEY}-2", b"picture", PICTURE)

    folder = f"store/{Path(KEY).parent}"
    made = [str(Path(folder).parents[index]) for index in range(len(Path(folder).parts))]
    assert sorted(done[: len(made)]) == sorted(made)
    assert done[len(made) :] == ["draft", "link", folder, "draft", "link", folder]


def test_a_file_system_that_syncs_no_folders_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def refuse(file: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{file}")).is_dir():
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(file)

    monkeypatch.setattr(os, "fsync", refuse)

    assert FolderStore(tmp_path).put_new(KEY, b"picture", PICTURE) is True


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ("os.link = lambda *paths: die()", None),
        ("os.link = lambda *paths: (link(*paths), die())", b"whole"),
    ],
    ids=["before the link", "after the link"],
)
def test_a_killed_writer_leaves_nothing_or_the_whole_object(
    tmp_path: Path, fault: str, found: bytes | None
) -> None:
    """The draft that it leaves is no result, and is in nobody's way."""
    script = f"{WRITE}\n{fault}\nstore.put_new({KEY!r}, b'whole', 'image/png')"
    process = start_python(script, str(tmp_path))
    process.communicate(timeout=60)

    assert process.returncode == -signal.SIGKILL
    drafts = [name for name in stored(tmp_path) if "/.draft-" in name]
    assert len(drafts) == 1
    store = FolderStore(tmp_path)
    assert store.get(KEY) == found
    assert store.put_new(KEY, b"later", PICTURE) is (found is None)
    assert store.get(KEY) == (found or b"later")


# --- folders that fail


@pytest.mark.parametrize("place", ["", "runs", "runs/job-1/outputs"])
def test_a_file_in_the_place_of_a_folder_is_a_failed_store(tmp_path: Path, place: str) -> None:
    """It is not taken for the object, nor for the lack of it."""
    store, file = FolderStore(tmp_path / "store"), tmp_path / "store" / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("not a folder")

    for act in acts(store):
        with pytest.raises(
            StoreFailed, match=f"{KEY} cannot be .* the store folder: (File exists|Not a dir)"
        ) as raised:
            act()
        assert raised.value.retryable

    assert file.read_text() == "not a folder"


def acts(store: FolderStore) -> list[Callable[[], object]]:
    """All that asks the store, with `KEY`."""
    return [
        lambda: store.put_new(KEY, b"picture", PICTURE),
        lambda: store.get(KEY),
        lambda: store.delete(KEY),
    ]


def test_a_folder_in_the_place_of_the_file_is_left_alone(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    (tmp_path / KEY).mkdir(parents=True)

    assert store.put_new(KEY, b"picture", PICTURE) is False
    for act in acts(store)[1:]:
        with pytest.raises(StoreFailed, match="Is a directory"):
            act()

    assert (tmp_path / KEY).is_dir()
    assert stored(tmp_path) == []


@pytest.mark.parametrize("size", [2_000, 100_000], ids=["at the flush", "at the write"])
def test_a_disk_that_takes_no_more_is_a_failed_store_and_leaves_no_draft(
    tmp_path: Path, size: int
) -> None:
    """Else each job of a full disk takes a bit more of it. Where there is room again, the object can be stored."""
    store = FolderStore(tmp_path)

    with files_of_at_most(1000), pytest.raises(StoreFailed, match="File too large"):
        store.put_new(KEY, bytes(size), PICTURE)

    assert stored(tmp_path) == []
    assert store.get(KEY) is None
    assert store.put_new(KEY, bytes(size), PICTURE) is True
    assert store.get(KEY) == bytes(size)


def test_what_is_stored_needs_no_room_again(tmp_path: Path) -> None:
    """A job that comes back to a full disk finds what it has stored."""
    store = FolderStore(tmp_path)
    store.put_new(KEY, b"first", PICTURE)

    with files_of_at_most(1000):
        assert store.put_new(KEY, bytes(100_000), PICTURE) is False


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full for this process: the kernel refuses each write past `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_process_without_file_handles_is_a_failed_store(tmp_path: Path) -> None:
    """An object that cannot be opened is not one that is not there."""
    store = FolderStore(tmp_path)
    store.put_new(KEY, b"picture", PICTURE)

    with no_more_files():
        with pytest.raises(StoreFailed, match="Too many open files"):
            store.put_new("runs/job-1/outputs/1.png", b"picture", PICTURE)
        with pytest.raises(StoreFailed, match="Too many open files"):
            store.get(KEY)

    assert stored(tmp_path) == [KEY]


@contextmanager
def no_more_files() -> Iterator[None]:
    """This process can open no file more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK])
def test_a_file_system_without_hard_links_is_named_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """FAT, some FUSE and network file systems: the operator has to choose another folder."""

    def link(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)

    with pytest.raises(StoreFailed, match=f"must support hard links .{os.strerror(number)}"):
        FolderStore(tmp_path).put_new(KEY, b"picture", PICTURE)

    assert stored(tmp_path) == []


# --- which store


def test_a_file_url_is_a_folder(tmp_path: Path) -> None:
    store = open_store(settings(tmp_path, ZLORA_STORE=(tmp_path / "a b").as_uri()))

    assert store.put_new("key", b"x", PICTURE)
    assert read(store.url("key", 60)) == b"x"
    assert stored(tmp_path) == ["a b/key"]


def test_the_default_store_is_in_the_data_folder(tmp_path: Path) -> None:
    open_store(settings(tmp_path)).put_new("key", b"x", PICTURE)

    assert stored(tmp_path) == ["store/key"]
