"""The cache in several processes: one download for all, kill -9 at any moment, files in use."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import pytest
from support.processes import PATIENCE, wait_until
from support.servers import caching, digest, got, kept, lora_bytes, named
from zlora.errors import CacheFull, LoraError
from zlora.schema import Asset
from zlora_worker.fetch.cache import Cache

MANY = 20
LARGE = lora_bytes(1, size=20 * 2**20)
SMALL = [lora_bytes(fill, size=2**20) for fill in range(6)]
ROOM = 7 * 2**19  # bytes: three of them
KILLS = 12

processes = multiprocessing.get_context("forkserver")  # a copy of a process that has no threads
processes.set_forkserver_preload(["pytest", "hypothesis", "zlora_worker.fetch.cache"])


class Source(ThreadingHTTPServer):
    """A host of files for many clients at once.

    Of each body the second half waits until `gate` is set.
    """

    daemon_threads = True

    def __init__(self, contents: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.contents, self.tags = (
            contents,
            {path: f'"{digest(data)}"' for path, data in contents.items()},
        )
        self.gate, self.gets, self.counting = Event(), list[str](), Lock()
        self.name = f"127.0.0.1:{self.server_port}"

    def asset(self, path: str, **pin: str) -> Asset:
        """Return the asset of a path."""
        return Asset(url=f"http://{self.name}{path}", **pin)

    def handle_error(self, *_: Any) -> None:
        """Ignore killed clients."""


class _Answer(BaseHTTPRequestHandler):
    server: Source

    def do_GET(self) -> None:
        with self.server.counting:
            self.server.gets.append(self.path)
        data, tag = self.server.contents.get(self.path), self.server.tags.get(self.path, "")
        status = 404 if data is None else 304 if self.headers["If-None-Match"] == tag else 200
        body = memoryview(data or b"")[: None if status == 200 else 0]
        self.send_response(status)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body)))
        half = len(body) // 2
        if status == 404:
            self.server.gate.wait(PATIENCE)
        self.end_headers()
        self.wfile.write(body[:half])
        if body:
            self.server.gate.wait(PATIENCE)
        self.wfile.write(body[half:])

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


@contextmanager
def source(**contents: bytes) -> Iterator[Source]:
    with Source({f"/{name}": data for name, data in contents.items()}) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.gate.set()
            server.shutdown()
            thread.join()


class Peer:
    """A process of the test, with a connection to it."""

    def __init__(self, process: BaseProcess, line: Connection) -> None:
        self.process, self.line = process, line

    def receive(self) -> Any:
        """Return the next message of the process."""
        assert self.line.poll(PATIENCE), "a process sends no message"
        return self.line.recv()

    def kill(self) -> None:
        """Kill the process (kill -9)."""
        with suppress(ProcessLookupError):
            os.kill(int(self.process.pid or 0), signal.SIGKILL)
        self.process.join(PATIENCE)

    def has_open(self, part: Path) -> bool:
        """Return whether the process has a file of this folder open."""
        with suppress(FileNotFoundError):
            for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
                with suppress(FileNotFoundError):
                    if os.readlink(link).startswith(f"{part}/"):
                        return True
        return False


Start = Callable[..., Peer]


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a process, whose last argument is its connection."""
    peers: list[Peer] = []

    def begin(function: Callable[..., None], *arguments: Any) -> Peer:
        ours, theirs = processes.Pipe()
        process = processes.Process(target=function, args=(*arguments, theirs), daemon=True)
        process.start()
        theirs.close()
        peers.append(Peer(process, ours))
        return peers[-1]

    yield begin
    for peer in peers:
        peer.kill()
        peer.line.close()
        peer.process.close()


# --- functions of the processes


def ask(folder: Path, host: str, asset: Asset, since: float, line: Connection) -> None:
    """Get one file, and send its checksum or the code of the error."""
    with caching(folder, ZLORA_ALLOW_HOSTS=host) as cache:
        line.send("asking")
        try:
            file = got(cache, asset, since=since)
            line.send((file.sha256, file.tier))
        except LoraError as error:
            line.send(error.code)


