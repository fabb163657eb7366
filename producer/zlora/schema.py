"""What travels: the request, the result, and their bounds. Docs and checks are made from these types."""

import hashlib
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from zlora.errors import InvalidJobId, InvalidRequest
from zlora.redaction import printable

TASK_NAME: Final = "zlora.generate"
QUEUE: Final = "gpu"  # default; one base model per queue
MAX_SEED: Final = 2**53 - 1  # JSON readers that use doubles corrupt greater integers
MAX_IMAGES: Final = 8
MAX_URL_SECONDS: Final = 604_800  # seven days: no signature of S3 holds for longer
_REPOSITORY: Final = re.compile(
    r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?", re.ASCII
)  # of Hugging Face, by itself
JOB_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)  # it becomes a path and an object key

Address = Annotated[str, Meta(min_length=1, max_length=4096)]
Weight = Annotated[float, Meta(ge=-4, le=4)]  # NaN and Inf fall outside the bounds
Side = Annotated[int, Meta(ge=64, le=4096, multiple_of=8)]  # pixels; 8 is the VAE's factor
Text = Annotated[str, Meta(max_length=10_000)]  # characters; the model itself reads 77 tokens
OutputFormat = Literal["png", "jpeg", "webp"]
CONTENT_TYPES: Final[
    dict[str, OutputFormat]
] = {  # media types (RFC 6838); the format is the extension
    "image/png": "png",
    "image/jpeg": "jpeg",
    "image/webp": "webp",
}
LoraTier = Literal["memory", "disk", "network"]  # where a LoRA file came from
UrlPolicy = Literal["presigned", "public", "file", "key"]
Scheduler = Literal[
    "ddim", "dpmpp_2m", "dpmpp_2m_karras", "euler", "euler_ancestral", "heun", "lcm", "unipc"
]


class Asset(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """Where a file is: exactly one of `url`, `cozy_ref` and `ref`, which is either of the two."""

    url: Address | None = None
    cozy_ref: Address | None = None
    ref: Address | None = None
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("url", "cozy_ref", "ref") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"Expected exactly one of `url`, `cozy_ref`, `ref`, got {', '.join(given) or 'none'}"
            )

    @property
    def address(self) -> str:
        """One spelling for all forms: a URL; a hub reference has the scheme `cozy`, a bare `owner/repo` has `hf`."""
        if self.url and _REPOSITORY.fullmatch(self.url):
            return f"hf://{self.url}"
        if self.url or (self.ref and "://" in self.ref):
            return str(self.url or self.ref)
        return f"cozy://{self.cozy_ref or self.ref}"


