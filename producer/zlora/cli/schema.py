"""`zlora schema`: the documents that travel, as JSON Schema."""

import inspect
import json
from datetime import datetime
from typing import Any, Final, Literal

import click
from msgspec import Struct

from zlora.cli.printing import json_option, print_json
from zlora.schema import GenerateRequest, GenerateResult, JobStatus

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


class Failure(Struct, frozen=True, kw_only=True):
    """Why a job, or a command, has failed: `code` is for programs, `message` for people."""

    code: str
    message: str
    retryable: bool
    details: dict[str, Any]


class WebhookData(Struct, frozen=True, kw_only=True):
    """The job, and its `result` or its `error`."""

    job_id: str
    result: GenerateResult | None = None
    error: Failure | None = None


class Webhook(Struct, frozen=True, kw_only=True):
    """The body of a webhook: the end of a job, at `timestamp`."""

    type: Literal["job.succeeded", "job.failed", "job.cancelled"]
    timestamp: datetime
    data: WebhookData


_TYPES: Final[dict[str, Any]] = {
    "request": GenerateRequest,
    "result": GenerateResult,
    "event": JobStatus,
    "error": Failure,
    "webhook": Webhook,
}


@click.command()
@click.argument("document", type=click.Choice(list(_TYPES)), default="request")
@json_option
def schema(document: str, as_json: bool) -> None:
    """Print the JSON Schema (2020-12) of DOCUMENT.

    That is a `request`, a `result`, an `event`: how far a job is, an `error`, or the body of a `webhook`. What it
    cannot say, such as that an asset has one address, is checked where a request is submitted. With --json it is one
    line.
    """
    found = {"$schema": _DIALECT, **_schema_of(_TYPES[document])}
    if as_json:
        print_json(found)
    else:
        click.echo(json.dumps(found, indent=2))


def _schema_of(kind: Any) -> dict[str, Any]:
    """The type's own schema at the top, and those that it names under `$defs`."""
    import msgspec

    found = _portable(msgspec.json.schema(kind))
    own: dict[str, Any] = found["$defs"].pop(kind.__name__)
    return own | ({"$defs": found["$defs"]} if found["$defs"] else {})


def _portable(node: Any) -> Any:
    r"""Docstrings without their indentation, and patterns as ECMA-262 has them, which knows no `\Z`."""
    if isinstance(node, list):
        return [_portable(item) for item in node]
    if not isinstance(node, dict):
        return node
    told = {name: _portable(value) for name, value in node.items()}
    if isinstance(told.get("description"), str):
        told["description"] = inspect.cleandoc(told["description"])
    if isinstance(told.get("pattern"), str):
        told["pattern"] = told["pattern"].replace(r"\Z", "$")
    return told