def hold(folder: Path, host: str, asset: Asset, max_bytes: int, line: Connection) -> None:
    """Use one file until a message comes, and send its checksum then."""
    with (
        caching(folder, max_bytes=max_bytes, ZLORA_ALLOW_HOSTS=host) as cache,
        cache.files([asset], since=0) as (file,),
    ):
        line.send("holding")
        line.recv()
        line.send(digest(file.path.read_bytes()))


def work(folder: Path, host: str, seed: int, stop: Path, line: Connection) -> None:
    """Use one file after the other, with room for three, until `stop` exists; send errors."""
    choose = random.Random(seed)
    with caching(folder, max_bytes=ROOM, ZLORA_ALLOW_HOSTS=host) as cache:
        line.send("at work")
        while not stop.exists():
            index = choose.randrange(len(SMALL))
            pin = {"sha256": digest(SMALL[index])} if choose.random() < 0.5 else {}
            try:
                with cache.files([Asset(url=f"http://{host}/{index}", **pin)], since=0) as (file,):
                    time.sleep(choose.choice([0, 0.05]))  # other processes add files meanwhile
                    assert digest(file.path.read_bytes()) == digest(SMALL[index])
            except CacheFull:  # all files are in use
                continue
            except Exception as error:  # noqa: BLE001 - sent to the test
                line.send(repr(error))
                return
    line.send("done")


# --- one download


def test_many_processes_that_need_one_file_make_one_download(tmp_path: Path, start: Start) -> None:
    """All wait during the download; each opens the cache, and cleans it up, as a worker does."""
    since = time.time()
    with source(large=LARGE) as host:
        peers = [start(ask, tmp_path, host.name, host.asset("/large"), since) for _ in range(MANY)]
        assert [peer.receive() for peer in peers] == ["asking"] * MANY
        host.gate.set()
        answers = [peer.receive() for peer in peers]

        assert {sha256 for sha256, _ in answers} == {digest(LARGE)}
        assert sorted(tier for _, tier in answers) == ["disk"] * (MANY - 1) + ["network"]
        assert host.gets == ["/large"]
    assert sound(tmp_path) == [digest(LARGE)]


def test_jobs_with_and_without_a_checksum_make_one_download(tmp_path: Path, start: Start) -> None:
    """Two addresses with the same checksum are one download too."""
    since, pin = time.time(), {"sha256": digest(SMALL[1])}
    with source(a=SMALL[1], b=SMALL[1]) as host:
        assets = [host.asset("/a"), host.asset("/a", **pin)]
        peers = [start(ask, tmp_path / "one", host.name, asset, since) for asset in assets * 4]
        both = [host.asset("/a", **pin), host.asset("/b", **pin)]
        peers += [start(ask, tmp_path / "two", host.name, asset, since) for asset in both * 4]
        assert [peer.receive() for peer in peers] == ["asking"] * 16
        host.gate.set()

        assert {peer.receive()[0] for peer in peers} == {digest(SMALL[1])}
        assert len(host.gets) == 2


def test_many_processes_that_need_a_missing_file_make_one_request(
    tmp_path: Path, start: Start
) -> None:
    with source() as host:
        peers = [
            start(ask, tmp_path, host.name, host.asset("/none"), time.time()) for _ in range(16)
        ]
        assert [peer.receive() for peer in peers] == ["asking"] * len(peers)
        host.gate.set()

        assert {peer.receive() for peer in peers} == {"lora_not_found"}
        assert host.gets == ["/none"]


# --- kill -9


@pytest.mark.parametrize("pinned", [False, True])
def test_waiting_process_downloads_after_the_downloader_is_killed(
    tmp_path: Path, start: Start, pinned: bool
) -> None:
    """The downloader is killed with half of the file on disk; that half is not used."""
    since, pin = time.time(), {"sha256": digest(LARGE)} if pinned else {}
    drafts = tmp_path / "loras/drafts"
    with source(large=LARGE) as host:
        peers = [
            start(ask, tmp_path, host.name, host.asset("/large", **pin), since) for _ in range(8)
        ]
        assert [peer.receive() for peer in peers] == ["asking"] * 8
        half = len(LARGE) // 2 - 2**20
        wait_until(
            lambda: sum(path.stat().st_blocks * 512 for path in drafts.iterdir()) > half,
            "half of the file is on disk",
        )
        (downloader,) = (peer for peer in peers if peer.has_open(drafts))
        downloader.kill()
        host.gate.set()
        answers = [peer.receive() for peer in peers if peer is not downloader]

        assert {sha256 for sha256, _ in answers} == {digest(LARGE)}
        assert sorted(tier for _, tier in answers) == ["disk"] * 6 + ["network"]
        assert host.gets == ["/large", "/large"]
    assert sound(tmp_path) == [digest(LARGE)]


