"""`zlora schema`: it accepts what a client accepts, as far as a schema can express it."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from zlora.cli import main
from zlora.errors import InvalidRequest, JobRevoked, LoraNotFound, ZloraError
from zlora.schema import GenerateResult, JobState, JobStatus, parse_request
from zlora.testing import fake_result
from zlora.webhook import body_of

DOCUMENTS = sorted((Path(__file__).parents[3] / "requests").glob("*.json"))
TYPES = {
    "object": dict,
    "array": list,
    "string": str,
    "integer": int,
    "number": int | float,
    "boolean": bool,
}
URL = "https://example.com/x.safetensors"


@cache
def printed(*document: str) -> Any:
    result = CliRunner().invoke(main, ["schema", *document])
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Return whether a schema accepts a value; raise `KeyError` for keywords not used by ours."""
    return all(_RULES[name](said, value, root, schema) for name, said in schema.items())


def _typed(kind: str, value: Any) -> bool:
    if kind == "null":
        return value is None
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _named(reference: str, root: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = root["$defs"][reference.removeprefix("#/$defs/")]
    return found


def _properties(said: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    return not isinstance(value, dict) or all(
        accepts(said[name], value[name], root) for name in said if name in value
    )


def _others(said: Any, value: Any, root: dict[str, Any], schema: dict[str, Any]) -> bool:
    others = set(value) - set(schema.get("properties", {})) if isinstance(value, dict) else set()
    return all(said is not False and accepts(said, value[name], root) for name in others)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_RULES: dict[str, Any] = {
    **dict.fromkeys(
        ("$schema", "$defs", "title", "description", "default", "examples", "format"),
        lambda *_: True,
    ),
    "$ref": lambda said, value, root, _: accepts(_named(said, root), value, root),
    "anyOf": lambda said, value, root, _: any(accepts(each, value, root) for each in said),
    "enum": lambda said, value, *_: value in said,
    "type": lambda said, value, *_: _typed(said, value),
    "required": lambda said, value, *_: not isinstance(value, dict) or set(said) <= set(value),
    "properties": lambda said, value, root, _: _properties(said, value, root),
    "additionalProperties": _others,
    "items": lambda said, value, root, _: (
        not isinstance(value, list) or all(accepts(said, each, root) for each in value)
    ),
    "maxItems": lambda said, value, *_: not isinstance(value, list) or len(value) <= said,
    "minLength": lambda said, value, *_: not isinstance(value, str) or len(value) >= said,
    "maxLength": lambda said, value, *_: not isinstance(value, str) or len(value) <= said,
    "pattern": lambda said, value, *_: not isinstance(value, str) or bool(re.search(said, value)),
    "minimum": lambda said, value, *_: not _number(value) or value >= said,
    "maximum": lambda said, value, *_: not _number(value) or value <= said,
    "exclusiveMinimum": lambda said, value, *_: not _number(value) or value > said,
    "multipleOf": lambda said, value, *_: not _number(value) or value % said == 0,
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_a_request_document_is_accepted(path: Path) -> None:
    schema = printed()

    assert accepts(schema, json.loads(path.read_text()), schema)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": None},
        {"wieght": 1},
        {"width": 1023},
        {"width": 8192},
        {"num_images": 0},
        {"num_images": 1.5},
        {"guidance_scale": 51},
        {"timeout": 0},
        {"scheduler": ""},
        {"schedule": "dreamy"},
        {"output_format": "gif"},
        {"prompt": "x" * 10_001},
        {"seed": -1},
        {"lossless": "no"},
        {"loras": [{"weight": 1}]},
        {"loras": [{"file": {"url": URL}, "wieght": 1}]},
        {"loras": [{"file": {"url": URL}, "weight": 5}]},
        {"loras": [{"file": {"url": ""}}]},
        {"loras": [{"file": {"url": URL, "sha256": "0" * 63}}]},
        {"loras": [{"file": {"url": URL}}] * 9},
    ],
    ids=lambda fields: str(fields)[:60],
)
def test_a_request_that_a_client_refuses_is_not_accepted(fields: dict[str, Any]) -> None:
    schema, document = printed("request"), {"prompt": "x", **fields}

    assert not accepts(schema, document, schema)
    with pytest.raises(InvalidRequest):
        parse_request(document)


def test_a_result_is_accepted() -> None:
    loras = [{"file": {"url": URL}}]
    made = fake_result("job-1", parse_request({"prompt": "x", "loras": loras, "inline": True}))
    result = json.loads(msgspec.json.encode(made))
    schema = printed("result")

    assert accepts(schema, result, schema)
    assert not accepts(schema, {**result, "images": None}, schema)
    assert set(schema["properties"]) == set(GenerateResult.__struct_fields__)


@pytest.mark.parametrize("state", list(JobState))
def test_an_event_is_accepted(state: JobState) -> None:
    schema = printed("event")

    assert accepts(schema, json.loads(msgspec.json.encode(JobStatus(state=state, step=3))), schema)
    assert not accepts(schema, {"state": "DREAMING"}, schema)


@pytest.mark.parametrize("end", [LoraNotFound("gone", {"status": 404}), JobRevoked(), None])
def test_an_error_and_a_webhook_are_accepted(end: ZloraError | None) -> None:
    error, hook = printed("error"), printed("webhook")
    made = fake_result("job-1", parse_request({"prompt": "x", "inline": True}))

    assert accepts(hook, json.loads(body_of("job-1", end or made, at=1.0)), hook)
    assert not accepts(
        hook, {"type": "job.dreamt", "timestamp": "", "data": {"job_id": "job-1"}}, hook
    )
    assert end is None or accepts(error, end.as_document(), error)
    assert not accepts(error, {"code": "internal"}, error)


def test_with_json_the_schema_is_one_line() -> None:
    text = CliRunner().invoke(main, ["schema", "result", "--json"]).output

    assert text.count("\n") == 1
    assert json.loads(text) == printed("result")


@pytest.mark.parametrize("document", ["request", "result", "event", "error", "webhook"])
def test_a_schema_names_its_type_and_its_dialect(document: str) -> None:
    schema = printed(document)

    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"]
    assert schema["description"]
    assert "$id" not in schema
    assert "\\Z" not in json.dumps(schema)  # only Python knows it


def test_an_unknown_document_is_a_usage_error() -> None:
    assert CliRunner().invoke(main, ["schema", "picture"]).exit_code == 2
