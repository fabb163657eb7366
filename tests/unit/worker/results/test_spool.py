"""The spool: images in memory, then on disk, and nothing of a job that was not drawn."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from PIL import Image
from support.fakes import MemoryStore, a_request, job_provenance
from zlora.errors import StoreFailed
from zlora_worker.results.finish import Abandoned, finish
from zlora_worker.results.spool import DrawnJob, EndedJob, Spool, SpooledImage, SpooledJob

DRAWN = DrawnJob(loras=(), embeddings=(), timings={}, base_intact=True, base_checked=1.0, at=0.0)


def a_job(num_images: int = 2) -> SpooledJob:
    return SpooledJob(
        worker="w",
        token="7",
        attempt=1,
        is_resumed=False,
        request_sha256="d",
        deadline=1e12,
        timeout=1e12,
        started=0.0,
        has_answer=True,
        tensors_sha256=((),),
        provenance=job_provenance(a_request(num_images=num_images)),
    )


def an_image(shade: int) -> Image.Image:
    return Image.new("RGB", (8, 8), (shade, 0, 0))


@pytest.fixture
def make_spool(tmp_path: Path) -> Callable[..., Spool]:
    def make(**options: Any) -> Spool:
        for name in ("memory", "disk"):
            (tmp_path / name).mkdir()
        return Spool(tmp_path / "memory", tmp_path / "disk", **({"max_bytes": 10**6} | options))

    return make


def test_images_beyond_the_bound_are_on_disk_and_all_are_read_back(
    make_spool: Callable[..., Spool],
) -> None:
    spool = make_spool(max_bytes=300)
    with spool.open(a_job()) as writer:
        for index in range(2):
            writer.add(an_image(index), tiled=index == 1, batch_size=2)
        writer.close(DRAWN)
    (entry,) = spool.entries()

    assert len(list(spool.memory.rglob("*.rgb"))) == len(list(spool.disk.rglob("*.rgb"))) == 1
    assert entry.job() == a_job()
    assert entry.drawn() == DRAWN
    for index in range(2):
        found = entry.image(index)
        assert isinstance(found, SpooledImage)
        assert found.image.getpixel((0, 0)) == (index, 0, 0)
        assert (found.tiled, found.batch_size) == (index == 1, 2)
    entry.remove()
    assert list(spool.memory.iterdir()) == list(spool.disk.iterdir()) == []


def test_full_disk_is_a_failure_of_the_store_and_leaves_nothing(
    make_spool: Callable[..., Spool], monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = make_spool()

    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StoreFailed, match="No space left"), spool.open(a_job()) as writer:  # noqa: PT012
        monkeypatch.setattr(Path, "write_bytes", fail)
        writer.add(an_image(0), tiled=False)

    assert list(spool.memory.iterdir()) == []


def test_job_whose_child_ended_is_abandoned_and_a_drawn_one_is_not(
    make_spool: Callable[..., Spool],
) -> None:
    spool = make_spool()
    with pytest.raises(RuntimeError), spool.open(a_job()) as writer:  # noqa: PT012
        writer.add(an_image(0), tiled=False)
        (entry,) = spool.entries()
        assert not entry.is_abandoned()
        raise RuntimeError
    with pytest.raises((Abandoned, FileNotFoundError)):
        finish(MemoryStore(), entry)

    with spool.open(a_job(1)) as writer:
        writer.add(an_image(0), tiled=False)
        writer.close(DRAWN)
    (drawn,) = spool.entries()
    assert not drawn.is_abandoned()

    os.unlink(drawn.folder / "drawn.json")  # as of a child that was killed before the end
    with pytest.raises(Abandoned):
        finish(MemoryStore(), drawn)


def test_end_and_tries_are_for_the_next_process(make_spool: Callable[..., Spool]) -> None:
    spool = make_spool()
    with spool.open(a_job()) as writer:
        writer.close(DRAWN)
    (entry,) = spool.entries()

    assert [entry.count_try(), entry.count_try()] == [1, 2]
    assert entry.ended() is None
    entry.end(EndedJob(end="succeeded", shown="1 image"))
    assert spool.entry(entry.name).ended() == EndedJob(end="succeeded", shown="1 image")
