"""Results of a newer worker: what it has added is passed over, and what is known is read as ever."""

from typing import Any

import msgspec
import pytest
from zlora.schema import (
    Asset,
    GenerateRequest,
    GenerateResult,
    ImageRef,
    LoraSpec,
    parse_result,
    to_dict,
)


@pytest.fixture
def result() -> GenerateResult:
    image = ImageRef(
        key="k", width=64, height=64, content_type="image/png", size=1, sha256="0" * 64, seed=1
    )
    lora = LoraSpec(file=Asset(url="https://example.com/a"), weight=0.5)
    return GenerateResult(
        job_id="job", images=(image,), loras=(), seed=1, timings={}, base_intact=True, model="m", versions={},
        request=GenerateRequest(prompt="a city", loras=(lora,)),
    )  # fmt: skip


def places(document: dict[str, Any]) -> list[dict[str, Any]]:
    request = document["request"]
    return [
        document,
        document["images"][0],
        request,
        request["loras"][0],
        request["loras"][0]["file"],
    ]


@pytest.mark.parametrize("place", range(5), ids=["result", "image", "request", "lora", "file"])
def test_a_field_that_is_not_known_is_passed_over_wherever_it_is(
    result: GenerateResult, place: int
) -> None:
    document = to_dict(result)
    places(document)[place]["added_later"] = {"by": "a newer worker"}

    assert parse_result(document) == result
    assert parse_result(msgspec.json.encode(document)) == result


def test_what_is_read_has_the_types_that_are_submitted(result: GenerateResult) -> None:
    """So that a request of a result can be submitted again."""
    found = parse_result(msgspec.json.encode(result)).request

    assert found is not None
    assert (type(found), type(found.loras[0]), type(found.loras[0].file)) == (
        GenerateRequest,
        LoraSpec,
        Asset,
    )


def test_a_result_of_before_there_were_requests_in_it_is_read(result: GenerateResult) -> None:
    document = to_dict(result)
    del document["request"]

    assert parse_result(document).request is None


@pytest.mark.parametrize("document", [{}, {"job_id": 7}, b"{}", b"", b"no JSON", b"[]", "\u00e9"])
def test_what_is_no_result_is_a_decode_error(document: Any) -> None:
    with pytest.raises(msgspec.DecodeError):
        parse_result(document)


def test_a_known_field_with_a_value_out_of_its_bounds_is_refused(result: GenerateResult) -> None:
    document = to_dict(result)
    document["request"]["loras"][0]["weight"] = 5

    with pytest.raises(msgspec.ValidationError, match="weight"):
        parse_result(document)
