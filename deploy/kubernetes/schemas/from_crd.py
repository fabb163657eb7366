"""Make strict JSON schemas from CustomResourceDefinitions.

Usage: `python from_crd.py "<project> <version>" <crd.yaml>...`. Each schema is written beside this
script as `<kind>.json`. It refuses unknown fields, as an API server with strict field validation
does, and leaves out descriptions, defaults and the status.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

_KEPT = (
    "type",
    "enum",
    "items",
    "required",
    "pattern",
    "nullable",
    "allOf",
    "anyOf",
    "oneOf",
    "not",
)
_BOUNDS = (
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
)
_METADATA = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "annotations": {"type": "object", "additionalProperties": {"type": "string"}},
    },
    "additionalProperties": False,
}


def strict(node: Any) -> Any:
    """Return an OpenAPI v3 schema of a CRD as a JSON schema that refuses unknown fields."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    found = {name: strict(value) for name, value in node.items() if name in (*_KEPT, *_BOUNDS)}
    if "(?i)" in str(found.get("pattern")):  # Go's syntax, which JSON schemas do not have
        del found["pattern"]
    if isinstance(node.get("additionalProperties"), dict):
        found["additionalProperties"] = strict(node["additionalProperties"])
    if "properties" in node:
        found["properties"] = {name: strict(value) for name, value in node["properties"].items()}
        if node.get("type") == "object" and not node.get("x-kubernetes-preserve-unknown-fields"):
            found["additionalProperties"] = False
    return found


def schema(definition: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the JSON schema of a definition's stored version."""
    names, group = definition["spec"]["names"], definition["spec"]["group"]
    version = next(version for version in definition["spec"]["versions"] if version["storage"])
    found: dict[str, Any] = strict(version["schema"]["openAPIV3Schema"])
    found["properties"].pop("status", None)
    found["properties"] |= {
        "apiVersion": {"const": f"{group}/{version['name']}"},
        "kind": {"const": names["kind"]},
        "metadata": _METADATA,
    }
    found["required"] = sorted({"apiVersion", "kind", "metadata", *found.get("required", [])})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": f"From {source}.",
    } | found


def main() -> None:
    """Write a schema for each definition named on the command line."""
    source, *paths = sys.argv[1:]
    for path in paths:
        found = schema(yaml.safe_load(Path(path).read_text("utf-8")), source)
        target = Path(__file__).with_name(f"{found['properties']['kind']['const'].lower()}.json")
        target.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
