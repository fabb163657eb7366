"""The OpenAPI document (3.1) of the APIs, made from their endpoints."""

import inspect
import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Final

import msgspec
from msgspec import structs

from zlora.server.endpoint import Api, Endpoint
from zlora.server.problems import Problem

_REFERENCE: Final = "#/components/schemas/{name}"
_IN_PATH: Final = re.compile(r"\{(\w+)\}")


def document(apis: Sequence[Api]) -> dict[str, Any]:
    """Return the document of these APIs."""
    endpoints = [endpoint for api in apis for endpoint in api.endpoints]
    kinds = [Problem]
    for endpoint in endpoints:
        kinds += [kind for kind in (endpoint.body, endpoint.answer) if kind is not None]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REFERENCE)
    by_kind = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, Any] = {}
    for endpoint in endpoints:
        operation = _operation(endpoint, by_kind)
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    found: dict[str, Any] = portable(
        {
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
    )
    return found


def _operation(endpoint: Endpoint, by_kind: dict[Any, Any]) -> dict[str, Any]:
    summary, _, description = inspect.cleandoc(endpoint.handler.__doc__ or "").partition("\n\n")
    found: dict[str, Any] = {
        "operationId": endpoint.handler.__name__,
        "summary": summary.replace("\n", " "),
        "parameters": [*_in_path(endpoint.path), *_in_query(endpoint)],
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
    schema = by_kind[endpoint.answer] if endpoint.answer is not None else {"type": "string"}
    found["responses"] = {
        str(int(endpoint.status)): {
            "description": "Success",
            "content": {endpoint.media_type: {"schema": schema}},
        },
        "default": {
            "description": "Error",
            "content": {"application/problem+json": {"schema": by_kind[Problem]}},
        },
    }
    return found


def _in_path(path: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in _IN_PATH.findall(path)
    ]


def _in_query(endpoint: Endpoint) -> list[dict[str, Any]]:
    if endpoint.query is None:
        return []
    (_,), components = msgspec.json.schema_components([endpoint.query], ref_template=_REFERENCE)
    properties = components[endpoint.query.__name__]["properties"]
    return [
        {"name": field.name, "in": "query", "schema": properties[field.name]}
        for field in structs.fields(endpoint.query)
    ]


def portable(node: Any) -> Any:
    r"""Unindent descriptions, and spell patterns as in ECMA-262, which has no `\Z`."""
    if isinstance(node, list):
        return [portable(item) for item in node]
    if not isinstance(node, dict):
        return node
    found = {name: portable(value) for name, value in node.items()}
    if isinstance(found.get("description"), str):
        found["description"] = inspect.cleandoc(found["description"])
    if isinstance(found.get("pattern"), str):
        found["pattern"] = found["pattern"].replace(r"\Z", "$")
    return found