def test_kill_at_any_moment_leaves_no_bad_file_and_blocks_no_process(
    tmp_path: Path, start: Start
) -> None:
    """Processes that add, use and evict files are killed at random; every file stays whole."""
    choose, stop, files = random.Random(5), tmp_path / "stop", tmp_path / "loras/files"
    with source(**{str(index): data for index, data in enumerate(SMALL)}) as host:
        host.gate.set()
        peers = [start(work, tmp_path, host.name, seed, stop) for seed in range(4)]
        assert [peer.receive() for peer in peers] == ["at work"] * 4
        for seed in range(KILLS):
            time.sleep(choose.uniform(0, 0.1))
            peers.pop(0).kill()
            for path in files.iterdir():
                with suppress(FileNotFoundError):
                    assert f"{digest(path.read_bytes())}.safetensors" == path.name
            peers.append(start(work, tmp_path, host.name, 100 + seed, stop))
            assert peers[-1].receive() == "at work"
            assert not any(peer.line.poll() for peer in peers), [
                peer.receive() for peer in peers if peer.line.poll()
            ]
        stop.touch()
        assert [peer.receive() for peer in peers] == ["done"] * 4
        assert len(host.gets) > KILLS

        with caching(tmp_path, max_bytes=ROOM, ZLORA_ALLOW_HOSTS=host.name) as cache:
            assert all(verdict == "sound" for _, verdict in cache.budget.verify())
            for index in range(len(SMALL)):
                assert got(cache, host.asset(f"/{index}")).sha256 == digest(SMALL[index])
    for draft in (tmp_path / "loras/drafts").glob("index-*"):
        draft.unlink()  # drafts of the index stay for an hour
    assert kept(tmp_path) == named(*SMALL[-3:])


def sound(folder: Path) -> list[str]:
    """Return the checksums of the files of a cache, after a check that each file is whole."""
    with caching(folder) as cache:
        found = dict(cache.budget.verify())
    assert set(found.values()) <= {"sound"}
    assert set(kept(folder)) == {f"{sha256}.safetensors" for sha256 in found}
    return list(found)


# --- in use


def test_file_that_a_process_uses_is_never_evicted(tmp_path: Path, start: Start) -> None:
    """One of two users is killed, then the other ends, while a third process fills the cache."""
    room = 2 * len(SMALL[0])
    with source(**{str(index): data for index, data in enumerate(SMALL)}) as host:
        host.gate.set()
        with caching(tmp_path, max_bytes=room, ZLORA_ALLOW_HOSTS=host.name) as cache:
            got(cache, host.asset("/0"), since=0)
            peers = [start(hold, tmp_path, host.name, host.asset("/0"), room) for _ in range(2)]
            assert [peer.receive() for peer in peers] == ["holding"] * 2
            fill(cache, host, 1, 2, 3)
            assert kept(tmp_path) == named(SMALL[0], SMALL[3])
            peers[0].kill()
            fill(cache, host, 1, 2)
            assert kept(tmp_path) == named(SMALL[0], SMALL[2])
            peers[1].line.send("enough")
            assert peers[1].receive() == digest(SMALL[0])
            peers[1].process.join(PATIENCE)

            fill(cache, host, 1)
            assert kept(tmp_path) == named(SMALL[1], SMALL[2])


def fill(cache: Cache, host: Source, *indices: int) -> None:
    """Get files, while the file in use is the least recently used one."""
    path = cache.file(digest(SMALL[0]))
    for index in indices:
        os.utime(path, (0, path.stat().st_mtime))
        got(cache, host.asset(f"/{index}"))
