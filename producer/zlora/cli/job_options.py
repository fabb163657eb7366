"""Options of `generate` and `submit`: a request, and how to queue it."""

import math
import re
import sys
from collections.abc import Callable
from typing import Any, Final, NamedTuple, get_args

import click

from zlora import webhook
from zlora.broker.keys import PRIORITIES
from zlora.cli import json_input
from zlora.client import Client, Options, job_id_of
from zlora.errors import InvalidRequest
from zlora.handle import JobHandle
from zlora.prompt_syntax import PromptSyntax
from zlora.schedulers import Schedule
from zlora.schema import GenerateRequest, OutputFormat, Upscale, enum_fields, parse_request

_NUMBER: Final = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?"
_WEIGHTS: Final = rf"{_NUMBER}@{_NUMBER}"  # from a share of the steps on
_FACTORS: Final = rf"{_NUMBER}@[\w.]+"  # for a block
# An address, the number after its last colon, and options.
_LORA: Final = re.compile(
    rf"(.+?)(?::({_NUMBER}))?"
    rf"((?::(?:alpha|start|end)={_NUMBER}"
    rf"|:weights={_WEIGHTS}(?:,{_WEIGHTS})*|:blocks={_FACTORS}(?:,{_FACTORS})*)*)",
    re.ASCII | re.DOTALL | re.IGNORECASE,
)
# Names of options that are not those of their fields, as paths of `--axis`.
_SHORT_PATHS: Final = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "negative": "negative_prompt",
}
_SIZE: Final = re.compile(r"([0-9]{1,6})x([0-9]{1,6})", re.ASCII)
_FIELDS: Final = (  # options that have the name of a field of the request
    "prompt",
    "negative_prompt",
    "prompt_syntax",
    "model",
    "clip_skip",
    "image",
    "mask",
    "strength",
    "mask_blur",
    "mask_invert",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "num_images",
    "batch_size",
    "scheduler",
    "schedule",
    "eta",
    "trigger_words",
    "recipes",
    "output_format",
    "quality",
    "timeout",
)


class Order(NamedTuple):
    """A checked request, the name of its job if the user chose one, and how to queue it."""

    request: GenerateRequest
    job_id: str | None
    idempotency_key: str | None
    options: Options

    @property
    def is_named(self) -> bool:
        """Whether the user named the job, so that other programs may use it."""
        return bool(self.job_id) or self.idempotency_key is not None

    def handle(self, client: Client) -> JobHandle:
        """Return the handle of the job, which may not be submitted; the order must have a name."""
        return client.job(self.job_id or job_id_of(self.idempotency_key or ""))

    def submit(self, client: Client) -> JobHandle:
        """Submit the job."""
        return client.submit(
            self.request,
            job_id=self.job_id,
            idempotency_key=self.idempotency_key,
            **self.options,
        )


def _loras(
    _ctx: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Parse `address:weight:name=value`; weight and options may be absent.

    An address may have colons, but no number after the last one.
    """
    specs = []
    for text in texts:
        address, weight, options = text, None, ""
        if found := _LORA.fullmatch(text):
            address, weight, options = found.groups()
        spec: dict[str, Any] = {"file": _file(address)}
        if weight is not None:
            spec["weight"] = float(weight)
        for option in options.split(":")[1:]:
            name, _, value = option.partition("=")
            pairs = [pair.split("@") for pair in value.split(",")]
            match name.lower():
                case "weights":
                    spec["weights"] = [[float(share), float(number)] for number, share in pairs]
                case "blocks":
                    spec["blocks"] = {block: float(number) for number, block in pairs}
                case field:
                    spec[field] = float(value)
        specs.append(spec)
    return specs


def _embeddings(
    _ctx: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Parse `token=address` or `address`, which has a slash before its first equals sign."""
    specs = []
    for text in texts:
        token, mark, address = text.partition("=")
        spec: dict[str, Any] = {"file": _file(text)}
        if mark and "/" not in token:
            spec = {"file": _file(address), "token": token}
        specs.append(spec)
    return specs


def _image(
    _ctx: click.Context, _parameter: click.Parameter, address: str | None
) -> dict[str, str] | None:
    return None if address is None else _file(address)


def _axes(
    _ctx: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]
) -> dict[str, list[Any]]:
    """Parse `path=value,value` or `path=[...]`, an array in JSON.

    What is not a number, a truth value or null in JSON is a text.
    """
    axes: dict[str, list[Any]] = {}
    for text in texts:
        path, mark, values = text.partition("=")
        if not mark or not values.strip():
            raise click.BadParameter(f"{text!r} is not PATH=VALUE,VALUE, such as seed=1,2,3")
        path = _SHORT_PATHS.get(path, path)
        if path in axes:
            raise click.BadParameter(f"{path} is given twice")
        if values.lstrip().startswith("["):
            try:
                axes[path] = json_input.read(values.encode())
            except InvalidRequest as error:
                raise click.BadParameter(f"{path}: {error}") from None
        else:
            axes[path] = [_value(value.strip()) for value in values.split(",")]
        if path.endswith(".file"):
            axes[path] = [_file(item) if isinstance(item, str) else item for item in axes[path]]
    return axes


