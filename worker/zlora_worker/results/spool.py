"""Drawn images on their way from the child to the sidecar: files in memory, a folder for each job.

The child writes `job.json`, then one file for each image, and `drawn.json` last; the sidecar stores
the images, ends the job, and writes `ended.json`; the parent then acknowledges the message and
removes the folder. A job whose child was killed before `drawn.json` is abandoned.
"""

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import msgspec
from msgspec import Struct
from zlora.errors import StoreFailed
from zlora.files import write_atomically
from zlora.queue_info import QueueInfo
from zlora.schema import (
    BatchSize,
    EmbeddingReceipt,
    GenerateRequest,
    ImageReceipt,
    ImageRef,
    LoraReceipt,
    LoraSpec,
    PromptReceipt,
)

from zlora_worker.results.provenance import JobProvenance

if TYPE_CHECKING:
    from PIL import Image

_NEXT: Final = ".next.json"
_INFO: Final = ".queue.json"
_JOB: Final = "job.json"
_DRAWN: Final = "drawn.json"
_ENDED: Final = "ended.json"
_TRIES: Final = "tries"


class SpooledJob(Struct, frozen=True, kw_only=True):
    """What is known of an attempt before its first image.

    `request_sha256` is the digest of the request as it was sent. `deadline` is a time of
    `time.monotonic`, which all processes of a machine share; `timeout` is its length in seconds.
    """

    worker: str
    token: str
    attempt: int
    is_resumed: bool
    request_sha256: str
    deadline: float
    timeout: float
    started: float  # epoch seconds
    has_answer: bool  # whether Celery's backend stores how the job ends
    tensors_sha256: tuple[tuple[str, ...], ...]  # of the LoRAs with a weight, by cell
    provenance: JobProvenance

    @property
    def id(self) -> str:
        """The job's id."""
        return self.provenance.job_id

    @property
    def request(self) -> GenerateRequest:
        """The request, with its LoRAs and embeddings pinned."""
        return self.provenance.request


class DrawnJob(Struct, frozen=True, kw_only=True):
    """What is known of an attempt after its last image, once the base model is restored."""

    loras: tuple[LoraReceipt, ...]
    embeddings: tuple[EmbeddingReceipt, ...]
    timings: dict[str, float]
    base_intact: bool
    base_checked: float
    at: float  # of `time.monotonic`
    relative_norms: tuple[tuple[float | None, ...], ...] = ()  # of the LoRAs, by cell
    recipe_fields: dict[str, Any] = {}
    prompt_receipt: PromptReceipt | None = None
    negative_prompt_receipt: PromptReceipt | None = None
    image_receipt: ImageReceipt | None = None
    mask_receipt: ImageReceipt | None = None


class EndedJob(Struct, frozen=True, kw_only=True):
    """How the attempt has ended, for the parent. `shown` is what Flower shows.

    `left` is the end of an attempt whose job another worker has taken.
    """

    end: Literal["succeeded", "failed", "revoked", "left"]
    shown: str = ""


class NextLora(Struct, frozen=True):
    """A LoRA of a job that waits, and when the job was submitted (epoch seconds)."""

    spec: LoraSpec
    since: float


class _ImageHeader(Struct, frozen=True):
    """What the RGB bytes of an image do not say."""

    width: int
    height: int
    tiled: bool
    batch_size: BatchSize = 1


class SpooledImage(NamedTuple):
    """A drawn image; see `ImageRef` for what is known of it."""

    image: "Image.Image"
    tiled: bool
    batch_size: BatchSize


