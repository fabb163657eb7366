"""What `generate` and `submit` are told: a request, and how to queue it."""

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
from zlora.schema import GenerateRequest, OutputFormat, Scheduler, parse_request

_WEIGHTED: Final = re.compile(
    r"(.+):([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)",
    re.ASCII | re.DOTALL | re.IGNORECASE,
)
_SIZE: Final = re.compile(r"([0-9]{1,6})x([0-9]{1,6})", re.ASCII)
_FIELDS: Final = (  # options with the name of a request's field
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "seed",
    "num_images",
    "scheduler",
    "output_format",
    "quality",
    "timeout",
)


class Order(NamedTuple):
    """A checked request, the names that its job is to have, and how to queue it."""

    request: GenerateRequest
    job_id: str | None
    idempotency_key: str | None
    options: Options

    def named(self, job_id: str) -> "Order":
        """The same, under this id where it has no name."""
        return self if self.is_named else self._replace(job_id=job_id)

    @property
    def is_named(self) -> bool:
        """Whether its job has a name of the user's, under which it may be another's as well."""
        return bool(self.job_id) or self.idempotency_key is not None

    def handle(self, client: Client) -> JobHandle:
        """The job of an order that has a name, submitted or not."""
        return client.job(self.job_id or job_id_of(self.idempotency_key or ""))

    def submit(self, client: Client) -> JobHandle:
        """Queue it."""
        names = {"job_id": self.job_id, "idempotency_key": self.idempotency_key}
        return client.submit(self.request, **names, **self.options)


def _lora(
    _ctx: click.Context, _parameter: click.Parameter, texts: tuple[str, ...]
) -> list[dict[str, Any]]:
    return [_spec(text) for text in texts]


def _spec(text: str) -> dict[str, Any]:
    """A LoRA's document from `address` or `address:weight`. An address has colons too, but none before a number."""
    found = _WEIGHTED.fullmatch(text)
    address = found[1] if found else text
    hub, name = (
        "cozy_ref" if address.startswith("cozy://") else "url",
        address.removeprefix("cozy://"),
    )
    return {"file": {hub: name}, "weight": float(found[2]) if found else 1.0}


def _sides(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> dict[str, int]:
    if text is None:
        return {}
    if (found := _SIZE.fullmatch(text)) is None:
        raise click.BadParameter(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 1024x768")
    return {"width": int(found[1]), "height": int(found[2])}


def a_number(_ctx: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    """What `float` takes, but for that which is no number: every comparison with it is false."""
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is not a number")
    return value


_OPTIONS: Final = (
    click.argument("prompt", required=False),
    click.option(
        "--lora",
        "loras",
        multiple=True,
        callback=_lora,
        metavar="ADDRESS[:WEIGHT]",
        help="May be repeated.",
    ),
    click.option("--negative", "negative_prompt", metavar="TEXT", help="What is not to be seen."),
    click.option("--steps", "num_inference_steps", type=int),
    click.option("--guidance", "guidance_scale", type=float),
    click.option("--size", callback=_sides, metavar="WIDTHxHEIGHT", help="In pixels."),
    click.option("--seed", type=int),
    click.option("-n", "num_images", type=int, help="Number of pictures."),
    click.option("--scheduler", type=click.Choice(get_args(Scheduler))),
    click.option("--format", "output_format", type=click.Choice(get_args(OutputFormat))),
    click.option("--quality", type=int, help="Of jpeg and webp, 1 to 100."),
    click.option(
        "--timeout",
        type=float,
        callback=a_number,
        metavar="SECONDS",
        help="The most that drawing may take.",
    ),
    click.option(
        "--request",
        "document",
        metavar="FILE",
        help="A document, or - for stdin; options go first.",
    ),
    click.option("--job-id"),
    click.option(
        "--idempotency-key",
        metavar="TEXT",
        help="The same key is the same job, such as an order's number.",
    ),
    click.option(
        "--priority", type=click.Choice(tuple(PRIORITIES)), default="normal", show_default=True
    ),
    click.option(
        "--expires-in",
        type=float,
        callback=a_number,
        metavar="SECONDS",
        help="Fail if the job has not begun by then.",
    ),
    click.option(
        "--preflight",
        is_flag=True,
        help="Look at the LoRAs first, and queue no job with a wrong one.",
    ),
    click.option("--webhook-url", metavar="URL", help="Where a worker tells the job's end."),
    click.option(
        "--webhook-event", "webhook_events", multiple=True, type=click.Choice(webhook.EVENTS)
    ),
)


def order_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of an order; it gets them as keywords, which `read` takes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read(given: dict[str, Any]) -> Order:
    """The order that the options make; raises `InvalidRequest`, `InvalidJobId`."""
    document = _document(given["document"])
    document |= {name: given[name] for name in _FIELDS if given[name] is not None} | given["size"]
    if given["loras"]:
        document["loras"] = given["loras"]
    if "prompt" not in document:
        raise click.UsageError(
            "Missing argument 'PROMPT', or --request with a document that has one."
        )
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
    try:
        document = json_input.read(_bytes(name))
    except InvalidRequest as error:
        raise InvalidRequest(f"--request: {error}", error.details) from None
    if not isinstance(document, dict):
        raise InvalidRequest(
            "--request: Expected a JSON object", {"path": "$", "expected": "a JSON object"}
        )
    return document


def _bytes(name: str) -> bytes:
    if name == "-" and sys.stdin is None:
        raise click.UsageError("--request: stdin is closed")
    try:
        with click.open_file(name, "rb") as file:
            data: bytes = file.read()
    except OSError as error:
        raise click.UsageError(f"--request: {name}: {error.strerror}") from None
    return data
