"""Sweeps of requests: their images, their order, and what is refused."""

import base64
import json
from typing import Any, Final

import msgspec
import pytest
from zlora.broker.message import MAX_MESSAGE_BYTES
from zlora.errors import InvalidRequest
from zlora.schema import (
    GenerateRequest,
    GenerateResult,
    digest_of,
    parse_request,
    parse_result,
    to_dict,
    used_loras,
)
from zlora.sweep_labels import labels
from zlora.sweeps import FIELDS, MAX_BYTES, MAX_CELLS, MAX_LORAS
from zlora.testing import MemoryWorker, fake_result

LORA: Final = {"file": {"url": "https://files.test/one.safetensors"}}
BASE: Final = {"prompt": "a city", "loras": [LORA, LORA]}


def sweep(axes: dict[str, Any], **fields: Any) -> GenerateRequest:
    return parse_request(BASE | fields | {"sweep": axes})


def refusal(axes: Any, **fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        parse_request(BASE | fields | {"sweep": axes})
    return raised.value


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({"seed": [2, 1]}, [{"seed": 2}, {"seed": 1}]),
        ({"seed": [None]}, [{}]),
        ({"loras[1].weight": [0.5]}, [{"loras": [LORA, LORA | {"weight": 0.5}]}]),
        ({"loras[0]": [LORA | {"strict": False}]}, [{"loras": [LORA | {"strict": False}, LORA]}]),
        ({"loras": [[], [LORA]]}, [{"loras": []}, {"loras": [LORA]}]),
        ({"loras[0].file": [{"url": "a/b"}]}, [{"loras": [{"file": {"url": "a/b"}}, LORA]}]),
        ({"loras[0].blocks": [{"mid": 0}]}, [{"loras": [LORA | {"blocks": {"mid": 0}}, LORA]}]),
        ({"upscale.factor": [2, 3]}, [{"upscale": {"factor": 2}}, {"upscale": {"factor": 3}}]),
        ({"upscale": [None, {"factor": 2}]}, [{}, {"upscale": {"factor": 2}}]),
        (
            {"prompt": ["a", "b"], "seed": [1, 2]},
            [
                {"prompt": prompt, "seed": seed}
                for prompt, seed in (("a", 1), ("a", 2), ("b", 1), ("b", 2))
            ],
        ),
    ],
    ids=str,
)
def test_each_image_of_a_sweep_is_a_request_of_its_own(
    axes: dict[str, Any], expected: list[dict[str, Any]]
) -> None:
    found = sweep(axes)

    assert found.cells == tuple(parse_request(BASE | fields) for fields in expected)
    assert found.image_count == len(expected)
    assert parse_request(to_dict(found)) == found


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_that_may_differ_is_a_path(field: str) -> None:
    """Null, the default of most fields, or the value that the request has."""
    value = getattr(parse_request(BASE), field)

    found = sweep({field: [msgspec.to_builtins(value)]})

    assert found.cells == (parse_request(BASE),)


def test_requests_that_differ_in_the_spelling_of_their_values_are_one() -> None:
    """The order of paths has no meaning; a whole number is one with or without a point."""
    one = sweep({"seed": [1, 2], "loras[0].weight": [0, 1], "guidance_scale": [5]})
    other = sweep({"guidance_scale": [5.0], "loras[0].weight": [0.0, 1.0], "seed": [1, 2]})

    assert digest_of(one) == digest_of(other)
    assert one.cells == other.cells
    assert digest_of(one) != digest_of(sweep({"seed": [1, 2], "loras[0].weight": [0, 1]}))
    assert digest_of(one) != digest_of(parse_request(BASE))


def test_a_request_without_a_sweep_has_one_cell_and_the_digest_that_it_had() -> None:
    request = parse_request(BASE | {"num_images": 3, "num_inference_steps": 4})

    assert request.cells == (request,)
    assert (request.image_count, request.total_steps) == (3, 12)
    assert "sweep" not in to_dict(request)


