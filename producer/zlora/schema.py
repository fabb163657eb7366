"""Requests and results: the JSON documents that producers and workers exchange, and their bounds.

The line below each field is its documentation, from which `docs/reference/request.md` is made.
"""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from enum import StrEnum
from itertools import pairwise
from typing import Annotated, Any, Final, Literal, Self, get_args, get_origin

import msgspec
from msgspec import Meta, Struct, structs

from zlora import prompt_syntax, sweeps, unet_blocks
from zlora.errors import InvalidJobId, InvalidRequest, LoraMismatch
from zlora.prompt_syntax import MAX_WINDOWS, ParsedPrompt, PromptSyntax
from zlora.redaction import field_name, printable
from zlora.schedulers import (
    SCHEDULERS,
    Choice,
    Schedule,
    find_scheduler,
    nearest_schedulers,
    unsupported,
)

TASK_NAME: Final = "zlora.generate"
QUEUE: Final = "gpu"  # default; the same base models for all workers of a queue
MAX_SEED: Final = 2**53 - 1  # JSON readers that use doubles corrupt greater integers
MAX_IMAGES: Final = 8
MAX_LORAS: Final = 8
MAX_STEPS: Final = 200  # of one pass
STEPS: Final = 28  # of a request that says none
GUIDANCE_SCALE: Final = 7.5  # likewise
WEIGHT: Final = 1.0  # of a LoRA, likewise
# Why a schedule has no weight in the text encoders.
TEXT_IS_CONSTANT: Final = (
    "Expected 0, since the LoRA's strength changes over the steps: "
    "prompts are encoded once, before the first step"
)
STRENGTH: Final = 0.75  # of an image to start from, likewise; that of A1111's web UI
MAX_MODEL_NAME: Final = 255  # characters: that of a worker with one base may be a file's name
MAX_TOKEN: Final = 100  # characters of a word that stands for an embedding
MAX_URL_SECONDS: Final = 604_800  # seven days: S3 allows no longer signatures
JOB_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)  # part of object keys and paths
NO_CONFIG: Final = "none"  # stands for the checksum of a file that does not exist or is not read
# Address of the image with this index of an earlier job.
JOB_IMAGE: Final = re.compile(r"job:([A-Za-z0-9_-]{1,64})#([0-9]{1,2})", re.ASCII)
UPLOAD: Final = re.compile(r"upload:([0-9a-f]{64})", re.ASCII)  # of an image that a server took
_REPOSITORY: Final = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?", re.ASCII)  # of Hugging Face

Token = Annotated[str, Meta(min_length=1, max_length=MAX_TOKEN)]
Address = Annotated[str, Meta(min_length=1, max_length=4096)]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]  # in lower-case hex
MAX_WEIGHT: Final = 4
Weight = Annotated[float, Meta(ge=-MAX_WEIGHT, le=MAX_WEIGHT)]  # neither NaN nor Inf
Share = Annotated[float, Meta(ge=0, le=1)]  # of the steps
MIN_SIDE: Final = 64  # pixels
MAX_SIDE: Final = 4096
SIDE_STEP: Final = 8  # the VAE's factor
Side = Annotated[int, Meta(ge=MIN_SIDE, le=MAX_SIDE, multiple_of=SIDE_STEP)]
Strength = Annotated[float, Meta(gt=0, le=1)]
Text = Annotated[str, Meta(max_length=10_000)]  # characters
Timesteps = Annotated[
    tuple[Annotated[int, Meta(ge=0, le=999)], ...], Meta(min_length=1, max_length=MAX_STEPS)
]
Sigmas = Annotated[
    tuple[Annotated[float, Meta(ge=0, le=10_000)], ...],
    Meta(min_length=1, max_length=MAX_STEPS + 1),
]
OutputFormat = Literal["png", "jpeg", "webp"]
LoraTier = Literal["memory", "disk", "network"]
UrlPolicy = Literal["presigned", "public", "file", "key"]
# Powers of two, so that a batch that is too large for memory has the images of two smaller ones.
BatchSize = Literal[1, 2, 4, 8]
Sweep = Annotated[
    dict[str, Annotated[tuple[Any, ...], Meta(min_length=1, max_length=sweeps.MAX_CELLS)]],
    Meta(min_length=1, max_length=8),
]
SchedulerName = Annotated[
    str, Meta(min_length=1, max_length=100, extra_json_schema={"examples": list(SCHEDULERS)})
]
# Formats by media type (RFC 6838); a format is also the extension of its files.
CONTENT_TYPES: Final[dict[str, OutputFormat]] = {
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
}