def _value(text: str) -> Any:
    try:
        return json_input.read(text.encode())
    except InvalidRequest:
        return text


def _file(address: str) -> dict[str, str]:
    if address.startswith("cozy://"):
        return {"cozy_ref": address.removeprefix("cozy://")}
    return {"url": address}


def _size(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    if (found := _SIZE.fullmatch(text)) is None:
        raise click.BadParameter(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 1024x768")
    return {"width": int(found[1]), "height": int(found[2])}


def reject_nan(
    _ctx: click.Context, _parameter: click.Parameter, value: float | None
) -> float | None:
    """Reject NaN, which click takes for a number of any range."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is not a number")
    return value


_OPTIONS: Final = (
    click.argument("prompt", required=False),
    click.option(
        "--model",
        metavar="NAME",
        help="Base model, one of those that the workers serve.  [default: their first]",
    ),
    click.option(
        "--lora",
        "loras",
        multiple=True,
        callback=_loras,
        metavar="ADDRESS[:WEIGHT][:OPTION=VALUE]...",
        help="LoRA, may be repeated. ADDRESS is a URL, `hf://owner/repo/file`, `owner/repo`, "
        "`civitai://<version id>`, `lora://` with a name of the workers' catalogue, or another "
        "that the workers may open. Options: alpha=8 for a file that has none; start=0.2 and "
        "end=0.8, shares of the steps; weights=1@0,0.3@0.5, each from a share of the steps on; "
        "blocks=0.5@down.1,0@mid, factors of the weight.",
    ),
    click.option(
        "--trigger-words",
        type=click.Choice(enum_fields()["trigger_words"]),
        help="Add the catalogue's trigger words of the LoRAs to the prompt, or only list them.",
    ),
    click.option(
        "--recipes",
        type=click.Choice(enum_fields()["recipes"]),
        help="Let few-step LoRAs set scheduler, steps and guidance scale that are not given, or "
        "not.  [default: auto]",
    ),
    click.option(
        "--embedding",
        "embeddings",
        multiple=True,
        callback=_embeddings,
        metavar="[TOKEN=]ADDRESS",
        help="Embedding (textual inversion) for the word TOKEN of the prompts, may be repeated. "
        "ADDRESS is one as of a LoRA; TOKEN is by default the word in the file, or its name.",
    ),
    click.option(
        "--image",
        callback=_image,
        metavar="ADDRESS",
        help="Image to start from: an address as of a LoRA, or `job:<id>#<index>`, an image of an "
        "earlier job.",
    ),
    click.option(
        "--mask",
        callback=_image,
        metavar="ADDRESS",
        help="Mask of the image's size: what is white is drawn anew.",
    ),
    click.option(
        "--strength",
        type=float,
        callback=reject_nan,
        help="Share of the steps that are drawn from the image, up to 1.  [default: 0.75]",
    ),
    click.option(
        "--mask-blur",
        type=float,
        callback=reject_nan,
        metavar="PIXELS",
        help="Soften the edge of the mask.",
    ),
    click.option(
        "--mask-invert", is_flag=True, default=None, help="Draw anew what is black in the mask."
    ),
    click.option(
        "--upscale",
        "upscale_factor",
        type=float,
        callback=reject_nan,
        metavar="FACTOR",
        help="Draw a second pass at a size larger by FACTOR, up to 4 (hires fix).",
    ),
    click.option(
        "--upscale-strength",
        type=float,
        callback=reject_nan,
        help="Share of the steps that the second pass draws, up to 1.  [default: 0.5]",
    ),
    click.option(
        "--upscale-steps", type=int, help="Denoising steps of the second pass, as --steps."
    ),
    click.option(
        "--upscale-mode",
        type=click.Choice(enum_fields()["mode"]),
        help="Enlarge the decoded image, or its latent.  [default: image]",
    ),
    click.option(
        "--negative", "negative_prompt", metavar="TEXT", help="What the image must not show."
    ),
    click.option(
        "--prompt-syntax",
        type=click.Choice(get_args(PromptSyntax)),
        help="Syntax of both prompts; a1111 has weights, `(word:1.3)`, and BREAK.",
    ),
    click.option("--clip-skip", type=int, help="Layers of the text encoders to skip."),
    click.option("--steps", "num_inference_steps", type=int, help="Denoising steps."),
    click.option("--guidance", "guidance_scale", type=float, help="Guidance scale."),
    click.option("--size", callback=_size, metavar="WIDTHxHEIGHT", help="Size in pixels."),
    click.option("--seed", type=int, help="Seed of the first image.  [default: from the job id]"),
    click.option("-n", "num_images", type=int, help="Number of images."),
    click.option("--batch-size", type=int, help="Images to draw at once: 1, 2, 4 or 8."),
    click.option(
        "--axis",
        "axes",
        multiple=True,
        callback=_axes,
        metavar="PATH=VALUE,...",
        help="Values of a field, by its path in the request, such as `seed=1,2,3` or "
        "`loras[0].weight=0,0.5,1`; may be repeated. An image is drawn for each combination. "
        'Texts with commas are an array in JSON: `prompt=["a, b", "c"]`. '
        "`steps`, `guidance` and `negative` are paths, too, and `loras[0].file` takes addresses.",
    ),
    click.option(
        "--scheduler",
        metavar="NAME",
        help="Sampler, such as `euler_ancestral` or `DPM++ 2M Karras`.",
    ),
    click.option(
        "--schedule", type=click.Choice(get_args(Schedule)), help="Spacing of the noise levels."
    ),
    click.option("--eta", type=float, help="Noise that ddim and tcd add, 0 to 1."),
    click.option(
        "--format",
        "output_format",
        type=click.Choice(get_args(OutputFormat)),
        help="Format of the images.",
    ),
    click.option("--quality", type=int, help="Quality of jpeg and webp, 1 to 100."),
    click.option(
        "--timeout",
        type=float,
        callback=reject_nan,
        metavar="SECONDS",
        help="Fail if drawing takes longer.",
    ),
    click.option(
        "--request",
        "document",
        metavar="FILE",
        help="Request in JSON, or - for stdin; other options replace its fields.",
    ),
    click.option("--job-id", help="Id of the job; the same id is the same job."),
    click.option(
        "--idempotency-key",
        metavar="TEXT",
        help="Text from which the job id is made, such as the number of an order.",
    ),
    click.option(
        "--priority",
        type=click.Choice(tuple(PRIORITIES)),
        default="normal",
        show_default=True,
        help="Priority in the queue.",
    ),
    click.option(
        "--expires-in",
        type=float,
        callback=reject_nan,
        metavar="SECONDS",
        help="Fail if the job has not begun by then.",
    ),
    click.option(
        "--preflight",
        is_flag=True,
        help="Read the headers of the LoRAs first, and do not submit a job with a wrong one.",
    ),
    click.option("--webhook-url", metavar="URL", help="URL that gets the end of the job."),
    click.option(
        "--webhook-event",
        "webhook_events",
        multiple=True,
        type=click.Choice(webhook.EVENTS),
        help="Event that the URL gets, may be repeated.  [default: all]",
    ),
)


def add_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorate a command with the options of a job, which it passes on to `read` as keywords."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read(given: dict[str, Any]) -> Order:
    """Return the order that the options describe; raise `InvalidRequest` or `InvalidJobId`."""
    document = _document(given["document"])
    document |= {name: given[name] for name in _FIELDS if given[name] is not None} | given["size"]
    for name in ("loras", "embeddings"):
        if given[name]:
            document[name] = given[name]
    if given["axes"]:
        document["sweep"] = given["axes"]
        if prompts := given["axes"].get("prompt"):
            document.setdefault("prompt", prompts[0])
    upscale = {name: given[f"upscale_{name}"] for name in Upscale.__struct_fields__}
    upscale = {name: value for name, value in upscale.items() if value is not None}
    if upscale:
        document["upscale"] = (document.get("upscale") or {}) | upscale
    if "prompt" not in document:
        raise click.UsageError("Missing argument 'PROMPT', or --request with a prompt.")
    options: Options = {
        "priority": given["priority"],
        "expires_in": given["expires_in"],
        "preflight": given["preflight"],
        "webhook_url": given["webhook_url"],
        "webhook_events": given["webhook_events"] or None,
    }
    return Order(parse_request(document), given["job_id"], given["idempotency_key"], options)


def _document(name: str | None) -> dict[str, Any]:
    if name is None:
        return {}
    if name == "-" and sys.stdin is None:
        raise click.UsageError("--request: stdin is closed")
    try:
        with click.open_file(name, "rb") as file:
            document = json_input.read(file.read())
    except OSError as error:
        raise click.UsageError(f"--request: {name}: {error.strerror}") from None
    except InvalidRequest as error:
        raise InvalidRequest(f"--request: {error}", error.details) from None
    if not isinstance(document, dict):
        details = {"path": "$", "expected": "a JSON object"}
        raise InvalidRequest("--request: Expected a JSON object", details)
    return document
