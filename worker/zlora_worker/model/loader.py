"""The base model from where `ZLORA_MODEL` points: a hub id, a diffusers folder, a single file, or `demo`."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers import CLIPTokenizer
from zlora.errors import ModelUnavailable, NotSafetensors
from zlora.lora.safetensors_header import read_header

from zlora_worker.model.pipeline import COMPONENTS, Pipeline
from zlora_worker.settings import DEMO_MODEL, Settings

SDXL_CONFIG: Final = Path(__file__).with_name(
    "sdxl"
)  # SDXL's published configuration and CLIP's vocabulary
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_MARKERS: Final = {  # one name of each component in the original layout
    "unet": "model.diffusion_model.label_emb.0.0.weight",
    "text_encoder": "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight",
    "text_encoder_2": "conditioner.embedders.1.model.positional_embedding",
    "vae": "first_stage_model.decoder.conv_in.weight",
}
_NO_VARIANT: Final = "variant"  # in the message of the ValueError that diffusers raises for a repository without fp16 files
# What the loaders raise for files that are missing, damaged or of another model.
_LOAD_ERRORS: Final = (
    AttributeError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


def load(settings: Settings) -> Pipeline:
    """The engine with its base resident; raises `ModelUnavailable` with one line for people."""
    _quieten()
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, device)
    try:
        pipeline = _pipeline(settings, dtype)
        if settings.vae:
            pipeline.vae = AutoencoderKL.from_pretrained(
                settings.vae, dtype=dtype, use_safetensors=True
            )
            _require_whole(pipeline, settings.vae)
    except _LOAD_ERRORS as error:
        raise ModelUnavailable(f"{settings.model} cannot be loaded: {_short(error)}") from error
    if not settings.vae:
        # SDXL's own VAE overflows in fp16 and draws black: decode in fp32, whatever a copy's configuration says.
        pipeline.vae.register_to_config(force_upcast=True)
    return Pipeline(
        pipeline,
        name=_name(settings.model),
        device=device,
        patch_mode=settings.patch,
        check_all=settings.base_check == "all",
        file_sha256=_file_sha256(Path(settings.model).expanduser()),
    )


def _name(model: str) -> str:
    """As results and pictures tell it to everybody: of a path on this machine only the last part."""
    path = Path(model).expanduser()
    return Path(os.path.abspath(path)).name if path.exists() and model != "demo" else model


def _file_sha256(path: Path) -> str | None:
    """By this sites know a checkpoint; a folder has no such name."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pipeline(settings: Settings, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    named, path = settings.model, Path(settings.model).expanduser()
    if named == "demo":
        return _from_folder(DEMO_MODEL, dtype)
    if path.is_file():
        return _from_single_file(path, settings.model_config, dtype)
    if path.is_dir():
        return _from_folder(path, dtype)
    if not _HUB_ID.fullmatch(named) or path.suffix in (".safetensors", ".ckpt"):
        raise ModelUnavailable(
            f"{named}: no such file or folder, and not a hub id such as owner/name"
        )
    return _from_hub(named, dtype)


