"""The cache's disk fills during a download: the job fails, no part is kept, the worker goes on."""

import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Final

import pytest
from support.processes import wait_until
from support.scene import Scene
from support.servers import Answer, Request, digest, lora_bytes, reply, serving
from zlora import JobHandle, JobState
from zlora_worker.fetch.eviction import listed, written

DATA: Final = lora_bytes(7, size=900_000)
FIRST: Final = 400_000  # bytes that come before the disk is full
ROOM: Final = 500_000  # bytes that a file may have then
DISK: Final = 2**20  # bytes
NOTHING: Final[dict[str, list[str]]] = {
    part: [] for part in ("drafts", "files", "index", "failed", "verified")
}

Fill = Callable[
    [int], Callable[[], object]
]  # fills the disk of a child, and returns a function that makes room
Disk = Callable[[Path], AbstractContextManager[Fill]]


@contextmanager
def quota(_folder: Path) -> Iterator[Fill]:
    """Make the kernel refuse larger files to the child."""

    def limit(child: int, most: int) -> None:
        resource.prlimit(child, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))

    def fill(child: int) -> Callable[[], object]:
        limit(child, ROOM)
        return lambda: limit(child, resource.RLIM_INFINITY)

    yield fill


@contextmanager
def small_disk(folder: Path) -> Iterator[Fill]:
    """Fill the disk by another file."""
    ballast = folder / "ballast"

    def fill(_child: int) -> Callable[[], object]:
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        assert ballast.stat().st_size
        return ballast.unlink

    folder.mkdir()
    assert mount(folder)
    try:
        yield fill
    finally:
        subprocess.run(["/bin/umount", "-l", str(folder)], check=True)


def mount(folder: Path) -> bool:
    """Mount a small disk; return whether that is permitted."""
    command = ["/bin/mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    try:
        return not subprocess.run(command, check=False, capture_output=True).returncode
    except FileNotFoundError:
        return False


def may_mount() -> bool:
    """Return whether this process may mount a disk; mostly root only."""
    with TemporaryDirectory() as folder:
        mounted = mount(Path(folder))
        if mounted:
            subprocess.run(["/bin/umount", folder], check=True)
        return mounted


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test with a quota, and also with a disk if mounts are permitted."""
    if "disk" in metafunc.fixturenames:
        disks: list[Disk] = [quota, small_disk] if may_mount() else [quota]
        metafunc.parametrize("disk", disks, ids=["quota", "disk"][: len(disks)])


def test_disk_that_fills_during_a_download_leaves_no_part_and_the_worker_goes_on(
    scene: Scene, tmp_path: Path, disk: Disk
) -> None:
    """The same child draws the next job at once, and one with that LoRA once there is room."""
    loras, go_on = tmp_path / "disk/loras", Event()
    scene.environ |= {
        "ZLORA_LORA_CACHE": str(loras),
        "ZLORA_LORA_FREE_BYTES": "0",
        "ZLORA_LOOK_AHEAD": "0",
    }
    with ExitStack() as stack:
        fill, host = (
            stack.enter_context(disk(tmp_path / "disk")),
            stack.enter_context(serving(in_two(DATA, go_on))),
        )
        stack.callback(go_on.set)
        running = stack.enter_context(scene.worker(ZLORA_ALLOW_HOSTS=host.name))
        child = scene.child(running)
        hindered = with_lora(scene, host.url)
        wait_until(lambda: drafted(loras) > FIRST // 2, "a part of it is on the disk")
        scene.tally.fault()
        make_room = fill(child)
        go_on.set()
        wait_until(
            lambda: hindered.status().state is JobState.RETRY, "the job is to be tried again"
        )
        assert hindered.status().code == "cache_full"
        hindered.cancel()
        wait_until(lambda: hindered.status().state is JobState.REVOKED, "the job is revoked")

        assert {part: names(loras / part) for part in NOTHING} == NOTHING
        assert scene.submit().result(timeout=60).base_intact

        make_room()
        (receipt,) = with_lora(scene, host.url).result(timeout=60).loras
        assert (receipt.tier, receipt.sha256, len(host.requests)) == ("network", digest(DATA), 2)
        (file,) = (loras / "files").iterdir()
        assert (file.name, file.read_bytes()) == (f"{digest(DATA)}.safetensors", DATA)
        assert scene.child(running) == child
        assert len(scene.events("loaded")) == 1


def in_two(data: bytes, go_on: Event) -> Answer:
    """Return a host of one file whose second part waits."""
    whole = reply(data, ETag='"7"')

    def answer(_: Request) -> Iterator[bytes]:
        yield whole[:FIRST]
        go_on.wait(60)
        yield whole[FIRST:]

    return answer


def with_lora(scene: Scene, url: str) -> JobHandle:
    """Submit a job with the file of a host."""
    return scene.submit(fields={"loras": [{"file": {"url": f"{url}/a.safetensors"}}]})


def drafted(loras: Path) -> int:
    """Return bytes of drafts on the disk."""
    folder = loras / "drafts"
    return sum(written(entry) for entry, _ in listed(folder)) if folder.exists() else 0


def names(folder: Path) -> list[str]:
    """Return the names in a folder."""
    return sorted(path.name for path in folder.iterdir())
