"""The OpenAPI document (3.1) of the APIs, made from their endpoints."""

import inspect
import re
from collections.abc import Sequence
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, Final

from msgspec import structs

from zlora.json_schema import schemas_of
from zlora.server import problems
from zlora.server.endpoint import Api, Endpoint
from zlora.server.problems import Problem

_NATIVE: Final = "v1"  # operations of this API have no prefix
_REFERENCE: Final = "#/components/schemas/{name}"
_TEXT: Final = {"type": "string"}
_IN_PATH: Final = re.compile(r"\{(\w+)(?::path)?\}")


def document_of(apis: Sequence[Api]) -> dict[str, Any]:
    """Return the document of these APIs."""
    endpoints = [(api, endpoint) for api in apis for endpoint in api.endpoints]
    kinds = [Problem]
    for _, endpoint in endpoints:
        kinds += [kind for kind in (endpoint.body, endpoint.answer) if kind is not None]
    schemas, components = schemas_of(kinds, ref_template=_REFERENCE)
    by_kind = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, Any] = {}
    for api, endpoint in endpoints:
        operation = _operation(api, endpoint, by_kind)
        path = endpoint.path.replace(":path}", "}")  # how Starlette spells slashes in a parameter
        paths.setdefault(path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "z-image-lora",
            "version": version("z-image-lora"),
            "description": "A queue for images with LoRAs.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(api: Api, endpoint: Endpoint, by_kind: dict[Any, Any]) -> dict[str, Any]:
    summary, _, description = inspect.cleandoc(endpoint.handler.__doc__ or "").partition("\n\n")
    name = endpoint.handler.__name__
    found: dict[str, Any] = {
        "operationId": name if api.name == _NATIVE else f"{api.name}_{name}",
        "summary": summary.replace("\n", " "),
        "parameters": [
            *_in_path(endpoint.path),
            *_in_query(endpoint),
            *({"name": name, "in": "header", "schema": _TEXT} for name in endpoint.headers),
        ],
    }
    if description:
        found["description"] = description
    if not endpoint.is_public:
        found["security"] = [{"key": []}]
    content: dict[str, Any] = {}
    if endpoint.body is not None:
        content["application/json"] = {"schema": by_kind[endpoint.body]}
    if endpoint.takes:
        content[endpoint.takes] = {}
    if content:
        found["requestBody"] = {"required": True, "content": content}
    schema = _TEXT if endpoint.media_type.startswith("text/") else {}
    if endpoint.answer is not None:
        schema = by_kind[endpoint.answer]
    answers: dict[str, Any] = {}
    for status in endpoint.statuses:
        answers[str(int(status))] = {"description": HTTPStatus(status).phrase}
        if status <= HTTPStatus.ACCEPTED:
            answers[str(int(status))]["content"] = {endpoint.media_type: {"schema": schema}}
    # Other APIs have errors in forms of their own.
    error: dict[str, Any] = {"application/json": {}}
    if api.error is problems.answer:
        error = {"application/problem+json": {"schema": by_kind[Problem]}}
    found["responses"] = answers | {"default": {"description": "Error", "content": error}}
    return found


def _in_path(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": _TEXT}
        for name in _IN_PATH.findall(path)
    ]


def _in_query(endpoint: Endpoint) -> list[dict[str, Any]]:
    if endpoint.query is None:
        return []
    _, components = schemas_of([endpoint.query], ref_template=_REFERENCE)
    properties = components[endpoint.query.__name__]["properties"]
    return [
        {
            "name": field.name,
            "in": "query",
            "description": properties[field.name].pop("description"),
            "schema": properties[field.name],
        }
        for field in structs.fields(endpoint.query)
    ]
