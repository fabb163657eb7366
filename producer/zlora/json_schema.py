"""JSON Schemas (2020-12) of this project's documents, with the documentation of each field."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import msgspec
from msgspec import Struct


def schemas_of(
    kinds: Sequence[Any], *, ref_template: str = "#/$defs/{name}"
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the schema of each type, and those of all structs that they name, by name.

    Patterns are spelled as in ECMA-262.
    """
    schemas, components = msgspec.json.schema_components(kinds, ref_template=ref_template)
    for struct in set(_structs(msgspec.inspect.multi_type_info(kinds))):
        properties = components[struct.__name__]["properties"]
        for name, text in field_docs(struct).items():
            properties[name]["description"] = text
    return _portable(list(schemas)), _portable(components)


def field_docs(cls: type) -> dict[str, str]:
    """Return the documentation of each field: the string below the field in the source."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    body = cast("ast.ClassDef", definition).body
    found = {}
    for field, text in pairwise(body):
        match field, text:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(sentence))),
            ):
                found[name] = sentence
    return found


def _structs(info: Any) -> Iterator[type[Struct]]:
    """Yield the structs in msgspec's description of types, some of them more than once."""
    if isinstance(info, list | tuple):
        for one in info:
            yield from _structs(one)
    elif isinstance(info, msgspec.inspect.StructType):
        yield info.cls
        yield from _structs([field.type for field in info.fields])
    elif isinstance(info, msgspec.inspect.Type):
        for name in ("types", "item_type", "item_types", "key_type", "value_type", "type"):
            yield from _structs(getattr(info, name, None))


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
