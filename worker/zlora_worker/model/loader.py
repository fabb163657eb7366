"""Loading of the base model: a hub id, a diffusers folder, a single file, or `demo`."""

import json
import logging
import os
import re
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self

import torch
import transformers
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from transformers import CLIPTokenizer
from zlora.errors import ModelUnavailable, NotSafetensors
from zlora.lora import base_model
from zlora.lora.key_names import FACTORS, other_file, parse_key
from zlora.lora.safetensors_header import TensorInfo, read_header
from zlora.schedulers import of_class

from zlora_worker.lora.key_map import KeyMap
from zlora_worker.lora.tensor_file import FLOATS
from zlora_worker.model.base import BaseModel
from zlora_worker.model.digests import FileDigest, ModelDigests
from zlora_worker.model.families.sdxl import SDXL
from zlora_worker.model.families.stable_diffusion import SD1, SD2
from zlora_worker.model.families.z_image import Z_IMAGE
from zlora_worker.model.family import Family
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.settings import DEMO_MODEL, Settings

_FAMILIES: Final = (SDXL, SD1, SD2, Z_IMAGE)
_INDEX: Final = "model_index.json"
# Prefix of all names in single files of some tools, which others leave out.
_FILE_PREFIX: Final = "model.diffusion_model."
# Ends of names of what quantised weights are multiplied by: ComfyUI's, and those of bitsandbytes.
_SCALES: Final = re.compile(
    r"\.(?:scale_weight|weight_scale\w*|comfy_quant|absmax|quant_state\..*)$"
)
# Tensors of single files that diffusers' classes leave out, since no image depends on them.
_UNREAD: Final = ("norm_final.weight",)
_COMMIT: Final = re.compile("[0-9a-f]{40}")
_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
# Word in the ValueError that diffusers raises for a repository without fp16 files.
_NO_VARIANT: Final = "variant"
# Errors that the loaders raise for files that are missing, damaged or of another model.
_LOAD_ERRORS: Final = (
    AttributeError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    SingleFileComponentError,
    TypeError,
    ValueError,
)
_MESSAGE: Final = 300  # characters of a library's error that are shown
_FOLDERS: Final = re.compile(r"(?<![\w:/])(?:/[^/\s]+)+/")  # of an absolute path, not of an address

logger = logging.getLogger(__name__)


def load(settings: Settings) -> Pipeline:
    """Load the base model; raise `ModelUnavailable`, with a message of one line, if it fails.

    The data folder keeps the model's digests for the next process that loads the same model.
    """
    device = _device(settings.device)
    with _Loading(settings, device) as loading:
        model = Pipeline(
            loading.pipeline,
            family=loading.family,
            name=loading.name,
            device=device,
            patch_mode=settings.patch,
            compile_mode=settings.compile,
            check_all=settings.base_check == "all",
            known=loading.known.base,
        )
        loading.finish(model.base)
    return model


def load_copy(settings: Settings, resident: BaseModel) -> BaseModel:
    """Load a base model into host memory, from where it can be copied over the resident one.

    Raises `ModelUnavailable` as `load` does, and with both names if it cannot be copied there.
    """
    device = resident.weights.device
    try:
        with _Loading(settings, device) as loading:
            base = BaseModel(
                loading.pipeline,
                family=loading.family,
                name=loading.name,
                device=torch.device("cpu"),
                known=loading.known.base,
                is_pinned=device.type == "cuda",
            )
            resident.accept(base)
            loading.finish(base)
    except ModelUnavailable as error:
        # The client of a job has no use for paths of this machine, and the operator needs them.
        name, message = settings.models[0].name, str(error)
        logger.warning("base model %s: %s", name, message)
        path = str(Path(settings.model).expanduser())
        if os.path.isabs(path):
            message = message.replace(path, name)
        raise ModelUnavailable(_FOLDERS.sub("", message)) from None
    return base


