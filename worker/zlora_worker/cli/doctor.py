"""What `zlora doctor` looks at from a worker's side: settings, store, device, base model, LoRA cache."""

import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryFile
from typing import Final

from zlora import config
from zlora.cli.doctor_checks import Check, doubtful, failed, ok, skipped, software
from zlora.errors import CacheFull, InvalidSetting, ModelUnavailable
from zlora.redaction import without_secrets

from zlora_worker.settings import Settings

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
_SDXL_MEMORY: Final = 9 * _GB  # of a GPU: the base in fp16, and room to draw
_SDXL_DOWNLOAD: Final = 7 * _GB  # SDXL's files in fp16, as the hub has them


def checks(environ: Mapping[str, str]) -> Iterator[Check]:
    """Each as soon as it is made. A producer's machine, which has not the packages, has one that is skipped."""
    if lacking := [name for name in _NEEDED if find_spec(name) is None]:
        yield skipped(
            "worker", f"no worker can run here: {', '.join(lacking)} not installed (`.[worker]`)"
        )
        return
    yield ok("worker: software", software(_PACKAGES))
    try:
        settings = Settings.from_env(environ)
    except InvalidSetting as error:
        yield failed(
            "worker: settings", error, f"Set {error.details['name']} as the README's table has it."
        )
        return
    webhooks = "signed" if settings.webhook_secret else "not sent, without ZLORA_WEBHOOK_SECRET"
    if not settings.webhook_secret and config.webhook_secret(settings.home).exists():
        webhooks = (
            "signed by `zlora up`, which has a secret of its own, and sent by no other worker here"
        )
    yield ok(
        "worker: settings", f"model {settings.model}, queue {settings.queue}, webhooks {webhooks}"
    )
    for name, check in _CHECKS.items():
        yield check(f"worker: {name}", settings)


def _store(name: str, settings: Settings) -> Check:
    """As a worker's start does it: an object is created, read and deleted."""
    from zlora_worker.results.store import open_store

    with _heard("zlora_worker") as warnings:
        try:
            open_store(settings).probe()
        except InvalidSetting as error:
            return failed(name, error, "Look at address, credentials and rights (docs/results.md).")
    if warnings:
        return doubtful(
            name, warnings[0], "Look at the store: jobs wait for it, and fail where it stays away."
        )
    return ok(name, f"{without_secrets(settings.store_url)} takes, gives and deletes")


