"""Factories of the tiny model, of LoRA files of a few KB, and of a store in memory."""

import shutil
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from threading import Event
from typing import Any, Final, NamedTuple, TypeAlias

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_folder import tiny_lora, tiny_model
from torch import Tensor
from zlora.errors import StoreFailed
from zlora.schema import GenerateRequest
from zlora_worker.model import loader
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.results.provenance import ImageProvenance, JobProvenance
from zlora_worker.results.store import Store
from zlora_worker.results.urls import ImageUrls
from zlora_worker.settings import Settings

Tensors: TypeAlias = dict[str, Tensor]

PARTS: Final = ("unet", "text_encoder", "text_encoder_2", "vae")  # all components with weights
# A worker's variables for each mode of the patch and each device; GPUs only if there is one.
PLACES: Final = tuple(
    pytest.param({"ZLORA_PATCH": mode, "ZLORA_DEVICE": device}, id=f"{mode}-{device}", marks=marks)
    for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
    for mode in ("shadow", "inplace")
)


class Target(NamedTuple):
    """Linear layer of the tiny model in two spellings; its weight is `rows` x `columns`."""

    component: str
    module: str
    kohya: str
    rows: int
    columns: int


_BLOCK = (
    "down_blocks.1.attentions.0.transformer_blocks.0.",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_",
)
_LAYER = "text_model.encoder.layers.0."
UNET: Final = tuple(
    Target("unet", _BLOCK[0] + name, _BLOCK[1] + name.replace(".", "_"), rows, columns)
    for name, rows, columns in (
        ("attn1.to_q", 32, 32),
        ("attn2.to_k", 32, 80),
        ("ff.net.0.proj", 256, 32),
    )
)
TEXT: Final = tuple(
    Target(component, _LAYER + name, f"{te}_{_LAYER}{name}".replace(".", "_"), rows, width)
    for component, te, width in (
        ("text_encoder", "lora_te1", 32),
        ("text_encoder_2", "lora_te2", 48),
    )
    for name, rows in (
        ("self_attn.q_proj", width),
        ("self_attn.out_proj", width),
        ("mlp.fc1", 2 * width),
    )
)

# diffusers warns about its own code with each image; the tests compare the images.
upcast_vae: Final = pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning")


def settings(home: Path, **variables: str) -> Settings:
    """Return the settings of a worker on the CPU with the tiny model of a data folder."""
    defaults = {
        "ZLORA_HOME": str(home),
        "ZLORA_MODEL": str(tiny_model(home)),
        "ZLORA_DEVICE": "cpu",
    }
    return Settings.from_env(defaults | variables)


def load_pipeline(home: Path, **variables: str) -> Pipeline:
    """Load a pipeline as a worker does, with one thread: images depend on their number."""
    torch.set_num_threads(1)
    return loader.load(settings(home, **variables))


def a_request(**fields: Any) -> GenerateRequest:
    """Return a small job: native size and one step, unless `fields` differ."""
    small: dict[str, Any] = {"prompt": "a city at night", "num_inference_steps": 1}
    return GenerateRequest(**small | fields)


_PROVENANCE: Final[dict[str, Any]] = {
    "job_id": "job",
    "seed": 7,
    "model": "models/some.safetensors",
    "base_sha256": "b" * 64,
    "scheduler": "EulerDiscreteScheduler",
    "device": "cpu",
    "dtype": "float32",
    "versions": {"z-image-lora": "1.2"},
}


def job_provenance(request: GenerateRequest, **fields: Any) -> JobProvenance:
    """Return the provenance of a made-up job."""
    return JobProvenance(request=request, **_PROVENANCE | fields)


def image_provenance(request: GenerateRequest, **fields: Any) -> ImageProvenance:
    """Return the provenance of a made-up image."""
    size = {"width": 64, "height": 72}
    return ImageProvenance(request=request, **_PROVENANCE | size | fields)