class _Loading:
    """A model of diffusers that was read from its files, and its digests of an earlier load."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        """Read the model; raise `ModelUnavailable`."""
        # No progress bars in a log; this package checks itself what the libraries only warn of.
        diffusers_logging.set_verbosity_error()
        diffusers_logging.disable_progress_bar()
        transformers.logging.disable_progress_bar()
        dtype: torch.dtype | None = None  # on a GPU that of the family, which is not known yet
        if settings.dtype != "auto":
            dtype = getattr(torch, settings.dtype)
        elif device.type != "cuda":
            dtype = torch.float32
        path = Path(settings.model).expanduser()
        # Results and images are public: of a path, show the last part only.
        self.name = settings.model
        if settings.models:
            self.name = settings.models[0].name
        elif self.name != "demo" and path.exists():
            self.name = Path(os.path.abspath(path)).name
        self._record = ModelDigests.path(settings, dtype=str(dtype or settings.dtype))
        self.known = ModelDigests.read(self._record)
        self._hashing = ThreadPoolExecutor(1)
        # Model sites identify a checkpoint by the sha256 of its file.
        self._file: Future[FileDigest] | None = None
        if path.is_file():
            self._file = self._hashing.submit(FileDigest.of, path, known=self.known.file)
        try:
            self.family, self.pipeline = _read(settings, path, dtype)
        except BaseException:  # also a signal's: no thread may go on reading the file
            self._hashing.shutdown()
            raise

    def __enter__(self) -> Self:
        return self

    def finish(self, base: BaseModel) -> None:
        """Give the base the digest of its file, and keep its digests for the next process."""
        file = self._file.result() if self._file else None
        base.file_sha256 = file.sha256 if file else None
        digests = ModelDigests(base=base.digest, file=file)
        if digests != self.known:
            digests.write(self._record)

    def __exit__(self, *_: object) -> None:
        self._hashing.shutdown()


def _read(settings: Settings, path: Path, dtype: torch.dtype | None) -> tuple[Family, Any]:
    """Read the model and its VAE; raise `ModelUnavailable`."""
    try:
        family, pipeline = _load_pipeline(settings, path, dtype)
        if settings.vae:
            expected = pipeline.vae.config.latent_channels
            pipeline.vae = AutoencoderKL.from_pretrained(
                settings.vae, dtype=pipeline.vae.dtype, use_safetensors=True
            )
            if (channels := pipeline.vae.config.latent_channels) != expected:
                raise ModelUnavailable(
                    f"{settings.vae} is a VAE for latents of {channels} channels; those of the "
                    f"base model have {expected}"
                )
            _require_whole(pipeline, family, settings.vae)
        else:
            pipeline.vae.register_to_config(force_upcast=family.upcasts_vae)
    except _LOAD_ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelUnavailable(
            f"{settings.model} cannot be loaded: {lines[0][:_MESSAGE]}"
        ) from error
    return family, pipeline


def _load_pipeline(settings: Settings, path: Path, dtype: torch.dtype | None) -> tuple[Family, Any]:
    name, revision = settings.model, settings.hub_revision
    if settings.model_revision and (name == "demo" or path.exists()):
        raise ModelUnavailable("ZLORA_MODEL_REVISION is set, but the model is not a hub id")
    if name == "demo":
        return _from_folder(DEMO_MODEL, dtype)
    if path.is_file():
        return _from_single_file(path, settings.model_config, dtype)
    if path.is_dir():
        return _from_folder(path, dtype)
    if not _HUB_ID.fullmatch(name) or path.suffix in (".safetensors", ".ckpt"):
        raise ModelUnavailable(
            f"{name}: no such file or folder, and not a hub id such as owner/name"
        )
    # Download the files that are not in the hub's cache, then load from that folder.
    if dtype in (None, torch.float16):
        try:
            return _from_folder(_download(name, revision=revision, variant="fp16"), dtype)
        except ValueError as error:
            if _NO_VARIANT not in str(error):
                raise
    return _from_folder(_download(name, revision=revision, variant=None), dtype)


def _download(name: str, *, revision: str | None, variant: str | None) -> Path:
    """Download a model, but first the file that says whether it is supported."""
    index = Path(hf_hub_download(name, _INDEX, revision=revision))
    family = _families(json.loads(index.read_bytes()), name)[0]
    folder = family.text_to_image.download(
        name, revision=revision, variant=variant, use_safetensors=True, **family.pipeline_options
    )
    found = Path(folder).name  # a snapshot's folder is named by its commit
    if revision and _COMMIT.fullmatch(revision) and found != revision:
        raise ModelUnavailable(f"{name}: the hub sent the commit {found[:40]}, not {revision}")
    return Path(folder)


def _from_folder(
    folder: Path, dtype: torch.dtype | None, *, denoiser_file: Path | None = None
) -> tuple[Family, Any]:
    """Load a model in diffusers' layout, with `denoiser_file` all of it but the denoiser.

    That file is in the original layout.
    """
    family = _family_of_folder(folder)
    dtype = dtype or family.gpu_dtype
    for name in family.text_encoders.values():
        _require_vocabulary(folder / name)
    options: dict[str, Any] = {}
    if denoiser_file is not None:
        denoiser = options[family.denoiser] = family.denoiser_class.from_single_file(
            str(denoiser_file),
            config=str(folder / family.denoiser),
            local_files_only=True,
            dtype=dtype,
        )
        _require_places(denoiser_file, denoiser, family)
    elif dtype is torch.float16 and any(folder.glob(f"{family.denoiser}/*.fp16.*safetensors*")):
        options["variant"] = "fp16"
    pipeline = family.text_to_image.from_pretrained(
        str(folder),
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        **options,
        **family.pipeline_options,
    )
    _require_whole(pipeline, family, str(denoiser_file or folder))
    _require_text_weights(folder, pipeline, family)
    return family, pipeline


def _families(index: Mapping[str, Any], name: str) -> list[Family]:
    """Return the families with a pipeline's class; raise `ModelUnavailable` if there is none.

    `index` is the content of the file that names the class and the components.
    """
    class_name = index["_class_name"]
    if found := [family for family in _FAMILIES if class_name in family.class_names]:
        return found
    known = ", ".join(dict.fromkeys(family.text_to_image.__name__ for family in _FAMILIES))
    raise ModelUnavailable(f"{name} is a {class_name}: expected one of {known}")


def _family_of_folder(folder: Path) -> Family:
    """Return the family of a model in diffusers' layout.

    Families with the same class differ in the width of the text. Raises `ModelUnavailable` if the
    folder has no supported model.
    """
    index = folder / _INDEX
    if not index.is_file():
        raise ModelUnavailable(f"{folder} has no {_INDEX}: not a pipeline in diffusers' layout")
    found = _families(json.loads(index.read_bytes()), str(folder))
    config = json.loads((folder / found[0].denoiser / "config.json").read_bytes())
    by_width = base_model.WIDTHS.get(config.get(found[0].text_width))
    return next((family for family in found if family.name == by_width), found[0])


def _from_single_file(path: Path, config: str, dtype: torch.dtype | None) -> tuple[Family, Any]:
    """Load a checkpoint in the original layout.

    Configuration and tokenizers come from files on this machine, never from the hub.
    """
    if path.suffix != ".safetensors":
        raise ModelUnavailable(
            f"{path}: only .safetensors files are loaded, because other checkpoints can run code"
        )
    family, tensors = _family_of_file(path)
    _require_floats(path, tensors)
    folder, vocabulary = family.config, family.vocabulary
    if config:
        folder = vocabulary = Path(config).expanduser()
        if (found := _family_of_folder(folder)) is not family:
            raise ModelUnavailable(
                f"{path} is of {family.name}, and the folder of ZLORA_MODEL_CONFIG of {found.name}"
            )
    if family.denoiser_class is not None:
        if folder is None:
            others = ", ".join(name for name in family.components if name not in family.markers)
            raise ModelUnavailable(
                f"{path} is a {family.denoiser} of {family.name}: name the folder with {others} "
                "and the configuration in ZLORA_MODEL_CONFIG"
            )
        return _from_folder(folder, dtype, denoiser_file=path)
    if folder is None:
        raise ModelUnavailable(
            f"{path} does not say which configuration of {family.name} it needs: name the folder "
            "with that in ZLORA_MODEL_CONFIG"
        )
    tokenizers = family.text_encoders.values()
    pipeline = family.text_to_image.from_single_file(
        str(path),
        config=str(folder),
        local_files_only=True,
        dtype=dtype or family.gpu_dtype,
        **{name: _tokenizer(vocabulary or folder, name) for name in tokenizers},
        **family.pipeline_options,
    )
    _require_whole(pipeline, family, str(path))
    _set_prediction(pipeline, tensors)
    return family, pipeline


def _set_prediction(pipeline: Any, tensors: Collection[str]) -> None:
    """Configure the scheduler as the empty tensors say by which a single file names its training.

    `v_pred` is velocity prediction. `ztsnr` is zero terminal SNR, whose steps must begin at the
    last timestep (arXiv:2305.08891). Source: the web UI's pull requests 16567 and 16569.
    """
    scheduler = pipeline.scheduler
    options: dict[str, Any] = {}
    if "v_pred" in tensors:
        options["prediction_type"] = "v_prediction"
    # A folder with the configuration that says so also says how its steps are spaced.
    if "ztsnr" in tensors and not scheduler.config.get("rescale_betas_zero_snr"):
        options |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    # In the configuration, so that a class without such an option keeps it for other schedulers.
    pipeline.scheduler = type(scheduler).from_config({**scheduler.config, **options})


def _require_whole(pipeline: Any, family: Family, name: str) -> None:
    """Raise `ModelUnavailable` if a component or single weights are missing, or do not fit."""
    for component in family.components:
        module = getattr(pipeline, component, None)
        if module is None:
            raise ModelUnavailable(f"{name} has no {component}, which a model of {family.name} has")
        if missing := [weight for weight, tensor in module.named_parameters() if tensor.is_meta]:
            raise ModelUnavailable(
                f"{name} lacks {len(missing)} weights of {component}, such as {missing[0]}"
            )
    denoiser = getattr(pipeline, family.denoiser).config
    if family.native_side is None and not isinstance(denoiser.sample_size, int):
        raise ModelUnavailable(
            f"{name}: its {family.denoiser} has the `sample_size` {denoiser.sample_size}, expected "
            "a number: the native size is a square"
        )
    encoders = [getattr(pipeline, encoder) for encoder in family.text_encoders]
    width, reads = sum(encoder.config.hidden_size for encoder in encoders), family.text_width
    if denoiser[reads] != width:
        raise ModelUnavailable(
            f"{name}: its {family.denoiser} reads text of the width {denoiser[reads]}, its text "
            f"encoders write the width {width}"
        )
    for tokenizer in family.text_encoders.values():
        if family.chat_tokens and not getattr(pipeline, tokenizer).chat_template:
            raise ModelUnavailable(f"{name}: its {tokenizer} has no chat template")
    own = pipeline.scheduler
    known = of_class(type(own).__name__, own.config)
    # diffusers' pipelines of such a family give it no generator.
    if family.schedulers and (
        known not in family.schedulers or own.config.get("stochastic_sampling")
    ):
        raise ModelUnavailable(
            f"{name}: its scheduler is a {type(own).__name__}; {family.name} is drawn with "
            f"{', '.join(family.schedulers)} only, and without `stochastic_sampling`"
        )
    if denoiser.in_channels != pipeline.vae.config.latent_channels:
        raise ModelUnavailable(
            f"{name}: its {family.denoiser} reads {denoiser.in_channels} channels, its latents "
            f"have {pipeline.vae.config.latent_channels}: a model for inpainting, or for images to "
            "start from, does not draw from text alone"
        )


def _require_places(path: Path, denoiser: Any, family: Family) -> None:
    """Raise `ModelUnavailable` if a single file has tensors that its denoiser has no place for.

    diffusers leaves them out: further layers, or other components beside the denoiser.
    """
    owners = [
        name for name, module in denoiser.named_modules() if name and not [*module.children()]
    ]
    key_map = KeyMap((family.denoiser, owner) for owner in owners)
    own = {name for name, _ in denoiser.named_parameters(recurse=False)}.union(_UNREAD)
    unknown = [
        name
        for name in read_header(path).tensors
        if name.removeprefix(_FILE_PREFIX) not in own and not key_map.find(name.rpartition(".")[0])
    ]
    if unknown:
        raise ModelUnavailable(
            f"{path} has {len(unknown)} tensors that the {family.denoiser} of the folder in "
            f"ZLORA_MODEL_CONFIG lacks, such as {unknown[0][:100]}"
        )


def _require_floats(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise `ModelUnavailable` if the weights of a single file are quantised.

    diffusers would take the numbers for weights, without what they are multiplied by.
    """
    for name, info in tensors.items():
        if _SCALES.search(name) or (name.endswith(".weight") and info.dtype not in FLOATS):
            raise ModelUnavailable(
                f"{path} has {name[:100]} of the type {info.dtype}: quantised files are not "
                "supported, other than in fp8 without scales"
            )


