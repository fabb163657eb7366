"""`zlora schema`: requests, results and other documents, as JSON Schema."""

import inspect
import json
from datetime import datetime
from typing import Any, Final, Literal

import click
import msgspec
from msgspec import Struct

from zlora.cli.printing import json_option, print_json
from zlora.schema import GenerateRequest, GenerateResult, JobStatus

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"


class Failure(Struct, frozen=True, kw_only=True):
    """Why a job or a command has failed: `code` is for programs, `message` for people."""

    code: str
    message: str
    retryable: bool
    details: dict[str, Any]


class WebhookData(Struct, frozen=True, kw_only=True):
    """The id of the job, and its `result` or its `error`."""

    job_id: str
    result: GenerateResult | None = None
    error: Failure | None = None


class Webhook(Struct, frozen=True, kw_only=True):
    """Body of a webhook: a job has ended at `timestamp`."""

    type: Literal["job.succeeded", "job.failed", "job.cancelled"]
    timestamp: datetime
    data: WebhookData
    receiver: str | None = None
    """The URL that it was sent to, without its query; absent from older workers."""


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

    DOCUMENT is `request`, `result`, `event` (the progress of a job), `error`, or `webhook` (the
    body of a webhook). A client checks more than a schema can express, such as that an asset has
    exactly one address. With --json the schema is one line.
    """
    found = {"$schema": _DIALECT, **_schema_of(_TYPES[document])}
    if as_json:
        print_json(found)
    else:
        click.echo(json.dumps(found, indent=2))


def _schema_of(kind: Any) -> dict[str, Any]:
    """Return the schema of a type, with the types that it names under `$defs`."""
    found = _portable(msgspec.json.schema(kind))
    own: dict[str, Any] = found["$defs"].pop(kind.__name__)
    if found["$defs"]:
        own["$defs"] = found["$defs"]
    return own


def _portable(node: Any) -> Any:
    r"""Unindent descriptions, and spell patterns as in ECMA-262, which has no `\Z`."""
    if isinstance(node, list):
        return [_portable(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {name: _portable(value) for name, value in node.items()}
    if isinstance(found.get("description"), str):
        found["description"] = inspect.cleandoc(found["description"])
    if isinstance(found.get("pattern"), str):
        found["pattern"] = found["pattern"].replace(r"\Z", "$")
    return found