def pixels(model: Pipeline, *, seed: int = 7, **fields: Any) -> bytes:
    """Draw the image of a small job and return its RGB bytes."""
    return model.draw(a_request(**fields), [seed], lambda _step: None)[0].tobytes()


def difference(one: bytes, other: bytes) -> int:
    """Return the greatest difference between two images of equal size, in steps of 1/255."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def require_same(image: Tensor, expected: Tensor) -> None:
    """Require an image in fp32 that is not flat, and of which no value differs."""
    assert image.dtype is torch.float32
    assert float((image - expected).abs().max()) == 0
    assert len(set(image.flatten().tolist())) > 100


def weights(model: Pipeline, component: str) -> Tensors:
    """Return the tensors of a component, not copies: a test may damage them."""
    tensors: Tensors = getattr(model.pipeline, component).state_dict()
    return tensors


def copy_model(home: Path, target: Path) -> Path:
    """Copy the folder of the tiny model, so that a test can damage it."""
    shutil.copytree(tiny_model(home), target)
    return target


def write(path: Path, tensors: Tensors) -> Path:
    """Write a safetensors file to `path` and return `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: tensor.clone().contiguous() for key, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )
    return path


def lora_tensors(home: Path, name: str) -> Tensors:
    """Read the tensors of one of the tiny LoRAs."""
    tensors: Tensors = load_file(tiny_lora(home, name))
    return tensors


def peft_lora(targets: Sequence[Target] = UNET, *, ranks: Sequence[int] = (2,)) -> Tensors:
    """Return a random LoRA in peft's spelling; the ranks rotate."""
    return {
        f"{target.component}.{target.module}.lora_{factor}.weight": tensor
        for target, pair in _factors(targets, ranks)
        for factor, tensor in zip("AB", pair, strict=True)
    }


def kohya_lora(targets: Sequence[Target] = UNET) -> Tensors:
    """Return the same LoRA in kohya's spelling: alpha is half the rank, up factors are doubled."""
    tensors: Tensors = {}
    for target, (down, up) in _factors(targets, (2,)):
        tensors[f"{target.kohya}.alpha"] = torch.tensor(len(down) / 2)
        tensors[f"{target.kohya}.lora_down.weight"] = down
        tensors[f"{target.kohya}.lora_up.weight"] = 2 * up
    return tensors


def _factors(
    targets: Sequence[Target], ranks: Sequence[int]
) -> Iterator[tuple[Target, tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(20260101)
    for target, rank in zip(targets, cycle(ranks), strict=False):
        down = torch.randn(rank, target.columns, generator=generator)
        yield target, (down, torch.randn(target.rows, rank, generator=generator))


def links(store: Store) -> ImageUrls:
    """Return the image URLs of a worker with default settings."""
    return ImageUrls(store, Settings.from_env({}))


class MemoryStore:
    """Store in memory with room for so many objects, in the order of arrival."""

    own_urls: Final = "file"

    def __init__(self, room: int = 100) -> None:
        self.objects: dict[str, tuple[bytes, str]] = {}
        self._room = room

    def put_new(
        self, key: str, data: bytes, content_type: str, *, stop: Event | None = None
    ) -> bool:
        """Keep the object if the key is absent; raise `StoreFailed` if the store is full."""
        if key in self.objects:
            return False
        if len(self.objects) >= self._room:
            raise StoreFailed(f"{key}: the store is full")
        self.objects[key] = (data, content_type)
        return True

    def get(self, key: str) -> bytes | None:
        """Return the object, or None."""
        return self.objects[key][0] if key in self.objects else None

    def delete(self, key: str) -> None:
        """Delete the object."""
        self.objects.pop(key, None)

    def probe(self) -> None:
        """Do nothing: a store in memory always works."""

    def name(self, key: str) -> str:
        """Return the key."""
        return key

    def url(self, key: str, seconds: int) -> str:
        """Return a URL that cannot be opened."""
        return f"memory:///{key}"
