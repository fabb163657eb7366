"""`zlora schema`: requests, results and other documents, as JSON Schema."""

import json
from datetime import datetime
from typing import Any, Final, Literal

import click
from msgspec import Struct

from zlora.cli.printing import json_option, print_json
from zlora.json_schema import schemas_of
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
@click.argument("document", type=click.Choice([*_TYPES, "openapi"]), default="request")
@json_option
def schema(document: str, as_json: bool) -> None:
    """Print the JSON Schema (2020-12) of DOCUMENT.

    DOCUMENT is `request`, `result`, `event` (the progress of a job), `error`, or `webhook` (the
    body of a webhook). A client checks more than a schema can express, such as that an asset has
    exactly one address. With --json the schema is one line.

    `openapi` is the OpenAPI document of `zlora serve`, from which clients can be generated.
    """
    if document == "openapi":
        from zlora.server.app import APIS, SERVER
        from zlora.server.openapi import document_of

        found = document_of((*APIS, SERVER))
    else:
        found = {"$schema": _DIALECT, **_schema_of(_TYPES[document])}
    if as_json:
        print_json(found)
    else:
        click.echo(json.dumps(found, indent=2))


def _schema_of(kind: Any) -> dict[str, Any]:
    """Return the schema of a type, with the types that it names under `$defs`."""
    _, components = schemas_of([kind])
    own: dict[str, Any] = components.pop(kind.__name__)
    if components:
        own["$defs"] = components
    return own