class Spool:
    """The spool of one worker. Made in the parent, filled by the child, emptied by the sidecar.

    Images are in `memory`, a folder on tmpfs, as long as they have at most `max_bytes` together and
    the file system has room; further images of a job are in `disk`.
    """

    def __init__(
        self,
        memory: Path,
        disk: Path,
        *,
        max_bytes: int,
        wake: Callable[[], None] = lambda: None,
        nearly_drawn: Callable[[], None] = lambda: None,
    ) -> None:
        """Call `wake` whenever there is something for the sidecar.

        `nearly_drawn` is called by the child before the last step of a job.
        """
        self.memory, self.disk, self.max_bytes = memory, disk, max_bytes
        self.wake, self.nearly_drawn = wake, nearly_drawn

    def entries(self) -> list["SpoolEntry"]:
        """Return the jobs in the spool, the oldest first."""
        names = sorted(path.name for path in self.memory.iterdir() if path.name[0] != ".")
        return [SpoolEntry(self.memory / name, self.disk / name) for name in names]

    def entry(self, name: str) -> "SpoolEntry":
        """Return the job in the folder of this name."""
        return SpoolEntry(self.memory / name, self.disk / name)

    @contextmanager
    def open(self, job: SpooledJob) -> Iterator["SpoolWriter"]:
        """Add a job; remove it again if the block ends before `SpoolWriter.close`.

        Raises `StoreFailed` if neither memory nor disk has room.
        """
        name = f"{os.times().elapsed:015.2f}-{uuid.uuid4().hex}"
        draft, entry = self.memory / f".{name}", self.entry(name)
        with _typed():
            draft.mkdir(mode=0o700)
            lock = os.open(draft, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with _typed():
                write_atomically(draft / _JOB, msgspec.json.encode(job))
                draft.rename(entry.folder)
            writer = SpoolWriter(self, entry)
            self.wake()
            yield writer
        except BaseException:  # also a signal's: a job that is not drawn leaves nothing
            shutil.rmtree(draft, ignore_errors=True)
            entry.remove()
            raise
        finally:
            os.close(lock)

    def show_next(self, loras: list[NextLora]) -> None:
        """Write the LoRAs of the next jobs, for the child; raise `OSError`."""
        document = msgspec.json.encode(loras)
        if _read(self.memory / _NEXT) != document:
            write_atomically(self.memory / _NEXT, document)

    def next_loras(self) -> list[NextLora]:
        """Return the LoRAs of the next jobs."""
        data = _read(self.memory / _NEXT)
        return [] if data is None else msgspec.json.decode(data, type=list[NextLora])

    def show_queue_info(self, info: QueueInfo) -> None:
        """Write what this worker serves, for the sidecar."""
        write_atomically(self.memory / _INFO, msgspec.json.encode(info))

    def queue_info(self) -> bytes | None:
        """Return what this worker serves, as JSON; None until its model is loaded."""
        return _read(self.memory / _INFO)

    def require_room(self, size: int) -> None:
        """Raise `OSError` if `size` more bytes do not fit into memory."""
        used = sum(path.stat().st_size for path in self.memory.glob("*/*.rgb"))
        found = os.statvfs(self.memory)
        if used + size > self.max_bytes or size >= found.f_bavail * found.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class SpoolWriter:
    """One job in the spool as the child writes it."""

    def __init__(self, spool: Spool, entry: "SpoolEntry") -> None:
        self._spool, self._count = spool, 0
        self.entry, self.nbytes = entry, 0

    def add(self, image: "Image.Image", *, tiled: bool, batch_size: BatchSize = 1) -> None:
        """Add the next image; raise `StoreFailed` if neither memory nor disk has room."""
        import numpy as np  # the parent and the sidecar need none

        rgb = image if image.mode == "RGB" else image.convert("RGB")
        pixels = np.asarray(rgb).data.cast("B")  # Pillow's own `tobytes` takes 2 ms
        name = f"{self._count}.rgb"
        with _typed():
            try:
                self._spool.require_room(len(pixels))
                (self.entry.folder / name).write_bytes(pixels)
            except OSError:  # memory is full, by other programs too
                (self.entry.folder / name).unlink(missing_ok=True)
                self.entry.spilled.mkdir(mode=0o700, exist_ok=True)
                (self.entry.spilled / name).write_bytes(pixels)
            # last, since it says that the pixels are complete
            header = _ImageHeader(rgb.width, rgb.height, tiled, batch_size)
            path = self.entry.folder / f"{self._count}.json"
            write_atomically(path, msgspec.json.encode(header))
        self._count += 1
        self.nbytes += len(pixels)
        self._spool.wake()

    def add_stored(self, image: ImageRef) -> None:
        """Add the next image, which an earlier attempt has stored."""
        with _typed():
            path = self.entry.folder / f"{self._count}.stored"
            write_atomically(path, msgspec.json.encode(image))
        self._count += 1

    def close(self, drawn: DrawnJob) -> None:
        """Complete the job: from now on the sidecar ends it."""
        with _typed():
            write_atomically(self.entry.folder / _DRAWN, msgspec.json.encode(drawn))
        self._spool.wake()


class SpoolEntry:
    """One job in the spool, as sidecar and parent see it."""

    def __init__(self, folder: Path, spilled: Path) -> None:
        self.folder, self.spilled = folder, spilled

    @property
    def name(self) -> str:
        """Name of the job's folder."""
        return self.folder.name

    def job(self) -> SpooledJob:
        """Return what is known of the attempt; raise `OSError` if it was removed."""
        return msgspec.json.decode((self.folder / _JOB).read_bytes(), type=SpooledJob)

    def drawn(self) -> DrawnJob | None:
        """Return what is known after the last image, None if the job is not drawn yet."""
        data = _read(self.folder / _DRAWN)
        return None if data is None else msgspec.json.decode(data, type=DrawnJob)

    def ended(self) -> EndedJob | None:
        """Return how the attempt has ended, None if it has not."""
        data = _read(self.folder / _ENDED)
        return None if data is None else msgspec.json.decode(data, type=EndedJob)

    def image(self, index: int) -> SpooledImage | ImageRef | None:
        """Return an image, or where it is in the store.

        Returns None if the image is not drawn yet.
        """
        data = _read(self.folder / f"{index}.stored")
        if data is not None:
            return msgspec.json.decode(data, type=ImageRef)
        data = _read(self.folder / f"{index}.json")
        if data is None:
            return None
        from PIL import Image  # the parent, which reads no image, may be without it

        header, name = msgspec.json.decode(data, type=_ImageHeader), f"{index}.rgb"
        pixels = _read(self.folder / name) or (self.spilled / name).read_bytes()
        image = Image.frombytes("RGB", (header.width, header.height), pixels)
        return SpooledImage(image, header.tiled, header.batch_size)

    def is_abandoned(self) -> bool:
        """Return whether the child was killed before the job was drawn."""
        try:
            lock = os.open(self.folder, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        else:
            return not (self.folder / _DRAWN).exists()
        finally:
            os.close(lock)

    def count_try(self) -> int:
        """Count an attempt to end the job; return how many there were, with this one."""
        path = self.folder / _TRIES
        count = 1 + (int(path.read_text()) if path.exists() else 0)
        write_atomically(path, str(count).encode())
        return count

    def end(self, ended: EndedJob) -> None:
        """Record how the attempt has ended."""
        write_atomically(self.folder / _ENDED, msgspec.json.encode(ended))

    def remove(self) -> None:
        """Remove all files."""
        for folder in (self.folder, self.spilled):
            shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


@contextmanager
def _typed() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"the images cannot be passed on: {error.strerror}") from error