@contextmanager
def _heard(logger: str) -> Iterator[list[str]]:
    """What is warned of inside."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    source = logging.getLogger(logger)
    source.addHandler(handler)
    try:
        yield said
    finally:
        source.removeHandler(handler)


def _device(name: str, settings: Settings) -> Check:
    try:
        return _found_device(name, settings)
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # a library that is not there, a driver of another version
        broken = ModelUnavailable(f"torch cannot use it: {str(error)[:200]}")
        return failed(
            name,
            broken,
            "Install torch and a driver for one CUDA version, or set ZLORA_DEVICE=cpu.",
        )


def _found_device(name: str, settings: Settings) -> Check:
    import torch

    count = torch.cuda.device_count()
    if settings.device == "cpu" or (settings.device == "auto" and not count):
        told = f"draws on the CPU, with {torch.get_num_threads()} threads"
        if settings.model == "demo":
            return ok(name, f"{told}, which is enough for the demo model")
        return doubtful(
            name,
            told,
            "Use a GPU: a picture of SDXL takes many minutes on a CPU, and seconds there.",
        )
    index = (
        int(settings.device.partition(":")[2] or 0) if settings.device.startswith("cuda") else count
    )
    if index >= count:
        missing = ModelUnavailable(f"ZLORA_DEVICE={settings.device}: torch sees {count} GPUs")
        return failed(
            name, missing, "Set ZLORA_DEVICE to one of them, or install driver and torch for CUDA."
        )
    return _gpu(name, index, demo=settings.model == "demo")


def _gpu(name: str, index: int, *, demo: bool) -> Check:
    import torch

    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    told = (
        f"{torch.cuda.get_device_name(index)}, {free / _GB:.1f} of {total / _GB:.1f} GB free, "
        f"capability {major}.{minor}, CUDA {torch.version.cuda}"
    )
    if free < _SDXL_MEMORY and not demo:
        advice = f"End what else uses the GPU, unless that is a worker: SDXL needs some {_SDXL_MEMORY // _GB} GB."
        return doubtful(name, told, advice)
    return ok(name, told)


def _model(name: str, settings: Settings) -> Check:
    named, path = settings.model, Path(settings.model).expanduser()
    if named == "demo":
        return ok(name, "demo, which is part of the package")
    if os.path.isfile(path) or os.path.isfile(path / "model_index.json"):
        return ok(name, f"{path} is there")
    if (
        os.path.isdir(path)
        or not _HUB_ID.fullmatch(named)
        or path.suffix in (".safetensors", ".ckpt")
    ):
        absent = ModelUnavailable(
            f"{named}: no file, no folder with a model_index.json, and no hub id"
        )
        return failed(
            name, absent, "Set ZLORA_MODEL to a diffusers folder, a .safetensors file, or a hub id."
        )
    return _hub_model(name, named)


def _hub_model(name: str, repository: str) -> Check:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, "model_index.json")
    except HFValidationError as error:
        return failed(
            name,
            ModelUnavailable(f"{repository}: {error}"),
            "Set ZLORA_MODEL to a hub id or a path.",
        )
    if isinstance(found, str):
        return ok(name, f"{repository} is in the hub's cache")
    folder = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(_existing(folder)).free
    told = (
        f"{repository} is not in the hub's cache, {folder}, whose disk has {free / _GB:.1f} GB free"
    )
    if constants.HF_HUB_OFFLINE:
        return failed(
            name, ModelUnavailable(told), "Unset HF_HUB_OFFLINE, or bring the model here."
        )
    if free < _SDXL_DOWNLOAD:
        return failed(
            name,
            ModelUnavailable(told),
            f"Make {_SDXL_DOWNLOAD // _GB} GB of room, or set HF_HOME.",
        )
    return doubtful(name, told, "The first start downloads it, within ZLORA_LOAD_TIMEOUT.")


def _cache(name: str, settings: Settings) -> Check:
    folder, there = settings.cache_folder, _existing(settings.cache_folder)
    try:
        _try(folder)
    except OSError as error:
        wrong = InvalidSetting(f"{folder} cannot be written to: {error.strerror}")
        return failed(
            name,
            wrong,
            f"Make {folder} for the worker's user, or set ZLORA_LORA_CACHE to a folder of theirs.",
        )
    free, floor = shutil.disk_usage(there).free, settings.lora_free_bytes
    told = f"{folder}: {free / _GB:.1f} GB of the disk are free, {floor / _GB:.1f} stay free"
    if free <= floor:
        return failed(
            name, CacheFull(told), "Make room on that disk, or set ZLORA_LORA_CACHE to another."
        )
    if free - floor < settings.lora_max_bytes:
        return doubtful(
            name, told, "Make room on that disk: the greatest LoRA that is allowed does not fit."
        )
    return ok(name, told)


def _try(folder: Path) -> None:
    """Whether files can be made in it; what was made for that is gone again."""
    made = list(takewhile(lambda each: not os.path.lexists(each), (folder, *folder.parents)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    finally:
        for each in made:
            with suppress(OSError):  # where it could not be made, or is another's already
                each.rmdir()


def _existing(path: Path) -> Path:
    """The path, or the first above it that is there."""
    return next(each for each in (path, *path.parents) if os.path.exists(each))


_CHECKS: Final[dict[str, Callable[[str, Settings], Check]]] = {
    "store": _store,
    "device": _device,
    "model": _model,
    "LoRA cache": _cache,
}