def _require_text_weights(folder: Path, pipeline: Any, family: Family) -> None:
    """Raise `ModelUnavailable` if the files lack a weight of a text encoder.

    transformers would fill it with random numbers. Its releases differ in the prefix of the names.
    """
    for component in family.text_encoders:
        files = [read_header(path).tensors for path in (folder / component).glob("*.safetensors")]
        stored = {
            key.split(".", start)[-1] for tensors in files for key in tensors for start in range(3)
        }
        missing = [
            name
            for name, _ in getattr(pipeline, component).named_parameters()
            if not stored & {name, name.removeprefix("text_model.")}
        ]
        if missing:
            raise ModelUnavailable(
                f"{folder} lacks {len(missing)} weights of {component}, such as {missing[0]}"
            )


def _family_of_file(path: Path) -> tuple[Family, Mapping[str, TensorInfo]]:
    """Return the family of a checkpoint, and its tensors; raise `ModelUnavailable`.

    diffusers raises a long error, or none, for a file that is not a checkpoint.
    """
    try:
        tensors = read_header(path).tensors
    except NotSafetensors as error:
        raise ModelUnavailable(f"{path}: {error}") from None
    names = {*tensors, *(name.removeprefix(_FILE_PREFIX) for name in tensors)}
    missing = {
        family: [component for component, name in family.markers.items() if name not in names]
        for family in _FAMILIES
    }
    for family, components in missing.items():
        if not components:
            return family, tensors
    factors = frozenset[str]().union(*FACTORS.values())
    if any((key := parse_key(name)) and key.part in factors for name in tensors):
        raise ModelUnavailable(f"{path} is a LoRA, not a checkpoint")
    if all(len(lacking) == len(family.markers) for family, lacking in missing.items()):
        kind = other_file(tensors) or "no checkpoint"
        known = ", ".join(family.name for family in _FAMILIES)
        raise ModelUnavailable(f"{path} is {kind}: expected a checkpoint of one of {known}")
    nearest = min(missing, key=lambda family: len(missing[family]) / len(family.markers))
    lacks = ", ".join(missing[nearest])
    raise ModelUnavailable(f"{path} is not a checkpoint of {nearest.name}: it lacks {lacks}")


def _tokenizer(folder: Path, name: str) -> CLIPTokenizer:
    """Load a tokenizer; a second one that the folder lacks is the first, padded with `!`."""
    options: dict[str, Any] = {}
    if name == "tokenizer_2" and not (folder / name).is_dir():
        name, options = "tokenizer", {"pad_token": "!"}
    _require_vocabulary(folder / name)
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(
        folder / name, local_files_only=True, **options
    )
    return tokenizer


def _require_vocabulary(folder: Path) -> None:
    """Raise `ModelUnavailable` if a tokenizer's folder has no vocabulary.

    transformers would make a tokenizer of three tokens.
    """
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
