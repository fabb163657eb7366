"""Recipes: what they say is enough and no secret, and what strangers and later versions write is read or refused."""

import json
import re
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.fakes import a_recipe, a_request, settings
from zlora.schema import Asset, GenerateResult, ImageRef, LoraSpec, parse_request
from zlora_worker.fetch.cache import CachedFile
from zlora_worker.fetch.fetcher import Fetcher
from zlora_worker.results.provenance import (
    Provenance,
    parse_provenance,
    pinned,
    provenances,
    shared,
)

DIGEST: Final = "0123456789abcdef" * 4
JSON_DATA: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def fetcher(model_home: Path) -> Fetcher:
    return Fetcher(settings(model_home))


def a_pinned_recipe(**fields: Any) -> Provenance:
    """Of a picture with a LoRA."""
    request = a_request(loras=(LoraSpec(file=Asset(url="https://a.invalid/b", sha256=DIGEST)),))
    return a_recipe(request, base_sha256=DIGEST, **fields)


def document_of(recipe: Provenance) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(msgspec.json.encode(recipe))
    return document


def a_file(source: str) -> CachedFile:
    return CachedFile(
        path=Path("file"), sha256=DIGEST, size=1, source=source, tier="disk", seconds=0.0
    )


# --- pinned


@given(form=st.sampled_from(["url", "ref", "cozy_ref"]), address=st.text(min_size=1, max_size=40))
@example(form="url", address="?token=s3cret")
@example(form="url", address="user:s3cret@")
@example(form="ref", address="https://user:s3cret@a.invalid/b?token=s3cret#s3cret")
@example(form="cozy_ref", address="x" * 4096)
@example(form="url", address=f"https://huggingface.co/o/r/blob/{'%25' * 800}/a.safetensors")
def test_a_pinned_request_is_a_request(fetcher: Fetcher, form: str, address: str) -> None:
    """Whatever remains of an address without its secrets: the manifest and the picture can be read again."""
    request = parse_request({"prompt": "", "loras": [{"file": {form: address}, "weight": 0.5}]})

    file = a_file(fetcher.source(request.loras[0].file.address))
    found = pinned(request, [(file.source, file.sha256)])

    (lora,) = found.loras
    assert parse_provenance(msgspec.json.encode(a_recipe(found))).request == found
    assert (lora.file.sha256, lora.weight) == (DIGEST, 0.5)
    assert re.search(r"[?#]|s3cret", lora.file.address) is None


# --- a result's


def test_a_manifest_has_a_recipe_for_each_picture() -> None:
    recipe = a_pinned_recipe(pixels_sha256=DIGEST, model_sha256=DIGEST, threads=1, tiled=True)
    size: dict[str, Any] = {"width": 64, "height": 72, "size": 1}
    own: dict[str, Any] = {"pixels_sha256": DIGEST, "tiled": True}
    images = tuple(
        ImageRef(key="", content_type="", sha256="", seed=seed, **size, **own) for seed in (7, 8)
    )
    result = GenerateResult(
        images=images, loras=(), timings={}, base_intact=True, tiled=True, **shared(recipe)
    )

    expected = [recipe, msgspec.structs.replace(recipe, index=1, seed=8)]
    assert (
        provenances(msgspec.json.decode(msgspec.json.encode(result), type=GenerateResult))
        == expected
    )
    for missing in ("request", "base_sha256"):
        with pytest.raises(ValueError, match="does not say"):
            provenances(msgspec.structs.replace(result, **{missing: None}))


# --- what others write


@given(data=JSON_DATA)
def test_what_a_later_version_adds_is_passed_over(data: object) -> None:
    """At every level, whatever its type."""
    recipe = a_pinned_recipe()
    document = document_of(recipe)
    spec = document["request"]["loras"][0]

    for level in (document, document["request"], spec, spec["file"]):
        level["later"] = data

    assert parse_provenance(json.dumps(document)) == recipe


@given(data=st.data())
def test_one_field_of_any_other_value_is_read_or_refused(data: st.DataObject) -> None:
    """What is read is in its bounds: it can be written and read again."""
    document = document_of(a_pinned_recipe(pixels_sha256=DIGEST, threads=1))
    spec = document["request"]["loras"][0]
    level = data.draw(st.sampled_from([document, document["request"], spec, spec["file"]]))
    level[data.draw(st.sampled_from(sorted(level)))] = data.draw(JSON_DATA)

    try:
        found = parse_provenance(json.dumps(document))
    except msgspec.ValidationError:
        return

    assert parse_provenance(msgspec.json.encode(found)) == found


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("job_id", "../../etc"),
        ("job_id", "job\n"),
        ("seed", -1),
        ("seed", 2**53),
        ("seed", 1.5),
        ("index", -1),
        ("width", 0),
        ("height", "64"),
        ("request", {"prompt": "x", "num_inference_steps": 10**6}),
        ("request", {"prompt": "x", "loras": [{"file": {"url": "a", "ref": "b"}}]}),
        ("request", {"prompt": "x", "loras": [{"file": {"url": "a"}}] * 9}),
        ("versions", {"torch": 2}),
    ],
)
def test_a_field_out_of_its_bounds_is_refused(field: str, value: object) -> None:
    """A stranger's recipe is drawn, and its job id may become a path."""
    with pytest.raises(msgspec.ValidationError):
        parse_provenance(json.dumps(document_of(a_pinned_recipe()) | {field: value}))


@pytest.mark.parametrize("field", ["job_id", "seed", "request", "model", "base_sha256", "versions"])
def test_a_recipe_without_what_draws_it_is_refused(field: str) -> None:
    document = document_of(a_pinned_recipe())
    del document[field]

    with pytest.raises(msgspec.ValidationError, match=field):
        parse_provenance(json.dumps(document))


@pytest.mark.parametrize(
    "document",
    [
        "",
        "no JSON",
        "null",
        "[]",
        '"\ud800"',
        b"\xff\xfe{\0}\0",
        b'{"job_id": "\xff"}',
        b'{"job_id": "\\ud800"}',
        b'{"seed": ' + b"9" * 10_000 + b"}",
        b'{"seed": 1e999}',
        b'{"later": ' + b"[" * 100_000,
        b'{"later":' * 100_000,
        msgspec.json.encode(a_pinned_recipe(model="x" * 2**22)),
    ],
    ids=range(13),
)
def test_what_is_no_recipe_is_one_kind_of_error(document: bytes | str) -> None:
    with pytest.raises(msgspec.DecodeError):
        parse_provenance(document)


@given(document=st.binary(max_size=30) | st.text(st.characters(), max_size=30))
def test_rubbish_is_one_kind_of_error(document: bytes | str) -> None:
    with pytest.raises(msgspec.DecodeError):
        parse_provenance(document)