class LoraSpec(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One LoRA of a job. `adapter_name` is a label for the receipt and names nothing inside the worker."""

    file: Asset
    weight: Weight = 1.0
    unet_weight: Weight | None = None  # instead of `weight`, in the UNet
    text_encoder_weight: Weight | None = None  # instead of `weight`, in both text encoders
    strict: bool = True  # refuse a file of which a part lands nowhere in the model
    adapter_name: Annotated[str, Meta(max_length=200)] | None = None

    @property
    def component_weights(self) -> tuple[float, float]:
        """Weights in the UNet and in the text encoders; `weight` if a component has none of its own."""
        unet, text = self.unet_weight, self.text_encoder_weight
        return self.weight if unet is None else unet, self.weight if text is None else text


class GenerateRequest(
    Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """One job. Absent `width` and `height` mean the model's native size; an absent `seed` comes from the job id."""

    prompt: Text
    negative_prompt: Text = ""
    loras: Annotated[tuple[LoraSpec, ...], Meta(max_length=8)] = ()
    num_inference_steps: Annotated[int, Meta(ge=1, le=200)] = 28
    guidance_scale: Annotated[float, Meta(ge=0, le=50)] = 7.5
    width: Side | None = None
    height: Side | None = None
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    num_images: Annotated[int, Meta(ge=1, le=MAX_IMAGES)] = 1
    scheduler: Scheduler | None = None  # None is the model's own
    output_format: OutputFormat = "png"
    quality: Annotated[int, Meta(ge=1, le=100)] | None = None  # of jpeg and webp; None is 95
    lossless: bool = False  # webp that keeps every pixel, as png does
    embed_metadata: bool = True  # write into each picture what draws it again
    url_policy: UrlPolicy | None = None  # None is the operator's first
    url_expires_in: Annotated[int, Meta(ge=1, le=MAX_URL_SECONDS)] | None = (
        None  # seconds; None is the operator's
    )
    inline: bool = False  # small pictures come as data URIs too
    timeout: Annotated[float, Meta(gt=0, le=86_400)] | None = (
        None  # seconds from its start; None is the operator's bound
    )

    def __post_init__(self) -> None:
        if self.seed is not None and self.seed + self.num_images - 1 > MAX_SEED:
            raise ValueError(f"Expected `seed` + `num_images` - 1 <= {MAX_SEED}")
        if self.lossless and self.output_format != "webp":
            raise ValueError(
                "Expected `lossless` with `output_format` webp only: png always is, jpeg never"
            )
        if self.quality is not None and self.keeps_pixels:
            raise ValueError("Expected no `quality` where every pixel is kept")
        if self.url_expires_in is not None and self.url_policy not in (None, "presigned"):
            raise ValueError("Expected `url_expires_in` with `url_policy` presigned only")

    @classmethod
    def from_fal(cls, document: Mapping[str, Any]) -> "GenerateRequest":
        """The request that a document of fal's endpoints means; raises `InvalidRequest` as `read_request` does."""
        from zlora.contrib import fal

        return fal.read(document)

    def seed_for(self, job_id: str) -> int:
        """Seed of the first image: the request's own, or one made from the job id."""
        return seed_of(job_id) if self.seed is None else self.seed

    @property
    def keeps_pixels(self) -> bool:
        """Whether its pictures are stored as they are drawn."""
        return self.output_format == "png" or self.lossless


class ImageRef(Struct, frozen=True, kw_only=True):
    """One picture in the store. `size` is in bytes, and `sha256` the file's.

    `url` is as the request's `url_policy` has it, None for `key`; `url_expires_at` is in seconds since the epoch, or
    sooner where the worker's own credentials end sooner.
    `pixels_sha256` is of the RGB bytes as they were drawn, row by row, and `tiled` says how that was. `data_uri`
    (RFC 2397) is there where the request says `inline` and the operator's bound allows it.
    """

    key: str
    width: int
    height: int
    content_type: str
    size: int
    sha256: str
    seed: int
    url: str | None = None
    url_expires_at: float | None = None
    pixels_sha256: str | None = None
    tiled: bool = False
    data_uri: str | None = None


class LoraReceipt(Struct, frozen=True, kw_only=True):
    """What was used of one LoRA.

    `source` has no query and no credentials. `format` is the tool that spells tensors so, `kinds` are the kinds of
    change, `ranks` those found, ascending. `modules` counts the layers changed in each component, `unmatched` the
    tensors that land nowhere, of which `unmatched_names` are the first. `relative_norm` is |change| / |weight| over the
    weights that it touches. `tier` is where it came from; `milliseconds` has one entry a phase. `tensors_sha256` is of
    the file without its header, by which A1111 and Civitai (as AutoV3) name a LoRA.
    """

    source: str
    sha256: str
    size: int
    format: str
    ranks: tuple[int, ...]
    unet_weight: float
    text_encoder_weight: float
    modules: dict[str, int]
    tier: LoraTier
    milliseconds: dict[str, float]
    adapter_name: str | None = None
    kinds: tuple[str, ...] = ()
    unmatched: dict[str, int] = {}
    unmatched_names: tuple[str, ...] = ()
    relative_norm: float | None = None
    tensors_sha256: str | None = None


class GenerateResult(Struct, frozen=True, kw_only=True):
    """Pictures and receipt; fields may be added, never changed.

    `timings` are seconds by phase: `tail` is what storing the pictures took after the last one was drawn; `encode` and
    `upload` were done beside the drawing, and add nothing. `base_intact` says that the base was compared with what was
    loaded, after the job; `base_checked` is the share of its bytes that was read for that. `tiled` says that memory
    sufficed for a decode in tiles only, which differs a little. `attempt` counts from 1; `started_at` and `finished_at`
    are seconds since the epoch on the worker's clock, and `request_sha256` names the request.

    What draws the pictures again: `request`, whose addresses have no query and whose LoRAs are pinned; `base_sha256`,
    of the base's weights as they lay in memory, and `model_sha256`, of the single file that they came from;
    `scheduler`, as diffusers names it; `device`, `dtype`, and on a CPU the `threads`, on which the last bits depend.
    """

    job_id: str
    images: tuple[ImageRef, ...]
    loras: tuple[LoraReceipt, ...]
    seed: int
    timings: dict[str, float]
    base_intact: bool
    model: str
    versions: dict[str, str]
    base_checked: float = 1.0
    tiled: bool = False
    attempt: int = 1
    started_at: float | None = None
    finished_at: float | None = None
    request_sha256: str | None = None
    request: GenerateRequest | None = None
    base_sha256: str | None = None
    model_sha256: str | None = None
    scheduler: str | None = None
    device: str | None = None
    dtype: str | None = None
    threads: int | None = None

    def to_fal(self) -> dict[str, Any]:
        """The answer of fal's endpoints; raises `InvalidRequest` where a picture has no URL."""
        from zlora.contrib import fal

        return fal.written(self)


class Phase(StrEnum):
    """A step of a job, by its name in `timings` and in metrics.

    `progress_name` is the name of the same step in `JobStatus.phase`.
    """

    QUEUED = "queued"
    FETCH = "fetch"
    PARSE = "parse"
    APPLY = "apply"
    DENOISE = "denoise"
    RESTORE = "restore"
    TAIL = "tail"  # from the last image to the last upload
    ENCODE = "encode"  # beside the denoising
    UPLOAD = "upload"  # beside the denoising
    WAIT = "waiting"  # before a retry; has no timing

    @property
    def progress_name(self) -> str:
        """Name of this step in `JobStatus.phase`."""
        return _PROGRESS_NAMES.get(self, self.value)


_PROGRESS_NAMES: Final = {
    Phase.FETCH: "fetching",
    Phase.PARSE: "loading",
    Phase.DENOISE: "denoising",
    Phase.UPLOAD: "uploading",
}


class JobState(StrEnum):
    """Where a job is. UNKNOWN is an id that nobody submitted by a `Client`, and of which no worker knows or answers."""

    UNKNOWN = "UNKNOWN"
    PENDING = "PENDING"
    STARTED = "STARTED"
    PROGRESS = "PROGRESS"
    RETRY = "RETRY"
    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    REVOKED = "REVOKED"


class JobStatus(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A state and, as long as there is no verdict, how far the job is.

    `phase` is queued, with `position` (jobs before it, the running ones among them); fetching, with `received` of
    `expected` bytes of the present file; loading; denoising, with the step of all images together and `eta` in seconds;
    uploading; or waiting, before a retry for the reason that `code` names. `attempt` counts from 1.
    """

    state: JobState
    phase: str | None = None
    step: int | None = None
    steps: int | None = None
    eta: float | None = None
    position: int | None = None
    received: int | None = None
    expected: int | None = None
    attempt: int | None = None
    code: str | None = None


class Cancellation(StrEnum):
    """Where a job was when it was cancelled; one that was finished stays so."""

    QUEUED = "queued"
    RUNNING = "running"
    FINISHED = "finished"
    UNKNOWN = "unknown"  # it is refused if it comes


def check_job_id(job_id: object) -> str:
    """The id itself, if it may become a path; raises `InvalidJobId`."""
    if isinstance(job_id, str) and JOB_ID.fullmatch(job_id):
        return job_id
    details = {"path": "job_id", "value": printable(job_id), "expected": JOB_ID.pattern}
    raise InvalidJobId(
        f"job id {printable(job_id)} is not 1 to 64 characters of A-Z, a-z, 0-9, _ and -", details
    )


def image_key(job_id: str, index: int, output_format: OutputFormat) -> str:
    """Object key of a job's image with this index."""
    return f"runs/{job_id}/outputs/{index}.{output_format}"


def manifest_key(job_id: str) -> str:
    """Object key of a job's manifest."""
    return f"runs/{job_id}/manifest.json"


def seed_of(job_id: str) -> int:
    """The seed of a job that names none: the same at every delivery, and with room for `MAX_IMAGES` seeds above it."""
    return int.from_bytes(hashlib.sha256(job_id.encode()).digest()[:8]) % (MAX_SEED - MAX_IMAGES)


def parse_request(document: object) -> GenerateRequest:
    """A checked request from JSON data or a `GenerateRequest`; raises `InvalidRequest` with path, value and bound."""
    try:
        data = msgspec.to_builtins(document) if isinstance(document, GenerateRequest) else document
    except TypeError as error:
        raise InvalidRequest(
            f"$: {error}", {"path": "$", "value": printable(document), "expected": "JSON data"}
        ) from None
    try:
        request = msgspec.convert(data, GenerateRequest)
        msgspec.json.encode(request)
    except msgspec.ValidationError as error:
        raise _explained(str(error), data) from None
    except UnicodeEncodeError:
        raise invalid("$", data, "Expected text that UTF-8 can carry") from None
    return request


def digest_of(request: GenerateRequest) -> str:
    """One request, one digest, whatever defaults it spells out: sha256, in hex, of its JSON without them.

    So a field that is added with a default changes no digest.
    """
    return hashlib.sha256(
        msgspec.json.encode(_without_defaults(request), order="deterministic")
    ).hexdigest()


def _without_defaults(value: object) -> object:
    if isinstance(value, tuple):
        return [_without_defaults(item) for item in value]
    if not isinstance(value, Struct):
        return value
    fields = {
        field.name: (field.default, getattr(value, field.name))
        for field in msgspec.structs.fields(value)
    }
    return {
        name: _without_defaults(given)
        for name, (default, given) in fields.items()
        if given != default
    }


def to_dict(value: Struct) -> dict[str, Any]:
    """The JSON document of a struct, as Celery's serializer takes it."""
    document: dict[str, Any] = msgspec.to_builtins(value)
    return document


_CHOICES = {
    "scheduler": get_args(Scheduler),
    "output_format": get_args(OutputFormat),
    "url_policy": get_args(UrlPolicy),
}
_PATH = re.compile(r" - at `\$(?P<path>[^`]*)`$")


def invalid(path: str, value: object, expected: str) -> InvalidRequest:
    """The error of a value that is not what was expected, with the value as it may be shown."""
    is_prompt = isinstance(value, str) and path in (
        "$",
        "$.prompt",
        "$.negative_prompt",
    )  # the log may not have them
    shown = f"a text of {len(str(value))} characters" if is_prompt else printable(value)
    details = {"path": path, "value": shown, "expected": expected}
    return InvalidRequest(f"{path}: {expected}; the value is {shown}", details)


def _explained(reason: str, document: object) -> InvalidRequest:
    """msgspec says where and what it expected; add the value that stands there."""
    found = _PATH.search(reason)
    path = found["path"] if found else ""
    expected = _PATH.sub("", reason)[:200]
    if expected.startswith("Invalid enum value"):
        expected = f"Expected one of {', '.join(_CHOICES[path.rpartition('.')[2]])}"
    return invalid(f"${path}", _value_at(document, path), expected)


def _value_at(document: object, path: str) -> object:
    value: Any = document
    try:
        for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
            value = value[key] if key else value[int(index)]
    except (IndexError, KeyError, TypeError):  # no path of msgspec's, but part of a field's name
        return document
    return value
