"""The worker's checks of `zlora doctor`: settings, store, device, base model and LoRA cache.

To add a check, write a function that takes the name of the check and the settings, and add it to
`CHECKS`. The command itself, and the checks of broker and queue, are in `zlora.cli.doctor`.
"""

import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

from zlora import config
from zlora.cli.doctor import Check, doubtful, failed, ok, skipped, software
from zlora.errors import CacheFull, InvalidSetting, ModelUnavailable, NotSafetensors
from zlora.lora.key_names import DENOISERS
from zlora.lora.safetensors_header import read_header
from zlora.redaction import without_secrets

from zlora_worker.settings import DEMO_MODEL, Settings

_PACKAGES: Final = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "pillow",
    "boto3",
)
_NEEDED: Final = ("torch", "diffusers", "transformers", "boto3", "ssrfguard")
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_GB: Final = 10**9
_ROOM: Final = 2 * _GB  # of a GPU: to draw an image, beside the weights
# Weights of published models in billions, without what workers leave out; two bytes each.
_PUBLISHED: Final = {
    "stabilityai/stable-diffusion-xl-base-1.0": 3.5,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 1.1,
    "Tongyi-MAI/Z-Image-Turbo": 10.3,
}
_FEWEST: Final = min(_PUBLISHED.values())  # of any model
_COMPONENTS: Final = (*DENOISERS, "text_encoder", "text_encoder_2", "vae")
_VAE_IN_FILE: Final = "first_stage_model."  # prefix of a component that is not in a denoiser's file
_TEXT_OF_SD2: Final = "cond_stage_model.model."  # prefix; the file may be for 512 or 768 pixels


def checks(environ: Mapping[str, str]) -> Iterator[Check]:
    """Make the worker's checks, one after the other; skip them if a package is missing."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        told = f"no worker can run here: {', '.join(missing)} not installed (`.[worker]`)"
        yield skipped("worker", told)
        return
    yield ok("worker: software", software(_PACKAGES))
    try:
        settings = Settings.from_env(environ)
    except InvalidSetting as error:
        advice = f"Correct {error.details['name']}; the table of settings is in the documentation."
        yield failed("worker: settings", error, advice)
        return
    for name, check in CHECKS.items():
        yield check(f"worker: {name}", settings)


def _settings(name: str, settings: Settings) -> Check:
    webhooks = "signed"
    if not settings.webhook_secret:
        webhooks = "not sent, without ZLORA_WEBHOOK_SECRET"
        if config.webhook_secret(settings.home).exists():
            webhooks = "sent by `zlora up` only, which has a secret of its own"
    models = ", ".join(each.name for each in settings.models) or settings.model
    told = f"model {models}, queue {settings.queue}, webhooks {webhooks}"
    return ok(name, told)


def _catalogue(name: str, settings: Settings) -> Check:
    try:
        entries = settings.open_catalogue().entries
    except InvalidSetting as error:
        return failed(name, error, "Correct the file: see docs/catalogue.md.")
    if settings.catalogue_file is None:
        return ok(name, "none (ZLORA_CATALOGUE)")
    pinned = sum(entry.pinned for entry in entries.values())
    served = "no others" if settings.loras == "catalogue" else "others too"
    told = f"{settings.catalogue_file}: {len(entries)} LoRAs, {pinned} pinned; {served} are served"
    return ok(name, told)


def _store(name: str, settings: Settings) -> Check:
    """Write, read and delete an object, as a worker does at its start."""
    from zlora_worker.results.store import open_store

    # The probe logs a warning if the store does not answer, since a worker waits for its store.
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("zlora_worker")
    logger.addHandler(handler)
    try:
        open_store(settings).probe()
    except InvalidSetting as error:
        return failed(name, error, "Check address, credentials and rights (docs/results.md).")
    finally:
        logger.removeHandler(handler)
    if warnings:
        advice = "Check the store: jobs wait for it, and fail if it does not answer for long."
        return doubtful(name, warnings[0], advice)
    return ok(name, f"{without_secrets(settings.store_url)} can be written, read and deleted from")


def _device(name: str, settings: Settings) -> Check:
    try:
        return _torch_device(name, settings)
    except (ImportError, OSError, RuntimeError) as error:  # a missing library, another driver
        broken = ModelUnavailable(f"torch cannot use the device: {str(error)[:200]}")
        advice = "Install torch and a driver for one CUDA version, or set ZLORA_DEVICE=cpu."
        return failed(name, broken, advice)


def _torch_device(name: str, settings: Settings) -> Check:
    import torch

    if _draws_on_cpu(settings):
        told = f"CPU, {torch.get_num_threads()} threads"
        if all(each.model == "demo" for each in _each_model(settings)):
            return ok(name, f"{told}, which is enough for the demo model")
        return doubtful(name, told, "Use a GPU: an image takes many minutes on a CPU.")
    index = count = torch.cuda.device_count()
    if settings.device.startswith("cuda"):
        index = int(settings.device.partition(":")[2] or 0)
    if index >= count:
        missing = ModelUnavailable(f"ZLORA_DEVICE={settings.device}: torch finds {count} GPUs")
        advice = "Set ZLORA_DEVICE to one of them, or install a driver and torch for CUDA."
        return failed(name, missing, advice)
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    told = (
        f"{torch.cuda.get_device_name(index)}, {free / _GB:.1f} of {total / _GB:.1f} GB free, "
        f"capability {major}.{minor}, CUDA {torch.version.cuda}"
    )
    # Bases of one worker have the same layout: one is on the GPU at a time.
    needed = _ROOM + max(_nbytes(each) or 0 for each in _each_model(settings))
    if free < needed:
        advice = (
            f"The base model needs about {needed / _GB:.0f} GB: end other programs on the GPU, "
            "unless they are workers of this project."
        )
        return doubtful(name, told, advice)
    return ok(name, told)


def _draws_on_cpu(settings: Settings) -> bool:
    import torch

    return settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.device_count())


def _each_model(settings: Settings) -> list[Settings]:
    """Return the settings of a worker for each of the base models."""
    return [settings.with_model(chosen) for chosen in settings.models] or [settings]


def _nbytes(settings: Settings) -> int | None:
    """Return the bytes of a base model's weights in memory; None if its files are not here."""
    weights = _weights(settings) or 10**9 * _PUBLISHED.get(settings.model, 0)
    is_wide = settings.dtype == "float32" or (settings.dtype == "auto" and _draws_on_cpu(settings))
    return int(weights) * (4 if is_wide else 2) or None


