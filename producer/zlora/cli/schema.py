"""`zlora schema`: the documents that travel, as JSON Schema."""

import inspect
import json
from typing import Any, Final

import click

from zlora.job import GenerateRequest, GenerateResult, JobStatus

_DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
_TYPES: Final[dict[str, Any]] = {"request": GenerateRequest, "result": GenerateResult, "event": JobStatus}


@click.command()
@click.argument("document", type=click.Choice(list(_TYPES)), default="request")
def schema(document: str) -> None:
    """Print the JSON Schema (2020-12) of DOCUMENT.

    That is a `request`, a `result`, or an `event`: how far a job is. What it cannot say, such as that an asset has one
    address, is checked where a request is submitted.
    """
    click.echo(json.dumps({"$schema": _DIALECT, **_schema_of(_TYPES[document])}, indent=2))


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
