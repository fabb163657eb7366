"""Fixtures of the worker's tests: the tiny model, and a child that draws with it."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from zlora.schema import Asset

if TYPE_CHECKING:  # imports torch, which takes seconds: half of these files draw nothing
    from support.fakes import MemoryStore
    from zlora_worker.child import Child
    from zlora_worker.model.pipeline import Pipeline


@pytest.fixture(scope="session")
def shared(model_home: Path) -> tuple["Pipeline", bytes]:
    """Load the tiny model once for all files of this process, and draw its first image."""
    from support.fakes import load_pipeline, pixels

    model = load_pipeline(model_home)
    return model, pixels(model)


@pytest.fixture(scope="module")
def model(shared: tuple["Pipeline", bytes]) -> Iterator["Pipeline"]:
    """Lend the tiny model to the tests of a file, which must leave it as it was."""
    from support.fakes import pixels

    model, first = shared
    yield model
    model.check()
    assert pixels(model) == first


@pytest.fixture
def plain(shared: tuple["Pipeline", bytes]) -> bytes:
    """Pixels of a small job, before any test has used the model."""
    return shared[1]


@pytest.fixture
def store() -> "MemoryStore":
    from support.fakes import MemoryStore

    return MemoryStore()


@pytest.fixture
def child(model: "Pipeline", store: "MemoryStore", model_home: Path, tmp_path: Path) -> "Child":
    """Return a child with the model of the file, that store, and an empty cache."""
    from support.fakes import settings
    from support.jobs import lora_cache, make_child

    return make_child(model, store, settings(model_home, **lora_cache(tmp_path / "loras")))


@pytest.fixture
def cached(child: "Child") -> Callable[..., Asset]:
    """Return a function that puts a file in the cache; its address has a host that does not exist.

    So a job that names the file is drawn from the cache, or not at all.
    """

    def put(data: bytes, *, name: str = "a.png") -> Asset:
        digest = hashlib.sha256(data).hexdigest()
        child.lora_files.file(digest).write_bytes(data)
        return Asset(url=f"https://user:pa55@files.invalid/{name}?token=s3cret", sha256=digest)

    return put