def _weights(settings: Settings) -> int:
    """Count the numbers in a base model's files by their headers; 0 if they are not here."""
    path = Path(settings.model).expanduser()
    others: list[Path] = []
    try:
        if settings.model == "demo":
            path = DEMO_MODEL
        elif _HUB_ID.fullmatch(settings.model) and not path.exists():
            from huggingface_hub import try_to_load_from_cache

            index = try_to_load_from_cache(
                settings.model, "model_index.json", revision=settings.hub_revision
            )
            path = Path(index).parent if isinstance(index, str) else path
        if not path.is_file():
            return sum(map(_numbers, _weight_files(path)))
        # A file of a denoiser alone needs the other components of a folder.
        if settings.model_config and not any(
            name.startswith(_VAE_IN_FILE) for name in read_header(path).tensors
        ):
            others = [
                file
                for file in _weight_files(Path(settings.model_config).expanduser())
                if file.parent.name not in DENOISERS
            ]
        return sum(map(_numbers, [path, *others]))
    except (NotSafetensors, OSError, ValueError):  # `_model` and the loader say what is wrong
        return 0


def _weight_files(folder: Path) -> list[Path]:
    """Return the files with weights of a folder in diffusers' layout, each component once."""
    found: list[Path] = []
    for component in _COMPONENTS:
        files = [
            file
            for file in (folder / component).glob("*.safetensors")
            if ".non_ema" not in file.name
        ]
        found += [file for file in files if ".fp16" in file.name] or files
    return found


def _numbers(file: Path) -> int:
    return sum(math.prod(tensor.shape) for tensor in read_header(file).tensors.values())