def _from_folder(folder: Path, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    if not (folder / "model_index.json").is_file():
        raise ModelUnavailable(
            f"{folder} has no model_index.json: not a pipeline in diffusers' layout"
        )
    for name in ("tokenizer", "tokenizer_2"):
        _require_vocabulary(folder / name)
    halves = dtype is torch.float16 and any(folder.glob("unet/*.fp16.*safetensors*"))
    pipeline: StableDiffusionXLPipeline = StableDiffusionXLPipeline.from_pretrained(
        str(folder),
        dtype=dtype,
        variant="fp16" if halves else None,
        local_files_only=True,
        use_safetensors=True,
        add_watermarker=False,
    )
    _require_whole(pipeline, str(folder))
    _require_text_weights(folder, pipeline)
    return pipeline


def _from_hub(name: str, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """Download what is not in the hub's cache, then load from that folder."""
    if dtype is torch.float16:
        try:
            return _from_folder(_download(name, variant="fp16"), dtype)
        except ValueError as error:
            if _NO_VARIANT not in str(error):
                raise
    return _from_folder(_download(name, variant=None), dtype)


def _download(name: str, *, variant: str | None) -> Path:
    return Path(StableDiffusionXLPipeline.download(name, variant=variant, use_safetensors=True))


def _require_whole(pipeline: StableDiffusionXLPipeline, name: str) -> None:
    """Loaders leave out what they do not find: a component, or single weights of one."""
    for component in COMPONENTS:
        module = getattr(pipeline, component, None)
        if module is None:
            raise ModelUnavailable(f"{name} has no {component}: only SDXL is served")
        if hollow := [weight for weight, tensor in module.named_parameters() if tensor.is_meta]:
            raise ModelUnavailable(
                f"{name} lacks {len(hollow)} weights of {component}, such as {hollow[0]}"
            )


def _require_text_weights(folder: Path, pipeline: StableDiffusionXLPipeline) -> None:
    """transformers fills what a file lacks with random numbers. Its names may have lost a prefix since the file."""
    for component in ("text_encoder", "text_encoder_2"):
        files = [read_header(path).tensors for path in (folder / component).glob("*.safetensors")]
        stored = {
            key.split(".", start)[-1] for tensors in files for key in tensors for start in range(3)
        }
        lacking = [
            name
            for name, _ in getattr(pipeline, component).named_parameters()
            if not _stored(name, stored)
        ]
        if lacking:
            raise ModelUnavailable(
                f"{folder} lacks {len(lacking)} weights of {component}, such as {lacking[0]}"
            )


def _stored(name: str, stored: set[str]) -> bool:
    return name in stored or name.removeprefix("text_model.") in stored


def _from_single_file(path: Path, config: str, dtype: torch.dtype) -> StableDiffusionXLPipeline:
    """An SDXL checkpoint in the original layout; what it lacks comes from files on this machine, never from the hub."""
    if path.suffix != ".safetensors":
        raise ModelUnavailable(
            f"{path}: only .safetensors is read, since other checkpoints can run code"
        )
    folder = Path(config).expanduser() if config else SDXL_CONFIG
    _require_sdxl(path)
    pipeline: StableDiffusionXLPipeline = StableDiffusionXLPipeline.from_single_file(
        str(path),
        config=str(folder),
        local_files_only=True,
        dtype=dtype,
        tokenizer=_tokenizer(folder, "tokenizer"),
        tokenizer_2=_tokenizer(folder, "tokenizer_2"),
        add_watermarker=False,
    )
    _require_whole(pipeline, str(path))
    return pipeline


def _require_sdxl(path: Path) -> None:
    """Tell from the names alone what diffusers would tell by a long error, or not at all."""
    try:
        tensors = read_header(path).tensors
    except NotSafetensors as error:
        raise ModelUnavailable(f"{path}: {error}") from None
    lacking = [component for component, name in _MARKERS.items() if name not in tensors]
    if lacking and any("lora" in name for name in tensors):
        raise ModelUnavailable(f"{path} is a LoRA, not a checkpoint")
    if lacking:
        raise ModelUnavailable(f"{path} is not an SDXL checkpoint: it lacks {', '.join(lacking)}")
    if "v_pred" in tensors:
        raise ModelUnavailable(
            f"{path} predicts v: give it as a diffusers folder, whose scheduler says so"
        )


def _tokenizer(folder: Path, name: str) -> CLIPTokenizer:
    """The configuration's tokenizer; one vocabulary serves both in SDXL, where the second pads with `!`."""
    options: dict[str, Any] = {}
    if name == "tokenizer_2" and not (folder / name).is_dir():
        name, options = "tokenizer", {"pad_token": "!"}
    _require_vocabulary(folder / name)
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(
        folder / name, local_files_only=True, **options
    )
    return tokenizer


def _require_vocabulary(folder: Path) -> None:
    """Without one, transformers would make a tokenizer of three tokens."""
    if not any((folder / file).is_file() for file in ("vocab.json", "tokenizer.json")):
        raise ModelUnavailable(
            f"{folder} has no vocabulary: vocab.json with merges.txt, or tokenizer.json"
        )


def _device(name: str) -> torch.device:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name == "auto":
        return torch.device("cuda" if gpus else "cpu")
    if name not in ("cpu", *gpus, *(["cuda"] if gpus else [])):
        raise ModelUnavailable(f"ZLORA_DEVICE={name}: this machine has {', '.join(['cpu', *gpus])}")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _quieten() -> None:
    """No progress bars in a log; and what the libraries warn of, this package refuses with names."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers.logging.disable_progress_bar()


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