@pytest.mark.parametrize(
    "axes",
    [
        {},
        {"seed": []},
        {"seed": 5},
        {"seed": {"a": 1}},
        {"": [1]},
        {"num_images": [1, 2]},
        {"width": [64, 128]},
        {"image": [None]},
        {"embeddings": [[]]},
        {"timeout": [1]},
        {"sweep": [None]},
        {"loras[2].weight": [1]},
        {"loras[0].wieght": [1]},
        {"loras.weight": [1]},
        {"loras[-1].weight": [1]},
        {"loras[0].file.url": ["a/b"]},
        {"loras[00].weight": [1]},
        {"seed[0]": [1]},
        {"seed.x": [1]},
        {"upscale[0]": [1]},
        {"upscale": [None], "upscale.factor": [2]},
        {"loras": [[LORA]], "loras[0].weight": [1]},
        {"loras[0]": [LORA], "loras[0].weight": [1]},
        {"loras[0].weight": [0, 5]},
        {"loras[0].weight": [float("nan")]},
        {"seed": [1, -1]},
        {"seed": [10**40]},
        {"seed": [frozenset]},
        {"seed": [[[[[1]]]]]},
        {"prompt": ["a", 5]},
        {"prompt": ["half a pair \ud800"]},
        {"scheduler": ["euler", "none such"]},
        {"num_inference_steps": [0]},
        {"strength": [0.5]},
        {"schedule": ["karras"], "timesteps": [[900, 100]]},
        {"loras": [[LORA] * 9]},
        {"seed": list(range(MAX_CELLS + 1))},
        {"seed": list(range(13)), "guidance_scale": [1, 2, 3, 4, 5]},
        {"loras[0].file": [{"url": f"a/{number}"} for number in range(MAX_LORAS)]},
        {"\u0130": [1]},
        {"loras[\u0661].weight": [1]},
        {"seed\n": [1]},
    ],
    ids=str,
)
def test_a_wrong_sweep_is_refused(axes: Any) -> None:
    error = refusal(axes)

    assert error.details["path"].startswith("$.sweep")
    assert error.details["expected"]


def test_the_lora_that_a_request_lacks_is_named() -> None:
    assert "the request, which has no `loras[2]`" in str(refusal({"loras[2].file": [LORA["file"]]}))


@pytest.mark.parametrize("fields", [{"num_images": 2}, {"batch_size": 4}])
def test_a_sweep_has_one_image_of_each_combination(fields: dict[str, Any]) -> None:
    (field,) = fields
    assert refusal({"seed": [1]}, **fields).details["path"] == f"$.{field}"


def test_a_wrong_value_is_named_with_its_place_and_without_secrets() -> None:
    error = refusal({"loras[1].weight": [0, 9]})
    assert (error.details["value"], error.details["image"]) == ("9", 1)
    assert "$.loras[1].weight of image 1" in error.details["expected"]

    text = str(refusal({"prompt": ["a secret (prompt"]}, prompt_syntax="a1111", clip_skip=101))
    assert "secret" not in text
    wrong = {"url": "https://user:secret@host/x?secret", "sha256": "0"}
    assert "secret" not in str(refusal({"loras[0].file": [wrong]}))


def test_what_is_wrong_without_the_sweep_too_is_named_as_in_a_plain_request() -> None:
    assert refusal({"seed": [1]}, strength=0.5).details["path"] == "$.strength"


@pytest.mark.parametrize(
    "axes",
    [
        {"prompt": [str(number) + 9_900 * "\u00e9" for number in range(MAX_CELLS)]},
        {
            "loras": [
                [{"file": {"url": f"https://host/{'x' * 1600}{index}"}} for index in range(8)]
                for _ in range(MAX_CELLS)
            ]
        },
    ],
    ids=["prompts", "addresses"],
)
def test_a_sweep_that_no_message_has_room_for_is_refused(axes: dict[str, Any]) -> None:
    """A worker drops longer messages unread, and the job would never end."""
    assert str(MAX_BYTES) in refusal(axes).details["expected"]


def test_the_greatest_sweep_fits_into_a_message() -> None:
    """Celery sends base64 of JSON, in which the request is an argument."""
    count = MAX_BYTES // MAX_CELLS - 100
    request = sweep({"prompt": [f"{number}{'x' * count}" for number in range(MAX_CELLS)]})

    body = base64.b64encode(json.dumps([[to_dict(request)], {}, {}]).encode())

    assert len(body) < 0.7 * MAX_MESSAGE_BYTES


@pytest.mark.parametrize(
    "axes",
    [
        {"loras[0].alpha": list(range(1, MAX_LORAS + 2))},
        {"loras[0].file": [{"url": f"lora://{number}"} for number in range(MAX_LORAS)]},
    ],
    ids=["alphas", "files"],
)
def test_loras_that_differ_in_alpha_alone_count_too(axes: dict[str, Any]) -> None:
    """Each is parsed for itself, and is in memory as long as the sweep is drawn."""
    assert str(MAX_LORAS) in refusal(axes).details["expected"]


