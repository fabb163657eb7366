"""Fixtures of the worker's tests: a tiny model, and a child that draws with it."""

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from support.tiny_folder import tiny_of
from zlora.schema import Asset

if TYPE_CHECKING:  # imports torch, which takes seconds: half of these files draw nothing
    from support.fakes import MemoryStore
    from torch import Tensor
    from zlora_worker.child import Child
    from zlora_worker.model.pipeline import Pipeline

    Loaded = tuple[Pipeline, bytes]  # a model, and the pixels of its first image

_SIZE: Final = {"width": 64, "height": 64}


@pytest.fixture(scope="session")
def loaded(model_home: Path) -> Callable[[str], "Loaded"]:
    """Return a function that loads a family's tiny model, once for all files of this process."""
    from support.fakes import load_pipeline, pixels

    @cache
    def load(family: str) -> "Loaded":
        model = load_pipeline(model_home, ZLORA_MODEL=str(tiny_of(model_home, family)))
        return model, pixels(model, **_SIZE)

    return load


@pytest.fixture(scope="module")
def base_family(request: pytest.FixtureRequest) -> str:
    """Family of the tiny model: SDXL, unless a file or the parameters of a test say otherwise."""
    name: str = getattr(request, "param", "SDXL")
    return name


@pytest.fixture(scope="module")
def model(loaded: Callable[[str], "Loaded"], base_family: str) -> Iterator["Pipeline"]:
    """Lend the tiny model to the tests of a file, which must leave it as it was."""
    from support.fakes import pixels

    model, first = loaded(base_family)
    yield model
    model.check()
    assert pixels(model, **_SIZE) == first


@pytest.fixture
def plain(loaded: Callable[[str], "Loaded"], base_family: str) -> bytes:
    """Pixels of a small job, before any test has used the model."""
    return loaded(base_family)[1]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> "list[Tensor]":
    """Return the drawn images before they are rounded to bytes."""
    from zlora_worker.model import vae

    found: list[Tensor] = []
    convert = vae.rgb

    def seen_and_converted(image: "Tensor") -> "Tensor":
        found.append(image)
        return convert(image)

    monkeypatch.setattr(vae, "rgb", seen_and_converted)
    return found


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
    """Return a function that puts a file in the cache of the child, and returns its address."""
    from support.jobs import put_in_cache

    return partial(put_in_cache, child)