class Asset(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Address of a file: exactly one of `url`, `cozy_ref` and `ref`."""

    url: Address | None = None
    """URL (`https`, `http`, `s3`, `hf`, `civitai`, `lora`, `file`, `demo`), or `owner/repo`."""
    cozy_ref: Address | None = None
    """Reference to a file of the Cozy hub."""
    ref: Address | None = None
    """A URL, a name of the worker's catalogue, or a reference to the Cozy hub."""
    sha256: Sha256 | None = None
    """SHA-256 that the file must have, in lower-case hex; not checked by default."""
    config_sha256: Annotated[str, Meta(pattern=r"^(?:none|[0-9a-f]{64})\Z")] | None = None
    """SHA-256 that the `adapter_config.json` beside the file must have; `none` to read none."""

    def __post_init__(self) -> None:
        given = [name for name in ("url", "cozy_ref", "ref") if getattr(self, name) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(f"Expected exactly one of `url`, `cozy_ref`, `ref`, got {found}")

    @property
    def address(self) -> str:
        """URL of the file, with the schemes `cozy` for a hub and `hf` for `owner/repo`."""
        if self.url and _REPOSITORY.fullmatch(self.url):
            return f"hf://{self.url}"
        if self.url:
            return self.url
        ref = self.ref
        if ref and ("://" in ref or JOB_IMAGE.fullmatch(ref) or UPLOAD.fullmatch(ref)):
            return ref
        return f"cozy://{self.cozy_ref or ref}"

    @property
    def job_image(self) -> tuple[str, int] | None:
        """Job id and index of `job:<id>#<index>`, None for other addresses."""
        found = JOB_IMAGE.fullmatch(self.address)
        return (found[1], int(found[2])) if found else None

    @property
    def upload(self) -> str | None:
        """SHA-256 of `upload:<sha256>`, None for other addresses."""
        found = UPLOAD.fullmatch(self.address)
        return found[1] if found else None


class LoraSpec(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One LoRA of a job."""

    file: Asset
    """Address of the safetensors file."""
    weight: Weight | None = None
    """Strength of the LoRA, from -4 to 4; 1.0 by default."""
    unet_weight: Weight | None = None
    """Strength in the UNet, or in the transformer of Z-Image; `weight` by default."""
    text_encoder_weight: Weight | None = None
    """Strength in the text encoders; `weight` by default, 0 if the strength changes over steps."""
    start: Share = 0.0
    """Share of the drawn steps before which the LoRA is not in the UNet; 0 by default."""
    end: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Share of the steps from which on the LoRA is not in the UNet; 1 by default."""
    weights: (
        Annotated[tuple[tuple[Share, Weight], ...], Meta(min_length=1, max_length=64)] | None
    ) = None
    """Strengths in the UNet by share of the steps, as `[[0, 1], [0.5, 0.3]]`; none by default."""
    blocks: Annotated[dict[str, Weight], Meta(min_length=1, max_length=64)] | None = None
    """Factors of the strength by block of the UNet, as `{"down.1": 0.5, "mid": 0}`; else 1."""
    alpha: Annotated[float, Meta(gt=0, le=100_000)] | None = None
    """Alpha of the layers for which the file has none; by default as `adapter_config.json` says."""
    strict: bool = True
    """Whether to refuse a file that fits only in part, or names another base; true by default."""
    adapter_name: Annotated[str, Meta(max_length=200)] | None = None
    """Label for the receipt, without any effect; none by default."""

    @property
    def component_weights(self) -> tuple[float, float]:
        """Weights in the UNet and in the text encoders; by default both are `weight`.

        Of weights that change over the steps, the one that is farthest from 0.
        """
        unet = max((weight for _, weight in self.unet_weights), key=abs)
        if self.text_encoder_weight is not None:
            return unet, self.text_encoder_weight
        if self.has_schedule:
            return unet, 0.0
        return unet, WEIGHT if self.weight is None else self.weight

    @property
    def has_schedule(self) -> bool:
        """Whether the weight in the UNet may change over the steps."""
        return self.weights is not None or self.start > 0 or self.end < 1

    def require_constant_text(self, components: Iterable[str], source: str) -> None:
        """Raise `LoraMismatch` if a file with these components may be used in the UNet only."""
        is_silent = self.has_schedule and self.text_encoder_weight is None
        if is_silent and any(name.startswith("text_encoder") for name in components):
            raise LoraMismatch(
                f"{source}: changes the text encoders too. {TEXT_IS_CONSTANT}; "
                "with `text_encoder_weight: 0` the rest is used"
            )

    @property
    def unet_weights(self) -> tuple[tuple[float, float], ...]:
        """Weights in the UNet, each after the share of the steps from which on it holds."""
        if self.weights is not None:
            return self.weights
        weight = self.weight if self.unet_weight is None else self.unet_weight
        found = [(self.start, WEIGHT if weight is None else weight)]
        if self.start > 0:
            found.insert(0, (0.0, 0.0))
        if self.end < 1:
            found.append((self.end, 0.0))
        return tuple(found)

    def weights_by_step(self, steps: int) -> tuple[tuple[int, float], ...]:
        """Weights in the UNet, each after the first step, from 1, that has it."""
        found: list[tuple[int, float]] = []
        for step in range(steps):
            weight = weight_at(self.unet_weights, step / steps)
            if not found or found[-1][1] != weight:
                found.append((step + 1, weight))
        return tuple(found)

    @property
    def is_used(self) -> bool:
        """Whether a weight is not 0; otherwise the file is not fetched."""
        return any(self.component_weights)


class EmbeddingSpec(
    Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One embedding (textual inversion) of a job: vectors for words of its prompts."""

    file: Asset
    """Address of the safetensors file."""
    token: Token | None = None
    """Word that stands for it in the prompts; by default as the file says, else the file's name."""

    def __post_init__(self) -> None:
        if self.token is not None and not is_token(self.token):
            raise ValueError("Expected `token` to be one printable word without spaces")
        if self.file.config_sha256 is not None:
            raise ValueError("Expected no `config_sha256` in the file of an embedding")


class Upscale(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A second pass, which starts from the enlarged image (hires fix)."""

    factor: Annotated[float, Meta(gt=1, le=4)]
    """Factor of both sides, up to 4; the sides become multiples of 8, or of 16 for Z-Image."""
    strength: Strength = 0.5
    """Share of the steps of the second pass that are drawn, up to 1; 0.5 by default."""
    steps: Annotated[int, Meta(ge=1, le=MAX_STEPS)] | None = None
    """Denoising steps of the second pass, of which `strength` leaves the last; as the first's."""
    mode: Literal["image", "latent"] = "image"
    """What is enlarged: the decoded `image` (the default), or its `latent` before the decoding."""

    def size(self, width: int, height: int, *, step: int = SIDE_STEP) -> tuple[int, int]:
        """Width and height of an image that is enlarged, as multiples of `step`."""
        sides = (step * round(side * self.factor / step) for side in (width, height))
        return next(sides), next(sides)


class GenerateRequest(
    Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One job. Unknown fields are refused, so that a misspelt field is never a silent default."""

    prompt: Text
    """What to draw, up to 10,000 characters, 10 windows of 75 tokens, or 512 tokens for Z-Image."""
    negative_prompt: Text = ""
    """What not to draw, with the same bounds; empty by default."""
    prompt_syntax: PromptSyntax = "plain"
    """Syntax of both prompts: `plain` (the default) or `a1111`, with weights and `BREAK`."""
    clip_skip: Annotated[int, Meta(ge=0, le=100)] | None = None
    """Layers of the text encoders to skip before the one that the model reads; none by default."""
    model: Annotated[str, Meta(min_length=1, max_length=MAX_MODEL_NAME)] | None = None
    """Name of the base model, one of those that the queue serves; the first of them by default."""
    loras: Annotated[tuple[LoraSpec, ...], Meta(max_length=MAX_LORAS)] = ()
    """LoRAs to merge into the base model, at most 8; none by default."""
    embeddings: Annotated[tuple[EmbeddingSpec, ...], Meta(max_length=8)] = ()
    """Embeddings (textual inversions) for words of the prompts, at most 8; none by default."""
    image: Asset | None = None
    """PNG, JPEG or WebP to start from, also `job:<id>#<index>`, a job's image; none by default."""
    mask: Asset | None = None
    """Mask of the image's size (inpainting): what is white is drawn anew; none by default."""
    strength: Strength | None = None
    """Share of the steps that are drawn, from nearly 0 to 1 (all is new); 0.75 by default."""
    mask_blur: Annotated[float, Meta(ge=0, le=256)] = 0
    """Pixels of the soft edge of the mask, beyond which the image stays exactly; 0 by default."""
    mask_invert: bool = False
    """Whether what is black in the mask is drawn anew, not what is white; false by default."""
    upscale: Upscale | None = None
    """Second pass at a larger size (hires fix); none by default."""
    num_inference_steps: Annotated[int, Meta(ge=1, le=MAX_STEPS)] | None = None
    """Denoising steps; the base's default, 28 for SDXL. With `image` `strength` times as many."""
    guidance_scale: Annotated[float, Meta(ge=0, le=50)] | None = None
    """Strength of the prompt (classifier-free guidance); by default the base's, 7.5 for SDXL."""
    width: Side | None = None
    """Width in pixels, a multiple of 8, or of 16 for Z-Image; by default the image's or model's."""
    height: Side | None = None
    """Height in pixels, a multiple of 8, or of 16 for Z-Image; by default as for `width`."""
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    """Seed of the first image, one more for each next one; made from the job id by default."""
    sweep: Sweep | None = None
    """Values of fields by path, as `{"loras[0].weight": [0, 1], "seed": [1, 2]}`: an image each."""
    num_images: Annotated[int, Meta(ge=1, le=MAX_IMAGES)] = 1
    """Number of images; 1 by default."""
    batch_size: BatchSize = 1
    """Images to draw at once, 1 (the default), 2, 4 or 8; fewer if memory is short."""
    trigger_words: Literal["list", "add"] = "list"
    """Trigger words of the catalogue: `add` to the prompt, or only `list` (the default)."""
    scheduler: SchedulerName | None = None
    """Sampler by [any of its names](schedulers.md); the model's own by default."""
    schedule: Schedule | None = None
    """Spacing of the noise levels; by default that in the name of the scheduler, or the model's."""
    timesteps: Timesteps | None = None
    """Timestep of each step, falling from 999 at most to 0 at least; their number is the steps."""
    sigmas: Sigmas | None = None
    """Noise level of each step, falling; a last 0 is not counted as a step and may be absent."""
    eta: Annotated[float, Meta(ge=0, le=1)] | None = None
    """Noise that DDIM and TCD add at each step, from 0 (the default) to 1."""
    recipes: Literal["auto", "off"] = "auto"
    """Whether few-step LoRAs set scheduler, steps and guidance scale that are not here: `auto`."""
    output_format: OutputFormat = "png"
    """Format of the images: `png` (the default), `jpeg` or `webp`."""
    quality: Annotated[int, Meta(ge=1, le=100)] | None = None
    """Quality of JPEG, or of WebP that is not lossless; 95 by default."""
    lossless: bool = False
    """Whether WebP keeps every pixel, as PNG always does; false by default."""
    embed_metadata: bool = True
    """Whether each file contains the parameters that reproduce its image; true by default."""
    url_policy: UrlPolicy | None = None
    """Kind of the URLs in the result, or `key` for none; the operator's first choice by default."""
    url_expires_in: Annotated[int, Meta(ge=1, le=MAX_URL_SECONDS)] | None = None
    """Seconds that presigned URLs are valid; the operator's choice by default."""
    inline: bool = False
    """Whether the result also contains small images as data URIs; false by default."""
    previews: bool = False
    """Whether events show the image that is being drawn, as a small JPEG; false by default."""
    timeout: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    """Seconds from its start in which the job must end; the operator's limit by default."""

    def __post_init__(self) -> None:
        tokens = [spec.token.lower() for spec in self.embeddings if spec.token is not None]
        if len(set(tokens)) < len(tokens):
            raise ValueError("Expected another `token` for each of the `embeddings`")
        if self.seed is not None and self.seed + self.num_images - 1 > MAX_SEED:
            raise ValueError(f"Expected `seed` + `num_images` - 1 <= {MAX_SEED}")
        if self.lossless and self.output_format != "webp":
            message = (
                "Expected `lossless` with `output_format` webp only: png always is, jpeg never"
            )
            raise ValueError(message)
        if self.quality is not None and self.keeps_pixels:
            raise ValueError("Expected no `quality` for a format that keeps every pixel")
        if self.url_expires_in is not None and self.url_policy not in (None, "presigned"):
            raise ValueError("Expected `url_expires_in` with `url_policy` presigned only")

    def seed_for(self, job_id: str) -> int:
        """Seed of the first image: the request's own, or one made from the job id."""
        return seed_of(job_id) if self.seed is None else self.seed

    @property
    def steps(self) -> int:
        """Denoising steps of each image, 28 if the request names none."""
        if self.timesteps:
            return len(self.timesteps)
        if self.sigmas:
            return len(self.noise_levels) - 1
        return STEPS if self.num_inference_steps is None else self.num_inference_steps

    @property
    def images(self) -> dict[str, Asset]:
        """The image to start from and its mask, by the name of the field."""
        given = {"image": self.image, "mask": self.mask}
        return {name: asset for name, asset in given.items() if asset is not None}

    @property
    def fetched_images(self) -> tuple[Asset, ...]:
        """Those of the `images` that are neither an earlier job's nor uploaded."""
        return tuple(
            asset
            for asset in self.images.values()
            if asset.job_image is None and asset.upload is None
        )

    @property
    def image_strength(self) -> float:
        """Share of the steps that are drawn from an image, 0.75 if the request names none."""
        return STRENGTH if self.strength is None else self.strength

    @property
    def drawn_steps(self) -> int:
        """Steps that the first pass draws: from an image to start from, only the last ones."""
        if self.image is None and self.strength is None:
            return self.steps
        return int(self.steps * self.image_strength)  # as diffusers counts

    @property
    def all_steps(self) -> int:
        """Steps that are drawn of each image, in both passes."""
        second = self.second_pass
        return self.drawn_steps + (second.drawn_steps if second else 0)

    @property
    def cells(self) -> tuple[Self, ...]:
        """Requests of the images of a sweep, in order; without `sweep` the request itself."""
        if self.sweep is None:
            return (self,)
        document = msgspec.to_builtins(structs.replace(self, sweep=None))
        return tuple(
            msgspec.convert(sweeps.with_values(document, values), type(self))
            for values in sweeps.cells(self.sweep)
        )

    @property
    def image_count(self) -> int:
        """Number of images of the job."""
        return self.num_images if self.sweep is None else sweeps.count(self.sweep)

    @property
    def total_steps(self) -> int:
        """Steps that are drawn of all images, in both passes."""
        return self.num_images * sum(cell.all_steps for cell in self.cells)

    @property
    def second_pass(self) -> Self | None:
        """The second pass alone, as a request with a strength; None without `upscale`."""
        if self.upscale is None:
            return None
        changed: dict[str, Any] = {"upscale": None, "image": None}
        if self.upscale.steps is not None:
            levels = {"timesteps": None, "sigmas": None}
            changed |= {"num_inference_steps": self.upscale.steps, **levels}
        return structs.replace(self, strength=self.upscale.strength, **changed)

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """The `sigmas` with the 0 at their end; empty without `sigmas`."""
        sigmas = self.sigmas or ()
        return sigmas if not sigmas or sigmas[-1] == 0 else (*sigmas, 0.0)

    @property
    def given_sampling(self) -> tuple[str, ...]:
        """Names of the fields `timesteps`, `sigmas` and `eta` that the request gives."""
        names = ("timesteps", "sigmas", "eta")
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def sampling(self) -> Choice | None:
        """Canonical name of the scheduler with the schedule of the request; None for the model's.

        Also None for a name that no scheduler has, which `parse_request` refuses.
        """
        if self.scheduler is None or (found := find_scheduler(self.scheduler)) is None:
            return None
        return found._replace(schedule=self.schedule or found.schedule)

    @property
    def guidance(self) -> float:
        """Strength of the prompt, 7.5 if the request names none."""
        return GUIDANCE_SCALE if self.guidance_scale is None else self.guidance_scale

    def with_defaults(self, *, steps: int = STEPS, guidance_scale: float = GUIDANCE_SCALE) -> Self:
        """Return the request with its steps, guidance scale, weights and strength written out.

        `steps` and `guidance_scale` are those of a request that names none, by the base model.
        """
        names_steps = self.num_inference_steps or self.timesteps or self.sigmas
        loras = tuple(
            lora
            if lora.weight is not None or lora.weights is not None
            else structs.replace(lora, weight=WEIGHT)
            for lora in self.loras
        )
        return structs.replace(
            self,
            loras=loras,
            num_inference_steps=self.steps if names_steps else steps,
            guidance_scale=guidance_scale if self.guidance_scale is None else self.guidance_scale,
            strength=self.image_strength if self.image else None,
        )

    @property
    def keeps_pixels(self) -> bool:
        """Whether the files contain exactly the pixels that were drawn."""
        return self.output_format == "png" or self.lossless


class SweepCell(Struct, frozen=True, kw_only=True):
    """Values and request of one image of a sweep."""

    values: dict[str, Any]
    """Values of the image, by the paths of the sweep."""
    request: GenerateRequest
    """Request that reproduces this image alone, as `request` of the result."""
    scheduler: str
    """Scheduler of the image, as in the result."""
    relative_norms: tuple[float | None, ...] = ()
    """Relative norm of each LoRA of this request, as in its receipt."""


class ImageRef(Struct, frozen=True, kw_only=True):
    """One image in the object store."""

    key: str
    """Object key: `runs/<job id>/outputs/<index>.<format>`."""
    width: int
    """Width in pixels."""
    height: int
    """Height in pixels."""
    content_type: str
    """Media type, such as `image/png`."""
    size: int
    """Size of the file in bytes."""
    sha256: str
    """SHA-256 of the file, in hex."""
    seed: int
    """Seed of this image."""
    url: str | None = None
    """URL by the request's `url_policy`; none for the policy `key`."""
    url_expires_at: float | None = None
    """End of a presigned URL, in seconds since the epoch; the worker's credentials limit it too."""
    pixels_sha256: str | None = None
    """SHA-256 of the RGB bytes as they were drawn, row by row."""
    tiled: bool = False
    """Whether memory allowed only a decode in tiles, which differs a little."""
    batch_size: BatchSize = 1
    """Images drawn at once: those whose index divided by it, rounded down, is the same."""
    data_uri: str | None = None
    """The file as a data URI (RFC 2397), for `inline` and within the operator's limit."""


class LoraReceipt(Struct, frozen=True, kw_only=True):
    """What was used of one LoRA."""

    source: str
    """Address of the file without query and credentials."""
    sha256: str
    """SHA-256 of the file, in hex."""
    size: int
    """Size of the file in bytes."""
    format: str
    """Naming scheme of the tensors, by the tool that uses it."""
    ranks: tuple[int, ...]
    """Ranks of the layers, each once, ascending."""
    unet_weight: float
    """Strength in the UNet; if it changes over the steps, the one that is farthest from 0."""
    text_encoder_weight: float
    """Strength in both text encoders."""
    modules: dict[str, int]
    """Number of changed layers by component of the model."""
    tier: LoraTier
    """Where the file came from: `memory`, `disk` or `network`."""
    milliseconds: dict[str, float]
    """Milliseconds by phase."""
    adapter_name: str | None = None
    """Label from the request."""
    kinds: tuple[str, ...] = ()
    """Kinds of deltas in the file, such as LoRA, LoHa or LoKr."""
    unmatched: dict[str, int] = {}
    """Number of tensors that fit nowhere, by component; empty unless `strict` is false."""
    unmatched_names: tuple[str, ...] = ()
    """Names of the first tensors that fit nowhere."""
    relative_norm: float | None = None
    """Norm of the delta divided by the norm of the weights that it changes, at its greatest."""
    tensors_sha256: str | None = None
    """SHA-256 of the file without its header, which A1111 and Civitai (AutoV3) use as its name."""
    config_sha256: str | None = None
    """SHA-256 of the `adapter_config.json` that was used; `none` if none was beside the file."""
    warnings: tuple[str, ...] = ()
    """What was assumed about the file, such as `alpha: assumed equal to rank`."""
    catalogue: str | None = None
    """Name in the worker's catalogue, if it is there."""
    trigger_words: tuple[str, ...] = ()
    """Trigger words by the worker's catalogue, else by the file's header."""
    unet_weights: tuple[tuple[int, float], ...] = ()
    """Strengths in the UNet, if they change, each after its first step, from 1."""
    blocks: dict[str, float] = {}
    """Factors of the strength in the UNet by block, as in the request."""
    recipe: str | None = None
    """Recipe of a few-step LoRA, such as `lightning-4`."""

    @property
    def is_used(self) -> bool:
        """Whether a weight is not 0; otherwise the file was not fetched."""
        return bool(self.unet_weight or self.text_encoder_weight)


class PromptReceipt(Struct, frozen=True, kw_only=True):
    """How the text encoders read a prompt."""

    tokens: int
    """Number of tokens of the text, without those that begin, end and fill a window."""
    windows: int
    """Number of windows that the text takes."""
    warnings: tuple[str, ...] = ()
    """Other meanings that the text may have, such as LoRA tags in the syntax `plain`."""


class EmbeddingReceipt(Struct, frozen=True, kw_only=True):
    """What was used of one file of embeddings, which may be that of a LoRA."""

    source: str
    """Address of the file without query and credentials."""
    sha256: str
    """SHA-256 of the file, in hex."""
    size: int
    """Size of the file in bytes."""
    format: str
    """Naming scheme of the tensors: `sdxl`, `pivotal`, `sd`, `diffusers` or `bundle`."""
    vectors: dict[str, int]
    """Number of vectors by token: each takes the place of one token of the prompt."""
    used: dict[str, int]
    """Number of occurrences in the prompt and the negative prompt by token."""
    tier: LoraTier
    """Where the file came from: `memory`, `disk` or `network`."""
    warnings: tuple[str, ...] = ()
    """What has no effect, such as `<s1>: in no prompt that was read`."""


class ImageReceipt(Struct, frozen=True, kw_only=True):
    """What was used of the image to start from, or of its mask."""

    source: str
    """Address of the file without query and credentials."""
    sha256: str
    """SHA-256 of the file, in hex."""
    size: int
    """Size of the file in bytes."""
    width: int
    """Width in pixels, turned as its Exif data says."""
    height: int
    """Height in pixels, turned as its Exif data says."""
    tier: Literal["disk", "network", "store"]
    """Where the file came from: `disk`, `network`, or `store` for a job's or an uploaded image."""
    notes: tuple[str, ...] = ()
    """What was changed before it was used, such as `transparent pixels are white`."""


class GenerateResult(Struct, frozen=True, kw_only=True):
    """Images of a job and the receipt. Later versions add fields, and never change one."""

    job_id: str
    """Id of the job."""
    images: tuple[ImageRef, ...]
    """The images, in order of their seeds; of a sweep, in order of its `cells`."""
    cells: tuple[SweepCell, ...] = ()
    """What each image of a sweep was drawn from; empty for other jobs."""
    sheet: ImageRef | None = None
    """Contact sheet of a sweep: its images in small, with their values."""
    loras: tuple[LoraReceipt, ...]
    """A receipt for each LoRA, in order of the request; of a sweep, at its greatest norm."""
    embeddings: tuple[EmbeddingReceipt, ...] = ()
    """A receipt for each of the `embeddings`, then for each LoRA whose file has embeddings."""
    seed: int
    """Seed of the first image."""
    timings: dict[str, float]
    """Seconds by `Phase`; `encode` and `upload` run beside `denoise`."""
    base_intact: bool
    """Whether the base model was compared after the job and is unchanged."""
    model: str
    """Name of the base model."""
    versions: dict[str, str]
    """Versions of the packages that drew the images."""
    base_checked: float = 1.0
    """Share of the bytes of the base model that was compared, from 0 to 1."""
    tiled: bool = False
    """Whether memory allowed only a decode in tiles for some image."""
    attempt: int = 1
    """Number of the delivery that succeeded, from 1."""
    started_at: float | None = None
    """Start in seconds since the epoch, by the worker's clock."""
    finished_at: float | None = None
    """End in seconds since the epoch, by the worker's clock."""
    request_sha256: str | None = None
    """Digest of the request (`digest_of`)."""
    request: GenerateRequest | None = None
    """Request that reproduces the images: addresses without query, each LoRA with its sha256."""
    base: str | None = None
    """Family of the base model, such as `SDXL`."""
    base_sha256: str | None = None
    """SHA-256 of the weights of the base model in memory."""
    model_sha256: str | None = None
    """SHA-256 of the single file of the base model, if any; of Z-Image, that of the transformer."""
    scheduler: str | None = None
    """Class of the scheduler in diffusers, then its variant and its schedule, if it has any."""
    device: str | None = None
    """Device that drew the images."""
    dtype: str | None = None
    """Data type of the weights."""
    threads: int | None = None
    """Number of threads on a CPU, on which the last bits of the pixels depend."""
    compile: str = "off"
    """The worker's `ZLORA_COMPILE`, on which the last bits of the pixels depend."""
    recipe_fields: dict[str, Any] = {}
    """Values that few-step LoRAs have set, by field; of a sweep, those of the first image."""
    prompt_receipt: PromptReceipt | None = None
    """How the prompt was read; of a sweep, that of the first image."""
    negative_prompt_receipt: PromptReceipt | None = None
    """As for the prompt; none if the negative one is empty, or not used for lack of guidance."""
    image_receipt: ImageReceipt | None = None
    """What was used of the `image`."""
    mask_receipt: ImageReceipt | None = None
    """What was used of the `mask`."""


class Phase(StrEnum):
    """A step of a job, by its name in `timings` and in metrics."""

    QUEUED = "queued"
    CHANGE = "change"  # of the base model, for jobs that name another one than the last job
    FETCH = "fetch"
    PARSE = "parse"
    APPLY = "apply"
    DENOISE = "denoise"
    RESTORE = "restore"
    TAIL = "tail"  # from the last image to the last upload
    ENCODE = "encode"  # beside the denoising
    UPLOAD = "upload"  # beside the denoising
    WAIT = "waiting"  # before a retry

    @property
    def progress_name(self) -> str:
        """Name of this step in `JobStatus.phase`."""
        return _PROGRESS_NAMES.get(self, self.value)


TIMED_PHASES: Final = tuple(phase for phase in Phase if phase is not Phase.WAIT)
_PROGRESS_NAMES: Final = {
    Phase.CHANGE: "loading",
    Phase.FETCH: "fetching",
    Phase.PARSE: "loading",
    Phase.DENOISE: "denoising",
    Phase.UPLOAD: "uploading",
}


class JobState(StrEnum):
    """State of a job. UNKNOWN is an id that neither Redis nor a worker knows."""

    UNKNOWN = "UNKNOWN"
    PENDING = "PENDING"
    STARTED = "STARTED"
    PROGRESS = "PROGRESS"
    RETRY = "RETRY"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    REVOKED = "REVOKED"


class JobStatus(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """State of a job, and its progress while it has not ended."""

    state: JobState
    """State of the job."""
    phase: str | None = None
    """`queued`, `fetching`, `loading`, `denoising`, `uploading`, or `waiting` before a retry."""
    step: int | None = None
    """Denoising steps that are done, of all images together."""
    steps: int | None = None
    """Denoising steps in all, of all images together."""
    eta: float | None = None
    """Seconds until the denoising ends, estimated."""
    position: int | None = None
    """Number of jobs before this one in the queue, including the running ones."""
    received: int | None = None
    """Bytes received of the file that is downloading."""
    expected: int | None = None
    """Size in bytes of the file that is downloading."""
    attempt: int | None = None
    """Number of the delivery, from 1."""
    code: str | None = None
    """Code of the error that a retry is waiting for."""
    preview: str | None = None
    """The image that is being drawn, as a small JPEG in a data URI, for `previews`."""

    @property
    def drawn_share(self) -> float:
        """Share of the denoising steps that are done, from 0 to 1."""
        if self.phase == Phase.UPLOAD.progress_name:  # after the last step
            return 1.0
        return (self.step or 0) / self.steps if self.steps else 0.0


class Cancellation(StrEnum):
    """Place of a job when it was cancelled; a finished job stays finished."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    UNKNOWN = "unknown"  # a job that is submitted under this id later is refused


class TolerantAsset(Asset, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """An `Asset` of a newer version, whose unknown fields are ignored."""


class TolerantLoraSpec(LoraSpec, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A `LoraSpec` of a newer version, whose unknown fields are ignored."""

    file: TolerantAsset


class TolerantEmbeddingSpec(EmbeddingSpec, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """An `EmbeddingSpec` of a newer version, whose unknown fields are ignored."""

    file: TolerantAsset


class TolerantUpscale(Upscale, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """An `Upscale` of a newer version, whose unknown fields are ignored."""


class TolerantRequest(GenerateRequest, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A `GenerateRequest` of a newer version, whose unknown fields are ignored.

    Submitted requests are read strictly; the request in a result is a record of what was done.
    """

    loras: tuple[TolerantLoraSpec, ...] = ()
    embeddings: tuple[TolerantEmbeddingSpec, ...] = ()
    image: TolerantAsset | None = None
    mask: TolerantAsset | None = None
    upscale: TolerantUpscale | None = None


class _TolerantCell(SweepCell, frozen=True, kw_only=True):
    request: TolerantRequest


class _TolerantResult(GenerateResult, frozen=True, kw_only=True):
    request: TolerantRequest | None = None
    cells: tuple[_TolerantCell, ...] = ()


def parse_result(document: bytes | str | dict[str, Any]) -> GenerateResult:
    """Read a result from JSON or its data, also one of a newer version.

    Raises `msgspec.DecodeError`, or its subclass `msgspec.ValidationError`.
    """
    if isinstance(document, dict):
        found = msgspec.convert(document, _TolerantResult)
    else:
        found = msgspec.json.decode(document, type=_TolerantResult)
    return msgspec.convert(msgspec.to_builtins(found), GenerateResult)


def check_job_id(job_id: object) -> str:
    """Return the id if it may become part of a path; raise `InvalidJobId`."""
    if isinstance(job_id, str) and JOB_ID.fullmatch(job_id):
        return job_id
    details = {"path": "job_id", "value": printable(job_id), "expected": JOB_ID.pattern}
    raise InvalidJobId(
        f"job id {printable(job_id)} is not 1 to 64 characters of A-Z, a-z, 0-9, _ and -", details
    )


def is_token(text: str) -> bool:
    """Return whether a text can stand for an embedding: 1 to 100 characters, none is a space."""
    return 0 < len(text) <= MAX_TOKEN and text.isprintable() and not any(map(str.isspace, text))


def used_loras(cells: Iterable[GenerateRequest]) -> tuple[LoraSpec, ...]:
    """Return the LoRAs with a weight, of all images of a job: each file once, with each alpha."""
    found: dict[tuple[object, ...], LoraSpec] = {}
    for cell in cells:
        for spec in cell.loras:
            if spec.is_used:
                found.setdefault((spec.file, spec.alpha), spec)
    return tuple(found.values())


def image_key(job_id: str, index: int, output_format: OutputFormat) -> str:
    """Object key of a job's image with this index; raise `InvalidJobId`."""
    return f"runs/{check_job_id(job_id)}/outputs/{index}.{output_format}"


def sheet_key(job_id: str) -> str:
    """Object key of the contact sheet of a sweep; raise `InvalidJobId`."""
    return f"runs/{check_job_id(job_id)}/outputs/sheet.jpeg"


def manifest_key(job_id: str) -> str:
    """Object key of a job's manifest; raise `InvalidJobId`."""
    return f"runs/{check_job_id(job_id)}/manifest.json"


def seed_of(job_id: str) -> int:
    """Seed of a job without one: the same for each delivery, with room for `MAX_IMAGES` seeds."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8]) % (MAX_SEED - MAX_IMAGES)


def parse_request(document: object) -> GenerateRequest:
    """Check a request, as JSON data or a `GenerateRequest`.

    Raises `InvalidRequest` with `path`, `value` and `expected` of the first field that is wrong.
    """
    data = document
    try:
        if isinstance(document, GenerateRequest):  # a struct does not check its fields itself
            data = msgspec.to_builtins(document)
    except TypeError as error:
        details = {"path": "$", "value": printable(document), "expected": "JSON data"}
        raise InvalidRequest(f"$: {error}", details) from None
    try:
        request = msgspec.convert(data, GenerateRequest)
        request = _with_checked_sweep(request)
        msgspec.json.encode(request)  # fails for half a surrogate pair, which JSON can spell
    except msgspec.ValidationError as error:
        raise _explained(str(error), data) from None
    except UnicodeEncodeError:
        raise invalid("$", data, "Expected text that UTF-8 can carry") from None
    inline = _check_prompt("$.prompt", request.prompt, request.prompt_syntax).loras
    _check_prompt("$.negative_prompt", request.negative_prompt, request.prompt_syntax)
    if (count := len(request.loras) + len(inline)) > MAX_LORAS:
        expected = f"Expected at most {MAX_LORAS} LoRAs in prompt and `loras`, got {count}"
        raise invalid("$.prompt", request.prompt, expected)
    _check_sampling(request)
    _check_image(request)
    _check_loras(request)
    return request


def _check_paths(request: GenerateRequest, paths: Collection[str]) -> None:
    """Raise `InvalidRequest` if a sweep has wrong paths, or too many images."""
    for path in paths:
        if not sweeps.is_path(path):
            fields = ", ".join(sweeps.FIELDS[1:])
            expected = f"Expected paths such as loras[0].weight, or one of {fields}"
            raise invalid("$.sweep", field_name(path), expected)
        if any(other.startswith((f"{path}.", f"{path}[")) for other in paths):
            expected = "Expected no path that is within the value of another one"
            raise invalid("$.sweep", path, expected)
    if (count := request.image_count) > sweeps.MAX_CELLS:
        raise invalid("$.sweep", count, f"Expected at most {sweeps.MAX_CELLS} images in all")
    for field in ("num_images", "batch_size"):
        if (value := getattr(request, field)) > 1:
            raise invalid(f"$.{field}", value, "Expected 1 with `sweep`")


def _with_checked_sweep(request: GenerateRequest) -> GenerateRequest:
    """Return the request with the values of its sweep as the fields have them, such as 1.0 for 1.

    Raises `InvalidRequest` if one of the images could not be a job of its own.
    """
    if request.sweep is None:
        return request
    path = "$.sweep"
    _check_paths(request, request.sweep)
    document = msgspec.to_builtins(structs.replace(request, sweep=None))
    parse_request(document)
    # By what was given, which may be neither hashable nor of one type.
    values: dict[str, dict[str, Any]] = {name: {} for name in request.sweep}
    loras: set[tuple[object, ...]] = set()
    for index, cell in enumerate(sweeps.cells(request.sweep)):
        try:
            found = parse_request(sweeps.with_values(document, cell))
        except LookupError as missing:
            expected = f"Expected paths of the request, which has no `{missing}`"
            raise invalid(path, ", ".join(cell), expected) from None
        except InvalidRequest as error:
            details = error.details
            expected = f"{details['expected']} at {details['path']} of image {index}"
            message = f"{path}: {expected}; the value is {details['value']}"
            details = details | {"path": path, "expected": expected, "image": index}
            raise InvalidRequest(message, details) from None
        loras |= {(spec.file.address, spec.alpha) for spec in found.loras}
        tags = prompt_syntax.parse(found.prompt, found.prompt_syntax).loras
        loras |= {(f"lora://{tag.name}", None) for tag in tags}
        for name, value in cell.items():
            values[name][repr(value)] = msgspec.to_builtins(sweeps.value_at(found, name))
    if len(loras) > sweeps.MAX_LORAS:
        raise invalid(path, len(loras), f"Expected at most {sweeps.MAX_LORAS} different LoRAs")
    checked = {
        name: tuple(values[name][repr(value)] for value in given)
        for name, given in request.sweep.items()
    }
    if (size := len(json.dumps(document | {"sweep": checked}))) > sweeps.MAX_BYTES:
        raise invalid(path, size, f"Expected at most {sweeps.MAX_BYTES} bytes of JSON in all")
    return structs.replace(request, sweep=checked)


def _check_prompt(path: str, text: str, syntax: PromptSyntax) -> ParsedPrompt:
    """Refuse what this syntax does not have, and what no tokenizer is needed to count."""
    try:
        parsed = prompt_syntax.parse(text, syntax)
    except ValueError as error:
        raise invalid(path, text, str(error)) from None
    if len(parsed.sections) > MAX_WINDOWS:
        count = len(parsed.sections)
        raise invalid(path, text, f"Expected at most {MAX_WINDOWS} windows, got at least {count}")
    if parsed.loras and path != "$.prompt":
        raise invalid(path, text, "Expected LoRA tags in `prompt` only")
    return parsed


def _check_sampling(request: GenerateRequest) -> None:
    """Raise `InvalidRequest` if no base model could honour the fields of the scheduler."""
    name, schedule = request.scheduler, request.schedule
    place = "scheduler" if schedule is None else "schedule"  # a name may have a schedule too
    if name is not None:
        if (found := find_scheduler(name)) is None:
            names = ", ".join(nearest_schedulers(name) or SCHEDULERS)
            raise invalid("$.scheduler", name, f"Expected the name of a scheduler, such as {names}")
        if schedule and found.schedule and schedule != found.schedule:
            expected = f"Expected {found.schedule}, the schedule in the name of the scheduler"
            raise invalid("$.schedule", schedule, expected)
        schedule = schedule or found.schedule
        missing = unsupported(found.name, schedule=schedule, given=request.given_sampling)
        if missing is not None:
            field, expected = missing
            if field == "schedule":
                field = place
            raise invalid(f"$.{field}", getattr(request, field), expected)
    levels = [field for field in request.given_sampling if field != "eta"]
    if len(levels) > 1:
        raise invalid("$.sigmas", request.sigmas, "Expected no `sigmas` with `timesteps`")
    for field in levels:
        numbers = getattr(request, field)
        if any(later >= earlier for earlier, later in pairwise(numbers)):
            raise invalid(f"$.{field}", numbers, "Expected numbers that fall")
        if schedule:
            expected = f"Expected no schedule with `{field}`"
            raise invalid(f"$.{place}", getattr(request, place), expected)
        steps = request.num_inference_steps
        if steps not in (None, request.steps):
            expected = f"Expected {request.steps}, the number of the `{field}`, or no number"
            raise invalid("$.num_inference_steps", steps, expected)
    if request.sigmas and request.steps == 0:
        raise invalid("$.sigmas", request.sigmas, "Expected a number above 0")


def _check_loras(request: GenerateRequest) -> None:
    """Raise `InvalidRequest` for strengths over steps, or by block, that contradict each other."""
    for index, spec in enumerate(request.loras):
        path = f"$.loras[{index}]"
        if spec.weights is not None:
            shares = [share for share, _ in spec.weights]
            if shares[0] != 0 or any(later <= earlier for earlier, later in pairwise(shares)):
                expected = "Expected shares of the steps that begin with 0 and rise"
                raise invalid(f"{path}.weights", shares, expected)
            for field in ("weight", "unet_weight"):
                if (value := getattr(spec, field)) is not None:
                    raise invalid(f"{path}.{field}", value, f"Expected no `{field}` with `weights`")
            if spec.start > 0 or spec.end < 1:
                expected = "Expected no `weights` with `start` or `end`"
                raise invalid(f"{path}.weights", spec.weights, expected)
        if spec.start >= spec.end:
            raise invalid(f"{path}.end", spec.end, f"Expected a number above {spec.start}, `start`")
        if spec.has_schedule and spec.text_encoder_weight:
            raise invalid(f"{path}.text_encoder_weight", spec.text_encoder_weight, TEXT_IS_CONSTANT)
        try:
            unet_blocks.require_distinct(spec.blocks or ())
        except ValueError as error:
            raise invalid(f"{path}.blocks", spec.blocks, str(error)) from None
    if request.num_inference_steps or request.timesteps or request.sigmas:
        require_steps_of_loras(request)


def require_steps_of_loras(request: GenerateRequest) -> None:
    """Raise `InvalidRequest` if a LoRA has a weight at none of the request's steps."""
    for index, spec in enumerate(request.loras):
        if not spec.has_schedule or not spec.is_used:
            continue
        if not any(weight for _, weight in spec.weights_by_step(request.drawn_steps)):
            field = "start" if spec.weights is None else "weights"
            steps = f"{request.drawn_steps} steps that are drawn"
            expected = f"Expected a weight at some of the {steps}, or `weight` 0"
            raise invalid(f"$.loras[{index}].{field}", getattr(spec, field), expected)


def weight_at(weights: Sequence[tuple[float, float]], share: float) -> float:
    """Return the last of the weights whose share of the steps is not beyond this one."""
    return next(weight for start, weight in reversed(weights) if start <= share)


def _check_image(request: GenerateRequest) -> None:
    """Raise `InvalidRequest` if no image could be drawn with these fields."""
    needs = {"mask": "image", "strength": "image", "mask_blur": "mask", "mask_invert": "mask"}
    for field, other in needs.items():
        value = getattr(request, field)
        if value and getattr(request, other) is None:
            raise invalid(f"$.{field}", value, f"Expected no `{field}` without `{other}`")
    for field, asset in request.images.items():
        if asset.config_sha256 is not None:
            expected = "Expected no `config_sha256` in the file of an image"
            raise invalid(f"$.{field}.config_sha256", asset.config_sha256, expected)
    require_drawn_steps(request)
    if request.upscale is not None:
        if request.mask is not None:
            expected = "Expected no `upscale` with `mask`: it would draw all of the image anew"
            raise invalid("$.upscale", request.upscale.factor, expected)
        if request.width is not None and request.height is not None:
            require_upscaled_size(request)


def require_upscaled_size(request: GenerateRequest) -> None:
    """Raise `InvalidRequest` if the second pass is too large, for a request with a size."""
    upscale, width, height = request.upscale, request.width, request.height
    if upscale is None or width is None or height is None:
        return
    if max(upscale.size(width, height)) > MAX_SIDE:
        expected = f"Expected sides of at most {MAX_SIDE} pixels after it, of {width} x {height}"
        raise invalid("$.upscale.factor", upscale.factor, expected)


def require_drawn_steps(request: GenerateRequest) -> None:
    """Raise `InvalidRequest` if the strength leaves no step to draw."""
    if request.drawn_steps < 1:
        expected = (
            f"Expected {1 / request.steps:.3g} at least, to draw one of {request.steps} steps"
        )
        raise invalid("$.strength", request.image_strength, expected)
    second = request.second_pass
    if second is not None and second.drawn_steps < 1:
        expected = f"Expected {1 / second.steps:.3g} at least, to draw one of {second.steps} steps"
        raise invalid("$.upscale.strength", second.image_strength, expected)


def digest_of(request: GenerateRequest) -> str:
    """SHA-256 in hex of the request's JSON without default values.

    The same request has the same digest whether a default is written out or not, and in later
    versions.
    """
    document = msgspec.json.encode(_without_defaults(request), order="deterministic")
    return hashlib.sha256(document).hexdigest()


# Defaults of earlier versions, whose digests leave these values out.
_FORMER_DEFAULTS: Final = {
    "num_inference_steps": STEPS,
    "guidance_scale": GUIDANCE_SCALE,
    "weight": WEIGHT,
}


def _without_defaults(value: object) -> object:
    if isinstance(value, tuple):
        return [_without_defaults(item) for item in value]
    if not isinstance(value, Struct):
        return value
    found = {}
    for field in structs.fields(value):
        given = getattr(value, field.name)
        if given != field.default and given != _FORMER_DEFAULTS.get(field.name):
            found[field.name] = _without_defaults(given)
    return found


def to_dict(value: Struct) -> dict[str, Any]:
    """Return the JSON document of a struct, as Celery's serializer accepts it."""
    document: dict[str, Any] = msgspec.to_builtins(value)
    return document


def enum_fields() -> dict[str, tuple[str, ...]]:
    """Return the fields of a request and its LoRAs that take one of several words, with these."""
    found = {}
    documents = (GenerateRequest, LoraSpec, Asset, Upscale)
    for field in (field for struct in documents for field in structs.fields(struct)):
        kinds = [field.type, *get_args(field.type)]  # a Literal, or a union with one
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        if words:
            found[field.name] = tuple(map(str, words))
    return found


_PATH: Final = re.compile(r" - at `\$(?P<path>[^`]*)`$")
_UNKNOWN_FIELD: Final = re.compile(r"(?<=unknown field `).*(?=`)", re.DOTALL)
_PROMPT_PATHS: Final = ("$", "$.prompt", "$.negative_prompt")  # texts that logs must not contain


def invalid(path: str, value: object, expected: str) -> InvalidRequest:
    """Return the error of a wrong value, which is shown without secrets and prompts."""
    shown = printable(value)
    if isinstance(value, str) and path in _PROMPT_PATHS:
        shown = f"a text of {len(value)} characters"
    details = {"path": path, "value": shown, "expected": expected}
    return InvalidRequest(f"{path}: {expected}; the value is {shown}", details)


def _explained(reason: str, document: object) -> InvalidRequest:
    """Add the wrong value to what msgspec says of its place and its bound."""
    found = _PATH.search(reason)
    path = found["path"] if found else ""
    expected = _UNKNOWN_FIELD.sub(lambda name: field_name(name[0]), _PATH.sub("", reason))[:200]
    if expected.startswith("Invalid enum value"):
        name = path.rpartition(".")[2].partition("[")[0]  # `[0]` follows the name of a list
        expected = f"Expected one of {', '.join(enum_fields()[name])}"
    value: Any = document
    try:
        for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
            value = value[key] if key else value[int(index)]
    except (IndexError, KeyError, TypeError):  # not a path, but part of the name of a field
        value = document
    return invalid(f"${path}", value, expected)