def _host_memory(name: str, settings: Settings) -> Check:
    """Compare what base models take of this machine's memory with what there is."""
    sizes = [_nbytes(each) for each in _each_model(settings)]
    if None in sizes:
        return skipped(name, "the files of a base model are not on this machine yet")
    nbytes = max(size or 0 for size in sizes)
    count = len(settings.models)
    kept = min(count, settings.models_bytes // nbytes)
    # A base without a copy is read beside the copies. On a CPU, the resident base and the place of
    # merged weights are in memory, too.
    needed = (kept + (kept < count) + 2 * _draws_on_cpu(settings)) * nbytes
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    told = f"{needed / _GB:.1f} of {total / _GB:.1f} GB for base models"
    if count:
        told += f": copies of {kept} of {count}, {nbytes / _GB:.1f} GB each"
    if needed > total:
        advice = "Use a machine with more memory"
        if count:
            advice += ", or lower ZLORA_MODELS_BYTES"
        return doubtful(name, told, f"{advice}.")
    if kept < count:
        advice = (
            f"Set ZLORA_MODELS_BYTES to {count * nbytes}: a base model without a copy is read from "
            "disk when a job names it."
        )
        return doubtful(name, told, advice)
    return ok(name, told)


def _model(name: str, settings: Settings) -> Check:
    """Find each of the base models; report the first that is not there."""
    found = [_one_model(name, each) for each in _each_model(settings)]
    told = ok(name, "; ".join(check.told for check in found))
    return next((check for check in found if check.status != "ok"), told)


def _one_model(name: str, settings: Settings) -> Check:
    model, path = settings.model, Path(settings.model).expanduser()
    if model == "demo":
        return ok(name, "demo, which is part of the package")
    if os.path.isfile(path) and not settings.model_config and _needs_config(path):
        told = f"{path} lacks components, or does not say which configuration it needs"
        advice = "Set ZLORA_MODEL_CONFIG to the folder of a whole model of this kind."
        return failed(name, ModelUnavailable(told), advice)
    if os.path.isfile(path) or os.path.isfile(path / "model_index.json"):
        return ok(name, f"{path} exists")
    is_file_name = path.suffix in (".safetensors", ".ckpt")
    if os.path.isdir(path) or is_file_name or not _HUB_ID.fullmatch(model):
        told = f"{model}: no file, no folder with a model_index.json, and not a hub id"
        advice = "Set ZLORA_MODEL to a diffusers folder, a .safetensors file, or a hub id."
        return failed(name, ModelUnavailable(told), advice)
    return _hub_model(name, model, settings.hub_revision)


def _needs_config(file: Path) -> bool:
    """Return whether a worker loads a single file only with ZLORA_MODEL_CONFIG."""
    try:
        names = read_header(file).tensors
    except (NotSafetensors, OSError):  # the loader says what is wrong
        return False
    has_all = any(name.startswith(_VAE_IN_FILE) for name in names)
    return not has_all or any(name.startswith(_TEXT_OF_SD2) for name in names)


def _hub_model(name: str, model: str, revision: str | None) -> Check:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "model_index.json", revision=revision)
    except HFValidationError as error:
        wrong = ModelUnavailable(f"{model}: {error}")
        return failed(name, wrong, "Set ZLORA_MODEL to a hub id or a path.")
    if isinstance(found, str):
        return ok(name, f"{model} is in the hub's cache")
    folder = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(_existing(folder)).free
    told = f"{model} is not in the hub's cache, {folder}, whose disk has {free / _GB:.1f} GB free"
    if constants.HF_HUB_OFFLINE:
        advice = "Unset HF_HUB_OFFLINE, or copy the model to this machine."
        return failed(name, ModelUnavailable(told), advice)
    needed = 2 * _PUBLISHED.get(model, _FEWEST)
    if free < needed * _GB:
        advice = f"Free {needed:.0f} GB of that disk, or set HF_HOME."
        return failed(name, ModelUnavailable(told), advice)
    return doubtful(name, told, "The first start downloads the model, within ZLORA_LOAD_TIMEOUT.")


def _cache(name: str, settings: Settings) -> Check:
    folder, disk = settings.cache_folder, _existing(settings.cache_folder)
    try:
        _try_to_write(folder)
    except OSError as error:
        wrong = InvalidSetting(f"{folder} cannot be written to: {error.strerror}")
        advice = (
            f"Make {folder} writable for the worker, or set ZLORA_LORA_CACHE to another folder."
        )
        return failed(name, wrong, advice)
    free, reserve = shutil.disk_usage(disk).free, settings.lora_free_bytes
    told = f"{folder}: {free / _GB:.1f} GB of the disk are free, {reserve / _GB:.1f} stay free"
    if free <= reserve:
        advice = "Free space on that disk, or set ZLORA_LORA_CACHE to another."
        return failed(name, CacheFull(told), advice)
    if free - reserve < settings.lora_max_bytes:
        advice = "Free space on that disk: the largest LoRA that is allowed does not fit."
        return doubtful(name, told, advice)
    return ok(name, told)


def _try_to_write(folder: Path) -> None:
    """Raise `OSError` if no file can be written to the folder; leave nothing that was created."""
    created = list(takewhile(lambda path: not os.path.lexists(path), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    finally:
        for path in created:
            with suppress(OSError):
                path.rmdir()


def _existing(path: Path) -> Path:
    """Return the path, or its first parent that exists."""
    return next(each for each in (path, *path.parents) if os.path.exists(each))


# The worker's checks by name, in order.
CHECKS: Final[dict[str, Callable[[str, Settings], Check]]] = {
    "settings": _settings,
    "store": _store,
    "device": _device,
    "model": _model,
    "host memory": _host_memory,
    "LoRA cache": _cache,
    "catalogue": _catalogue,
}
