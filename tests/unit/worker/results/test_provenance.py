"""Provenance: complete, without secrets, and read back from untrusted or later documents."""

import json
import re
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.fakes import a_request, image_provenance, settings
from zlora.schema import Asset, EmbeddingSpec, GenerateResult, ImageRef, LoraSpec, parse_request
from zlora_worker.fetch.cache import CachedFile
from zlora_worker.fetch.fetcher import Fetcher
from zlora_worker.results.provenance import (
    ImageProvenance,
    JobProvenance,
    image_provenances,
    parse_provenance,
    pinned,
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


def a_pinned_provenance(**fields: Any) -> ImageProvenance:
    """Return the provenance of an image with a LoRA."""
    request = a_request(loras=(LoraSpec(file=Asset(url="https://a.invalid/b", sha256=DIGEST)),))
    return image_provenance(request, base_sha256=DIGEST, **fields)


def document_of(provenance: ImageProvenance) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(msgspec.json.encode(provenance))
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
    """Manifest and image can be read again, whatever remains of an address without its secrets."""
    request = parse_request({"prompt": "", "loras": [{"file": {form: address}, "weight": 0.5}]})

    file = a_file(fetcher.source(request.loras[0].file.address))
    found = pinned(request, [(file.source, file.sha256, None)])

    (lora,) = found.loras
    assert parse_provenance(msgspec.json.encode(image_provenance(found))).request == found
    assert (lora.file.sha256, lora.weight) == (DIGEST, 0.5)
    assert re.search(r"[?#]|s3cret", lora.file.address) is None


def test_an_embedding_is_pinned_to_its_file_and_its_word() -> None:
    """The word may have been the name of the file, which the address may lose."""
    file = Asset(url="https://user:s3cret@a.invalid/zebra.safetensors?token=s3cret")
    specs = (EmbeddingSpec(file=file), EmbeddingSpec(file=file, token="<x>"))
    source = "https://a.invalid/zebra.safetensors"

    found = pinned(
        a_request(embeddings=specs), [], [(source, DIGEST, "zebra"), (source, DIGEST, "<x>")]
    )

    assert [spec.token for spec in found.embeddings] == ["zebra", "<x>"]
    assert {(spec.file.url, spec.file.sha256) for spec in found.embeddings} == {(source, DIGEST)}
    assert parse_provenance(msgspec.json.encode(image_provenance(found))).request == found


# --- a result's


def test_a_manifest_has_the_provenance_of_each_image() -> None:
    own: dict[str, Any] = {"width": 64, "height": 72, "pixels_sha256": DIGEST, "tiled": True}
    own["batch_size"] = 2
    job = msgspec.convert(
        a_pinned_provenance(model_sha256=DIGEST, threads=1), JobProvenance, from_attributes=True
    )
    result = GenerateResult(
        images=tuple(
            ImageRef(key="", content_type="", sha256="", seed=seed, size=1, **own)
            for seed in (7, 8)
        ),
        loras=(),
        timings={},
        base_intact=True,
        tiled=True,
        **msgspec.structs.asdict(job),
    )

    stored = msgspec.json.decode(msgspec.json.encode(result), type=GenerateResult)

    assert image_provenances(stored) == [
        job.for_image(0, **own),
        job.for_image(1, **own),
    ]
    for missing in ("request", "base_sha256"):
        with pytest.raises(ValueError, match=f"does not say .*{missing}"):
            image_provenances(msgspec.structs.replace(result, **{missing: None}))


# As a worker of the first versions writes it.
OLD: Final = (
    b'{"job_id":"old","index":1,"seed":8,"width":64,"height":72,"pixels_sha256":"%s",'
    b'"request":{"prompt":"a","num_images":2},"model":"demo","base_sha256":"%s",'
    b'"scheduler":"EulerDiscreteScheduler","device":"cpu","dtype":"float32","threads":2,'
    b'"tiled":true,"versions":{"torch":"2.6"}}'
) % (DIGEST.encode(), DIGEST.encode())


def test_an_old_document_is_read_and_has_the_fields_of_today() -> None:
    found = parse_provenance(OLD)

    assert json.loads(msgspec.json.encode(found)) == json.loads(OLD)


# --- untrusted and later documents


@given(data=JSON_DATA)
def test_unknown_fields_are_ignored(data: object) -> None:
    """At every level, whatever their type."""
    provenance = a_pinned_provenance()
    document = document_of(provenance)
    spec = document["request"]["loras"][0]

    for level in (document, document["request"], spec, spec["file"]):
        level["later"] = data

    assert parse_provenance(json.dumps(document)) == provenance


@given(data=st.data())
def test_a_field_of_any_value_is_within_its_bounds_or_refused(data: st.DataObject) -> None:
    """What is read can be written and read again."""
    document = document_of(a_pinned_provenance(pixels_sha256=DIGEST, threads=1))
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
    """The file is untrusted, and its job id becomes a path."""
    with pytest.raises(msgspec.ValidationError):
        parse_provenance(json.dumps(document_of(a_pinned_provenance()) | {field: value}))


@pytest.mark.parametrize("field", ["job_id", "seed", "request", "model", "base_sha256", "versions"])
def test_a_document_without_a_required_field_is_refused(field: str) -> None:
    document = document_of(a_pinned_provenance())
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
        msgspec.json.encode(a_pinned_provenance(model="x" * 2**22)),
    ],
    ids=range(13),
)
def test_any_other_document_is_a_decode_error(document: bytes | str) -> None:
    with pytest.raises(msgspec.DecodeError):
        parse_provenance(document)


@given(document=st.binary(max_size=30) | st.text(st.characters(), max_size=30))
def test_random_bytes_are_a_decode_error(document: bytes | str) -> None:
    with pytest.raises(msgspec.DecodeError):
        parse_provenance(document)