def test_a_name_in_the_prompt_and_in_the_loras_is_one_lora() -> None:
    names = [f"lora://{number}" for number in range(MAX_LORAS // 2)]
    prompts = [f"a <lora:{number}:1>" for number in range(MAX_LORAS // 2)]
    axes = {"loras[0].file": [{"url": name} for name in names], "prompt": prompts}

    loras = [{"file": {"url": "lora://0"}}]
    assert sweep(axes, loras=loras, prompt_syntax="a1111").image_count == MAX_CELLS


# --- labels


def labels_of(axes: dict[str, Any], **fields: Any) -> list[str]:
    """Return the labels of each image, of a result as a worker makes it."""
    result = fake_result("job", sweep(axes, **fields))
    return ["; ".join(own.values()) for own in labels(result.cells)]


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({"seed": [1, 2]}, ["seed 1", "seed 2"]),
        ({"loras[0].weight": [0, 1.5]}, ["one weight 0", "one weight 1.5"]),
        (
            {"loras[0].file": [{"url": "a/b/c.safetensors"}, {"ref": "lora://d"}]},
            ["loras[0].file c", "loras[0].file d"],
        ),
        (
            {"loras": [[], [LORA], [LORA | {"unet_weight": 0.2}, LORA | {"weight": -1}]]},
            ["loras none", "loras one 1", "loras one 0.2 (text encoders 1) + one -1"],
        ),
        (
            {"loras[0].blocks": [{"down": 0, "mid": 0.5}, None]},
            ["one blocks down 0, mid 0.5", "one blocks none"],
        ),
        (
            {"loras[0].weights": [[[0, 1], [0.5, 0.3]], [[0, 1]]]},
            ["one weights 1@0 0.3@0.5", "one weights 1@0"],
        ),
        ({"upscale": [None, {"factor": 2}]}, ["upscale none", "upscale factor 2"]),
        ({"seed": [1, 2], "guidance_scale": [5]}, ["seed 1", "seed 2"]),
        ({"seed": [1]}, ["seed 1"]),
        ({"seed": [1, 1], "eta": [None]}, ["eta none; seed 1"] * 2),
        (
            {"prompt": [f"an old town by the sea in {season}" for season in ("May", "June")]},
            ["prompt ... May", "prompt ... June"],
        ),
        ({"prompt": ["a cat", "a dog\n"]}, ["prompt a cat", "prompt a dog"]),
        ({"prompt": ["", "a dog"]}, ["prompt none", "prompt a dog"]),
    ],
    ids=str,
)
def test_a_label_says_what_an_image_has_of_its_own(
    axes: dict[str, Any], expected: list[str]
) -> None:
    assert labels_of(axes) == expected


def test_each_file_is_used_once_however_many_images_have_it() -> None:
    request = sweep(
        {
            "loras[0].weight": [0, 1, 2],
            "loras[1].file": [{"url": "a/b"}, {"url": "c/d"}],
            "loras[1].alpha": [None, 4],
        }
    )

    found = [(spec.file.url, spec.alpha) for spec in used_loras(request.cells)]

    assert sorted(found, key=str) == sorted(
        [
            (LORA["file"]["url"], None),
            ("a/b", None),
            ("a/b", 4.0),
            ("c/d", None),
            ("c/d", 4.0),
        ],
        key=str,
    )


def test_a_sweep_in_memory_has_cells_and_a_sheet() -> None:
    worker = MemoryWorker()
    client = worker.client()
    request = BASE | {"sweep": {"seed": [3, None], "loras[0].weight": [0, 1]}}

    result = client.submit(request, job_id="job").result(timeout=5)

    assert [cell.values["seed"] for cell in result.cells] == [3, None, 3, None]
    assert [image.seed for image in result.images[:2]] == [3, fake_result("job", a_request()).seed]
    assert result.sheet is not None
    assert result.sheet.key == "runs/job/outputs/sheet.jpeg"
    assert {len(cell.relative_norms) for cell in result.cells} == {2}
    assert parse_result(msgspec.json.encode(result)) == result


def a_request() -> GenerateRequest:
    return parse_request({"prompt": "a city"})


def test_a_sweep_in_memory_has_no_secret_and_all_loras() -> None:
    address = "https://user:secret@host/x.safetensors?secret"
    axes = {"loras": [[], [{"file": {"url": address}}], [LORA]]}

    result = fake_result("job", sweep(axes, loras=[]))

    assert "secret" not in repr(result)
    assert {receipt.source for receipt in result.loras} == {
        "https://host/x.safetensors",
        LORA["file"]["url"],
    }


def test_images_in_memory_have_the_sizes_of_their_second_passes() -> None:
    request = sweep({"upscale.factor": [1.5, 2]}, width=64, height=64)

    result = fake_result("job", request)

    assert [image.width for image in result.images] == [96, 128]


def test_a_result_of_a_newer_version_is_read() -> None:
    """Unknown fields in the requests of its cells too."""
    document = to_dict(fake_result("job", sweep({"seed": [1, 2]})))
    document["cells"][0]["request"]["later"] = 1
    document["cells"][0]["later"] = 1

    found: GenerateResult = parse_result(document)

    assert [cell.values for cell in found.cells] == [{"seed": 1}, {"seed": 2}]
