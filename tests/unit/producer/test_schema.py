"""Requests and results: what is accepted, how a refusal reads, seeds, digests, newer versions."""

import json
import re
import string
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.servers import untimed
from zlora.errors import InvalidJobId, InvalidRequest
from zlora.json_schema import field_docs
from zlora.schedulers import SCHEDULERS
from zlora.schema import (
    MAX_IMAGES,
    MAX_SEED,
    Asset,
    EmbeddingReceipt,
    EmbeddingSpec,
    GenerateRequest,
    GenerateResult,
    ImageReceipt,
    ImageRef,
    JobStatus,
    LoraReceipt,
    LoraSpec,
    OutputFormat,
    Upscale,
    check_job_id,
    digest_of,
    parse_request,
    parse_result,
    seed_of,
    to_dict,
)

DOCUMENTS = sorted((Path(__file__).parents[2] / "requests").glob("*.json"))
URL = "https://example.com/x.safetensors"
SECRETS = ("us3r", "pa55", "t0ken", "fr4g")
SECRET_URL = "https://us3r:pa55@example.com/x.safetensors?sig=t0ken#fr4g"
NAN, INF = float("nan"), float("inf")
CHARACTERS = string.ascii_letters + string.digits + "-_"

# Few examples: the cases that matter are listed by hand.
few: Final = settings(untimed, max_examples=40)


def document(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a portrait", **fields}


def with_lora(**fields: Any) -> dict[str, Any]:
    return document(loras=[{"file": {"url": URL}, **fields}])


def with_embeddings(*specs: dict[str, Any]) -> dict[str, Any]:
    return document(embeddings=[{"file": {"url": URL}, **spec} for spec in specs])


def with_file(**fields: Any) -> dict[str, Any]:
    return document(loras=[{"file": fields}])


def over_the_wire(data: object) -> Any:
    """Return what a worker receives: kombu's JSON writes NaN and Infinity as Python does."""
    return json.loads(json.dumps(data))


def refusal(data: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        parse_request(data)
    json.dumps(raised.value.details)  # plain JSON, as all details are
    return raised.value


# --- accepted requests


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_a_request_document_is_accepted_unchanged(path: Path) -> None:
    """The request has all fields of the document, and defaults elsewhere."""
    data = json.loads(path.read_text())

    request = parse_request(data)

    default = parse_request(document())
    expected = data | {"loras": [{"weight": 1.0, **spec} for spec in data.get("loras", [])]}
    for field in GenerateRequest.__struct_fields__:
        if field == "loras":
            assert [to_dict(spec) | {"weight": spec.weight} for spec in request.loras] == expected[
                "loras"
            ]
        else:
            assert getattr(request, field) == data.get(field, getattr(default, field))


def test_there_are_four_request_documents() -> None:
    assert [path.stem for path in DOCUMENTS] == [
        "basic",
        "cozy_ref",
        "multiple_loras",
        "single_lora",
    ]


def test_defaults() -> None:
    request = parse_request(with_lora())

    assert request == GenerateRequest(prompt="a portrait", loras=(LoraSpec(file=Asset(url=URL)),))
    assert (request.steps, request.guidance, request.num_images) == (28, 7.5, 1)
    assert (request.width, request.height, request.seed, request.scheduler) == (
        None,
        None,
        None,
        None,
    )
    assert (request.negative_prompt, request.output_format, request.loras[0].component_weights) == (
        "",
        "png",
        (1.0, 1.0),
    )


def test_a_struct_its_document_and_its_json_are_one_request() -> None:
    request = parse_request(
        with_lora(weight=0.5, adapter_name="a.b") | {"seed": 3, "scheduler": "euler"}
    )

    assert parse_request(request) == request
    assert parse_request(to_dict(request)) == request
    assert parse_request(over_the_wire(to_dict(request))) == request


@pytest.mark.parametrize(
    ("fields", "weights", "by_step"),
    [
        ({"start": 0.2, "end": 0.8}, (1.0, 0.0), ((1, 0.0), (3, 1.0), (9, 0.0))),
        ({"start": 0.2, "weight": 0.5}, (0.5, 0.0), ((1, 0.0), (3, 0.5))),
        ({"end": 0.1, "unet_weight": -2}, (-2.0, 0.0), ((1, -2.0), (2, 0.0))),
        ({"weights": [[0, 0.2], [0.55, -1]]}, (-1.0, 0.0), ((1, 0.2), (7, -1.0))),
        ({"weights": [[0, 1], [0.5, 1]]}, (1.0, 0.0), ((1, 1.0),)),
        ({"start": 0, "end": 1, "weight": 0.5}, (0.5, 0.5), ((1, 0.5),)),
        ({"blocks": {"mid": 0}, "weight": 0.5}, (0.5, 0.5), ((1, 0.5),)),
    ],
)
def test_a_strength_over_the_steps_begins_with_the_step_at_its_share(
    fields: dict[str, Any], weights: tuple[float, float], by_step: tuple[tuple[int, float], ...]
) -> None:
    """The text encoders have none, unless it is constant."""
    request = parse_request(with_lora(**fields))

    spec = request.loras[0]
    assert spec.component_weights == weights
    assert spec.weights_by_step(10) == by_step
    assert parse_request(request.with_defaults()).loras[0].weights_by_step(10) == by_step
    assert parse_request(over_the_wire(to_dict(request))) == request


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"start": 0.5, "end": 0.5}, "end"),
        ({"start": 0.8, "end": 0.2}, "end"),
        ({"start": 0.2, "text_encoder_weight": 0.5}, "text_encoder_weight"),
        ({"weights": [[0, 1]], "text_encoder_weight": -1}, "text_encoder_weight"),
        ({"weights": [[0, 1]], "weight": 1}, "weight"),
        ({"weights": [[0, 1]], "unet_weight": 0}, "unet_weight"),
        ({"weights": [[0, 1]], "end": 0.5}, "weights"),
        ({"weights": [[0.1, 1]]}, "weights"),
        ({"weights": [[0, 1], [0.5, 0.2], [0.5, 0.3]]}, "weights"),
        ({"blocks": {"BASE": 0.5}}, "blocks"),
        ({"blocks": {"IN12": 0.5}}, "blocks"),
        ({"blocks": {"side": 0.5}}, "blocks"),
        ({"blocks": {"down." + "x" * 100: 0.5}}, "blocks"),
        ({"blocks": {"IN04": 0.5, "mid": 1}}, "blocks"),
        ({"blocks": {"down.1": 0.5, "down_blocks.1": 1}}, "blocks"),
        ({"blocks": {"M00": 0.5, "MID": 1}}, "blocks"),
        ({"start": 0.26, "end": 0.49}, "start"),
        ({"weights": [[0, 0], [0.8, 1]]}, "weights"),
    ],
)
def test_strengths_that_contradict_each_other_are_refused(
    fields: dict[str, Any], field: str
) -> None:
    error = refusal(with_lora(**fields) | {"num_inference_steps": 4})

    assert error.details["path"] == f"$.loras[0].{field}"


def test_blocks_have_several_spellings() -> None:
    names = ("down", "down.1", "down_blocks.2.attentions.0", "mid_block", "up.0.resnets.1.conv1")
    letters = ("IN00", "IN11", "M00", "OUT00", "OUT11")

    for group in (names, letters):
        spec = parse_request(with_lora(blocks=dict.fromkeys(group, 0.5))).loras[0]
        assert spec.blocks == dict.fromkeys(group, 0.5)


# --- bounds

INSIDE: list[dict[str, Any]] = [
    document(prompt=""),
    document(prompt="x" * 10_000),
    document(negative_prompt="x" * 10_000),
    document(prompt="[a:b:0.5] AND c|d " + "BREAK " * 20),
    document(prompt="(a:10) <lora:b:-4>" + " BREAK a" * 9, prompt_syntax="a1111"),
    document(clip_skip=0),
    document(clip_skip=100),
    document(loras=[]),
    document(loras=[{"file": {"url": URL}}] * 8),
    document(num_inference_steps=1),
    document(num_inference_steps=200),
    document(guidance_scale=0),
    document(guidance_scale=50),
    document(width=64, height=4096),
    document(width=4096, height=64),
    document(seed=0),
    document(seed=MAX_SEED),
    document(seed=MAX_SEED - 7, num_images=8),
    document(timeout=86_400),
    document(timeout=0.001),
    document(timeout=None),
    document(num_images=8),
    *(document(output_format=name) for name in get_args(OutputFormat)),
    *(document(scheduler=name) for name in (*SCHEDULERS, "DPM++ 2M Karras", None)),
    with_lora(weight=-4),
    with_lora(weight=4),
    with_lora(unet_weight=-4, text_encoder_weight=4),
    with_lora(weight=None, unet_weight=None, adapter_name=None),
    document(num_inference_steps=None, guidance_scale=None),
    with_lora(adapter_name="x" * 200),
    with_lora(start=0, end=1),
    with_lora(weights=[[0, -4], [1, 4]]),
    with_lora(blocks={f"down.{number}": 4 for number in range(64)}),
    with_file(url="x"),
    with_file(url="x" * 4096),
    with_file(cozy_ref="x" * 4096),
    with_file(ref="x", sha256="0123456789abcdef" * 4),
]

OUTSIDE: list[tuple[Any, str, str]] = [
    (document(prompt="x" * 10_001), "$.prompt", "10000"),
    (document(prompt=None), "$.prompt", "str"),
    (document(negative_prompt="x" * 10_001), "$.negative_prompt", "10000"),
    (document(prompt_syntax="compel"), "$.prompt_syntax", "plain, a1111"),
    (document(prompt="[a:b:0.5]", prompt_syntax="a1111"), "$.prompt", "prompt editing"),
    (document(prompt="a" + " BREAK a" * 10, prompt_syntax="a1111"), "$.prompt", "at least 11"),
    (document(negative_prompt="a|b [c|d]", prompt_syntax="a1111"), "$.negative_prompt", "alternat"),
    (document(negative_prompt="<lora:a:1>", prompt_syntax="a1111"), "$.negative_prompt", "LoRA"),
    (document(clip_skip=-1), "$.clip_skip", "0"),
    (document(clip_skip=101), "$.clip_skip", "100"),
    (document(loras=[{"file": {"url": URL}}] * 9), "$.loras", "8"),
    (document(loras=None), "$.loras", "array"),
    (with_lora(start=-0.01), "$.loras[0].start", "0"),
    (with_lora(end=0), "$.loras[0].end", "0"),
    (with_lora(end=1.01), "$.loras[0].end", "1"),
    (with_lora(weights=[]), "$.loras[0].weights", "1"),
    (with_lora(weights=[[0, 5]]), "$.loras[0].weights[0][1]", "4"),
    (with_lora(weights=[[0, 1, 2]]), "$.loras[0].weights[0]", "2"),
    (with_lora(blocks={}), "$.loras[0].blocks", "1"),
    (with_lora(blocks={"mid": NAN}), "$.loras[0].blocks[...]", "float"),
    (document(num_inference_steps=0), "$.num_inference_steps", "1"),
    (document(num_inference_steps=201), "$.num_inference_steps", "200"),
    (document(num_inference_steps=1.5), "$.num_inference_steps", "int"),
    (document(num_inference_steps=True), "$.num_inference_steps", "int"),
    (document(num_inference_steps="28"), "$.num_inference_steps", "int"),
    (document(guidance_scale=-0.001), "$.guidance_scale", "0"),
    (document(guidance_scale=50.001), "$.guidance_scale", "50"),
    *((document(guidance_scale=value), "$.guidance_scale", "float") for value in (NAN, INF, -INF)),
    *((document(**{side: 63}), f"$.{side}", "64") for side in ("width", "height")),
    *((document(**{side: 56}), f"$.{side}", "64") for side in ("width", "height")),
    *((document(**{side: 4104}), f"$.{side}", "4096") for side in ("width", "height")),
    *((document(**{side: 100}), f"$.{side}", "multiple of 8") for side in ("width", "height")),
    (document(seed=-1), "$.seed", "0"),
    (document(seed=MAX_SEED + 1), "$.seed", str(MAX_SEED)),
    (document(seed=2**64), "$.seed", str(MAX_SEED)),
    (document(num_images=0), "$.num_images", "1"),
    (document(num_images=MAX_IMAGES + 1), "$.num_images", str(MAX_IMAGES)),
    *((document(batch_size=size), "$.batch_size", "of 1, 2, 4, 8") for size in (0, 3, 16)),
    (document(batch_size="4"), "$.batch_size", "int"),
    *((document(timeout=value), "$.timeout", "0") for value in (0, -1, -0.0)),
    (document(timeout=86_400.1), "$.timeout", "86400"),
    *((document(timeout=value), "$.timeout", "float") for value in (NAN, INF, True, "60")),
    (document(output_format="gif"), "$.output_format", "png, jpeg, webp"),
    (document(scheduler="Eular"), "$.scheduler", "euler_ancestral"),
    *(
        (with_lora(**{weight: value}), f"$.loras[0].{weight}", "float")
        for weight in ("weight", "unet_weight", "text_encoder_weight")
        for value in (-4.001, 4.001, NAN, INF, -INF)
    ),
    (with_lora(weight="1"), "$.loras[0].weight", "float"),
    (with_lora(weight=10**400), "$.loras[0].weight", "range"),
    (with_lora(adapter_name="x" * 201), "$.loras[0].adapter_name", "200"),
    (with_file(url=""), "$.loras[0].file.url", "1"),
    (with_file(url="x" * 4097), "$.loras[0].file.url", "4096"),
    (with_file(cozy_ref="x" * 4097), "$.loras[0].file.cozy_ref", "4096"),
    (with_file(ref=""), "$.loras[0].file.ref", "1"),
    (with_file(url=URL, sha256="0" * 63), "$.loras[0].file.sha256", "64"),
    (with_file(url=URL, sha256="0" * 65), "$.loras[0].file.sha256", "64"),
    (with_file(url=URL, sha256="A" * 64), "$.loras[0].file.sha256", "64"),
    (with_file(url=URL, sha256="0" * 64 + "\n"), "$.loras[0].file.sha256", "64"),
    (
        document(loras=[{"file": {"url": URL}}, {"file": {"url": URL}, "weight": 5}]),
        "$.loras[1].weight",
        "4",
    ),
    (with_embeddings({"token": ""}), "$.embeddings[0].token", "1"),
    (with_embeddings({"token": "x" * 101}), "$.embeddings[0].token", "100"),
    (with_embeddings({"token": "two words"}), "$.embeddings[0]", "without spaces"),
    (with_embeddings({"token": "a\u3000b"}), "$.embeddings[0]", "without spaces"),
    (with_embeddings({"token": "a\nb"}), "$.embeddings[0]", "without spaces"),
    (with_embeddings({"token": "Cat"}, {}, {"token": "cat"}), "$", "another `token`"),
    (with_embeddings(*[{}] * 9), "$.embeddings", "8"),
    (
        document(embeddings=[{"file": {"url": URL, "config_sha256": "none"}}]),
        "$.embeddings[0]",
        "config_sha256",
    ),
    ({}, "$", "prompt"),
    (document(loras=[{"weight": 1}]), "$.loras[0]", "file"),
    (None, "$", "object"),
    ([], "$", "object"),
    ("a portrait", "$", "object"),
]


def test_a_value_on_its_bound_is_accepted() -> None:
    for data in INSIDE:
        assert parse_request(over_the_wire(data)) == parse_request(data)


def test_a_value_beyond_its_bound_is_refused_with_path_value_and_bound() -> None:
    """The message and the details have them, before and after Celery's JSON."""
    for data, path, bound in OUTSIDE:
        for given_data in (data, over_the_wire(data)):
            error = refusal(given_data)

            assert error.details["path"] == path
            assert bound in error.details["expected"]
            value, expected = error.details["value"], error.details["expected"]
            assert error.message == f"{path}: {expected}; the value is {value}"


def test_the_wrong_value_is_shown() -> None:
    for data, value in (
        (document(num_inference_steps=201), "201"),
        (with_lora(weight=4.001), "4.001"),
        (with_lora(weight=NAN), "nan"),
        (document(scheduler="Eular"), "'Eular'"),
        (document(prompt=["a"]), "an array of 1"),
        (document(prompt={"b": 1, "a": 2}), "an object with a, b"),
        (document(prompt={}), "an object with no fields"),
        (document(prompt=None), "None"),
    ):
        assert refusal(data).details["value"] == value


def test_a_long_value_is_cut() -> None:
    error = refusal(document(prompt="x" * 1_000_000))

    assert len(error.message) < 300


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (document(wieght=1), "$"),
        (with_lora(wieght=1), "$.loras[0]"),
        (with_embeddings({"wieght": 1}), "$.embeddings[0]"),
        (with_file(url=URL, wieght=1), "$.loras[0].file"),
    ],
)
def test_a_misspelt_field_is_refused_by_name(data: dict[str, Any], path: str) -> None:
    error = refusal(data)

    assert "`wieght`" in error.message
    assert error.details["path"] == path


def test_a_field_name_that_looks_like_a_path_is_refused() -> None:
    error = refusal(document(**{"x` - at `$.nope": 1}))

    assert "nope" in error.message


@pytest.mark.parametrize(
    "data",
    [
        document(prompt="\ud800"),
        with_file(url="https://example.com/\ud800"),
        with_lora(adapter_name="\udfff"),
    ],
)
def test_text_that_utf8_cannot_carry_is_refused(data: dict[str, Any]) -> None:
    """JSON can spell half of a surrogate pair; hashes, URLs and file names cannot."""
    for given_data in (data, over_the_wire(data)):
        assert refusal(given_data).details.keys() == {"path", "value", "expected"}


@pytest.mark.parametrize(
    ("fields", "got"),
    [
        ({}, "none"),
        ({"sha256": "0" * 64}, "none"),
        ({"url": None, "cozy_ref": None}, "none"),
        ({"url": URL, "cozy_ref": "a/b"}, "url, cozy_ref"),
        ({"url": URL, "ref": URL}, "url, ref"),
        ({"cozy_ref": "a/b", "ref": "a/b"}, "cozy_ref, ref"),
        ({"url": URL, "cozy_ref": "a/b", "ref": URL}, "url, cozy_ref, ref"),
    ],
)
def test_a_file_has_exactly_one_address(fields: dict[str, Any], got: str) -> None:
    error = refusal(with_file(**fields))

    assert error.details["path"] == "$.loras[0].file"
    assert error.details["expected"].endswith(f"got {got}")


def test_each_form_of_an_address_is_one_url() -> None:
    for asset, address in (
        (Asset(url=URL), URL),
        (Asset(ref=URL), URL),
        (Asset(cozy_ref="loras/anime-v1"), "cozy://loras/anime-v1"),
        (Asset(ref="loras/anime-v1"), "cozy://loras/anime-v1"),
        (Asset(ref="cozy://loras/anime-v1"), "cozy://loras/anime-v1"),
        (Asset(url="owner/repo"), "hf://owner/repo"),
        (Asset(url="owner/repo@refs/pr/1"), "hf://owner/repo@refs/pr/1"),
        (Asset(url="owner/repo/file.safetensors"), "owner/repo/file.safetensors"),
        (Asset(url="s3://owner/repo"), "s3://owner/repo"),
        (Asset(ref="owner/repo"), "cozy://owner/repo"),
    ):
        assert asset.address == address


def test_the_seed_of_the_last_image_is_bounded_too() -> None:
    error = refusal(document(seed=MAX_SEED - 6, num_images=8))

    assert error.details["path"] == "$"
    assert str(MAX_SEED) in error.details["expected"]
    assert "num_images" in error.message


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@few
@given(
    data=json_values
    | st.fixed_dictionaries(
        {"prompt": st.text()}, optional=dict.fromkeys(("seed", "loras", "width"), json_values)
    )
)
@example(data={"prompt": "x", "loras": [{"file": {"url": URL}, "weight": 10**400}]})
@example(data={1: 2})
def test_any_json_is_a_request_or_an_invalid_request(data: Any) -> None:
    try:
        request = parse_request(data)
    except InvalidRequest:
        return
    assert parse_request(to_dict(request)) == request


in_bounds = st.fixed_dictionaries(
    {"prompt": st.text(max_size=50)},
    optional={
        "negative_prompt": st.text(max_size=50),
        "num_inference_steps": st.integers(1, 200),
        "guidance_scale": st.floats(0, 50),
        "width": st.integers(8, 512).map(lambda n: 8 * n),
        "height": st.integers(8, 512).map(lambda n: 8 * n),
        "seed": st.integers(0, MAX_SEED - MAX_IMAGES),
        "num_images": st.integers(1, MAX_IMAGES),
        "loras": st.lists(
            st.fixed_dictionaries(
                {"file": st.fixed_dictionaries({"url": st.text(min_size=1, max_size=50)})},
                optional={
                    "weight": st.floats(-4, 4),
                    "unet_weight": st.none() | st.floats(-4, 4),
                    "text_encoder_weight": st.none() | st.floats(-4, 4),
                    "adapter_name": st.none() | st.text(max_size=50),
                },
            ),
            max_size=8,
        ),
    },
)


@few
@given(data=in_bounds)
def test_a_request_within_the_bounds_survives_the_wire_field_by_field(data: dict[str, Any]) -> None:
    request = parse_request(over_the_wire(to_dict(parse_request(data))))

    assert all(getattr(request, name) == value for name, value in data.items() if name != "loras")
    for spec, given_spec in zip(request.loras, data.get("loras", []), strict=True):
        assert spec.file.url == given_spec["file"]["url"]
        assert all(
            getattr(spec, name) == value for name, value in given_spec.items() if name != "file"
        )


# --- secrets


def test_a_refusal_shows_no_secret_of_an_address() -> None:
    for data in (
        with_file(url=SECRET_URL, wieght=1),
        with_file(url=SECRET_URL, cozy_ref="a/b"),
        with_file(url=SECRET_URL + "x" * 4096),
        with_file(url=[SECRET_URL]),
        with_file(url={"address": SECRET_URL}),
        with_file(url=URL, sha256=SECRET_URL),
        with_file(cozy_ref=SECRET_URL + "x" * 4096),
        document(loras=[{"file": SECRET_URL}]),
        document(loras=[SECRET_URL]),
        document(loras=SECRET_URL),
        SECRET_URL,
        [SECRET_URL],
        with_lora(weight=SECRET_URL),
        document(scheduler=SECRET_URL),
        document(loras={SECRET_URL: 1}),
        document(loras=[{SECRET_URL: 1}]),
        document(**{SECRET_URL: 1}),
        document(**{f"x` {SECRET_URL} `y": 1}),
        with_lora(**{SECRET_URL: 1}),
        with_file(url=URL, **{SECRET_URL: 1}),
        with_file(url={SECRET_URL: SECRET_URL}),
        {SECRET_URL: 1},
    ):
        error = refusal(data)

        shown = f"{error} {error.details} {error!r}"
        assert not [secret for secret in SECRETS if secret in shown]


# --- job ids and seeds


def test_a_job_id_is_accepted() -> None:
    for job_id in ("a", "0", "-", "_", "A" * 64, "7d3f9e66-9a36-4f0f-a2f7-4b9f2a6c0d4e"):
        assert check_job_id(job_id) == job_id


@pytest.mark.parametrize(
    "job_id",
    [
        "",
        "a" * 65,
        "../x",
        "a/b",
        "a.b",
        ".",
        "a b",
        "a\n",
        "\na",
        "a\x00",
        "\u0661",
        "é",
        None,
        7,
        b"a",
    ],
)
def test_a_job_id_that_might_be_another_path_is_refused(job_id: object) -> None:
    with pytest.raises(InvalidJobId) as raised:
        check_job_id(job_id)

    json.dumps(raised.value.details)
    assert raised.value.details["path"] == "job_id"
    assert repr(job_id)[:20] in raised.value.message


@few
@given(job_id=st.text(max_size=70))
def test_a_job_id_is_accepted_if_and_only_if_it_is_one_plain_word(job_id: str) -> None:
    word = 1 <= len(job_id) <= 64 and set(job_id) <= set(CHARACTERS)

    try:
        taken = check_job_id(job_id) == job_id
    except InvalidJobId:
        taken = False

    assert taken is word


@few
@given(
    job_id=st.text(CHARACTERS, min_size=1, max_size=64),
    num_images=st.integers(1, MAX_IMAGES),
)
def test_the_seed_of_a_job_id_leaves_room_for_all_images(job_id: str, num_images: int) -> None:
    seed = seed_of(job_id)

    assert parse_request(document(seed=seed, num_images=num_images)).seed == seed


def test_the_seed_of_a_job_id_never_changes() -> None:
    """These values are part of the contract: a job id draws the same image in later versions."""
    assert {job_id: seed_of(job_id) for job_id in ("a", "doc-basic")} == {
        "a": 6_615_842_164_569_790,
        "doc-basic": 3_741_980_285_127_288,
    }


def test_job_ids_have_different_seeds() -> None:
    assert len({seed_of(f"job-{index}") for index in range(1000)}) == 1000


# --- formats and URLs


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"quality": 0, "output_format": "jpeg"}, "$.quality"),
        ({"quality": 101, "output_format": "jpeg"}, "$.quality"),
        ({"quality": 90}, "$"),
        ({"quality": 90, "output_format": "webp", "lossless": True}, "$"),
        ({"lossless": True}, "$"),
        ({"lossless": True, "output_format": "jpeg"}, "$"),
        ({"url_policy": "secret"}, "$.url_policy"),
        ({"url_expires_in": 0}, "$.url_expires_in"),
        ({"url_expires_in": 604_801}, "$.url_expires_in"),
        ({"url_expires_in": 60, "url_policy": "public"}, "$"),
        ({"url_expires_in": 60, "url_policy": "key"}, "$"),
        ({"inline": 1}, "$.inline"),
        ({"embed_metadata": "no"}, "$.embed_metadata"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_an_option_without_effect_is_refused(fields: dict[str, Any], path: str) -> None:
    """A quality for a format that keeps every pixel would be silently ignored."""
    assert refusal(document(**fields)).details["path"] == path


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({}, True),
        ({"output_format": "jpeg", "quality": 100}, False),
        ({"output_format": "webp", "quality": 80}, False),
        ({"output_format": "webp", "lossless": True}, True),
    ],
)
def test_png_and_lossless_webp_keep_every_pixel(fields: dict[str, Any], kept: bool) -> None:
    assert parse_request(document(**fields)).keeps_pixels is kept


# --- images to start from

IMAGE: Final = {"url": "https://example.com/a.png"}


@pytest.mark.parametrize(
    ("fields", "path", "expected"),
    [
        ({"mask": IMAGE}, "$.mask", "without `image`"),
        ({"strength": 0.5}, "$.strength", "without `image`"),
        ({"image": IMAGE, "mask_blur": 4}, "$.mask_blur", "without `mask`"),
        ({"image": IMAGE, "mask_invert": True}, "$.mask_invert", "without `mask`"),
        ({"image": IMAGE, "strength": 0}, "$.strength", "> 0"),
        ({"image": IMAGE, "strength": 1.1}, "$.strength", "<= 1"),
        ({"image": IMAGE, "strength": NAN}, "$.strength", "0"),
        ({"image": IMAGE, "mask": IMAGE, "mask_blur": 257}, "$.mask_blur", "<= 256"),
        ({"image": IMAGE, "mask": IMAGE, "mask_blur": -1}, "$.mask_blur", ">= 0"),
        ({"image": "https://example.com/a.png"}, "$.image", "object"),
        ({"image": {}}, "$.image", "exactly one"),
        ({"image": IMAGE, "mask": {"path": "a"}}, "$.mask", "path"),
        ({"image": IMAGE | {"config_sha256": "none"}}, "$.image.config_sha256", "no `config_"),
        ({"image": IMAGE, "strength": 0.03}, "$.strength", "one of 28 steps"),
        (
            {"image": IMAGE, "strength": 0.3, "num_inference_steps": 3},
            "$.strength",
            "Expected 0.333 at least, to draw one of 3 steps",
        ),
        (
            {"image": IMAGE, "strength": 0.4, "timesteps": [900, 400], "scheduler": "lcm"},
            "$.strength",
            "one of 2 steps",
        ),
    ],
    ids=str,
)
def test_an_image_that_could_not_be_drawn_is_refused(
    fields: dict[str, Any], path: str, expected: str
) -> None:
    error = refusal(document(**fields))

    assert error.details["path"] == path
    assert expected in error.details["expected"]


@pytest.mark.parametrize(
    ("fields", "path", "expected"),
    [
        ({"upscale": {}}, "$.upscale", "factor"),
        ({"upscale": {"factor": 1}}, "$.upscale.factor", "> 1"),
        ({"upscale": {"factor": 4.5}}, "$.upscale.factor", "<= 4"),
        ({"upscale": {"factor": 2, "mode": "esrgan"}}, "$.upscale.mode", "image, latent"),
        ({"upscale": {"factor": 2, "by": 3}}, "$.upscale", "by"),
        ({"upscale": {"factor": 2, "strength": 0}}, "$.upscale.strength", "> 0"),
        (
            {"upscale": {"factor": 2, "strength": 0.2, "steps": 4}},
            "$.upscale.strength",
            "Expected 0.25 at least, to draw one of 4 steps",
        ),
        (
            {"upscale": {"factor": 4}, "width": 1032, "height": 64},
            "$.upscale.factor",
            "at most 4096 pixels",
        ),
        ({"upscale": {"factor": 2}, "image": IMAGE, "mask": IMAGE}, "$.upscale", "with `mask`"),
    ],
    ids=str,
)
def test_a_second_pass_that_could_not_be_drawn_is_refused(
    fields: dict[str, Any], path: str, expected: str
) -> None:
    error = refusal(document(**fields))

    assert error.details["path"] == path
    assert expected in error.details["expected"]


def test_the_second_pass_has_steps_of_its_own_or_those_of_the_first() -> None:
    levels = {"scheduler": "lcm", "timesteps": [900, 600, 300, 100]}
    same = parse_request(document(**levels, upscale={"factor": 2}))
    own = parse_request(document(**levels, upscale={"factor": 2, "steps": 10}))

    assert (same.all_steps, own.all_steps) == (4 + 2, 4 + 5)
    assert same.second_pass is not None
    assert own.second_pass is not None
    assert (same.second_pass.timesteps, own.second_pass.timesteps) == (same.timesteps, None)
    assert parse_request(document()).second_pass is None


def test_the_strength_decides_how_many_steps_are_drawn() -> None:
    image = parse_request(document(image=IMAGE))

    assert (image.image_strength, image.drawn_steps) == (0.75, 21)
    assert parse_request(document(image=IMAGE, strength=1)).drawn_steps == 28
    assert parse_request(document()).drawn_steps == 28
    assert image.with_defaults().strength == 0.75
    assert parse_request(document()).with_defaults().strength is None


def test_an_image_of_an_earlier_job_has_an_address() -> None:
    for spelling in ({"url": "job:a-1#12"}, {"ref": "job:a-1#12"}):
        image = parse_request(document(image=spelling)).image
        assert image is not None
        assert (image.address, image.job_image) == ("job:a-1#12", ("a-1", 12))
    for other in ("job:a", "job:a#", "job:a#-1", "job:a#100", "job:a/b#0", "job:#0", "job:a#0?x"):
        assert Asset(url=other).job_image is None


def test_an_uploaded_image_has_an_address() -> None:
    digest = "0a" * 32
    for spelling in ({"url": f"upload:{digest}"}, {"ref": f"upload:{digest}"}):
        request = parse_request(document(image=spelling))
        assert request.image is not None
        assert (request.image.address, request.image.upload) == (f"upload:{digest}", digest)
        assert request.fetched_images == ()
    for other in ("upload:", f"upload:{digest}0", f"upload:{digest.upper()}", f"x-upload:{digest}"):
        assert Asset(url=other).upload is None


# --- digests


def digest(**fields: Any) -> str:
    return digest_of(parse_request(document(**fields)))


def test_the_same_request_has_the_same_digest_however_it_is_spelt() -> None:
    """Absent defaults, the order of fields, and 1 or 1.0 make no difference."""
    lora = {"file": {"url": URL}}
    spelt: list[dict[str, Any]] = [
        document(loras=[lora]),
        {"loras": [{"weight": 1.0, **lora}], "prompt": "a portrait"},
        document(
            loras=[{"strict": True, "weight": 1, **lora}],
            num_images=1,
            batch_size=1,
            guidance_scale=7.5,
            seed=None,
        ),
        document(
            loras=[lora],
            negative_prompt="",
            width=None,
            scheduler=None,
            output_format="png",
            timeout=None,
        ),
        to_dict(parse_request(document(loras=[lora]))),
        over_the_wire(document(loras=[lora])),
    ]

    assert len({digest_of(parse_request(data)) for data in spelt}) == 1


def test_another_request_has_another_digest() -> None:
    loras = [{"file": {"url": URL}}, {"file": {"url": URL + "?v=2"}}]
    others = [
        digest(),
        digest(prompt="another"),
        digest(seed=0),
        digest(num_images=2),
        digest(batch_size=2),
        digest(timeout=60),
        digest(model="another"),
        digest(loras=loras),
        digest(loras=loras[::-1]),
        digest(loras=loras[:1]),
        digest(loras=[{**loras[0], "weight": 0.5}]),
        digest(loras=[{"file": {"url": URL, "sha256": "0" * 64}}]),
    ]

    assert len(set(others)) == len(others)


def test_a_digest_never_changes() -> None:
    """This value is part of the contract: new fields with defaults must not change it."""
    assert digest() == "cf1acbd6e17513bf30457771ee3ff90188e6335c1dd90f5f19f7c3c3587af59a"


# --- results of newer versions


@pytest.fixture
def result() -> GenerateResult:
    drawn = ImageRef(
        key="k", width=64, height=64, content_type="image/png", size=1, sha256="0" * 64, seed=1
    )
    lora = LoraSpec(file=Asset(url="https://example.com/a"), weight=0.5)
    embedding = EmbeddingSpec(file=Asset(url="https://example.com/b"), token="cat")
    image = Asset(url="https://example.com/c")
    return GenerateResult(
        job_id="job",
        images=(drawn,),
        loras=(),
        seed=1,
        timings={},
        base_intact=True,
        model="m",
        versions={},
        request=GenerateRequest(
            prompt="a city",
            loras=(lora,),
            embeddings=(embedding,),
            image=image,
            mask=image,
            upscale=Upscale(factor=2),
        ),
    )


def places(document: dict[str, Any]) -> list[dict[str, Any]]:
    request = document["request"]
    return [
        document,
        document["images"][0],
        request,
        request["loras"][0],
        request["loras"][0]["file"],
        request["embeddings"][0],
        request["embeddings"][0]["file"],
        request["image"],
        request["mask"],
        request["upscale"],
    ]


PLACES = (
    "result", "image", "request", "lora", "lora-file", "embedding", "embedding-file",
    "starting-image", "mask", "upscale",
)  # fmt: skip


@pytest.mark.parametrize("place", range(len(PLACES)), ids=PLACES)
def test_an_unknown_field_of_a_result_is_ignored_wherever_it_is(
    result: GenerateResult, place: int
) -> None:
    document = to_dict(result)
    places(document)[place]["newer_field"] = {"by": "a newer worker"}

    assert parse_result(document) == result
    assert parse_result(msgspec.json.encode(document)) == result


def test_the_request_of_a_result_has_the_types_that_are_submitted(result: GenerateResult) -> None:
    """The request of a result can be submitted again."""
    found = parse_result(msgspec.json.encode(result)).request

    assert found is not None
    assert (type(found), type(found.loras[0]), type(found.loras[0].file)) == (
        GenerateRequest,
        LoraSpec,
        Asset,
    )
    (embedding,) = found.embeddings
    assert (type(embedding), type(embedding.file)) == (EmbeddingSpec, Asset)
    assert (type(found.image), type(found.mask)) == (Asset, Asset)


def test_a_result_of_an_older_version_without_request_is_read(result: GenerateResult) -> None:
    document = to_dict(result)
    del document["request"]

    assert parse_result(document).request is None


@pytest.mark.parametrize("document", [{}, {"job_id": 7}, b"{}", b"", b"[]", "\u00e9"])
def test_anything_but_a_result_is_a_decode_error(document: Any) -> None:
    with pytest.raises(msgspec.DecodeError):
        parse_result(document)


def test_a_known_field_of_a_result_keeps_its_bounds(result: GenerateResult) -> None:
    document = to_dict(result)
    document["request"]["loras"][0]["weight"] = 5

    with pytest.raises(msgspec.ValidationError, match="weight"):
        parse_result(document)


# --- documentation


def test_every_field_is_documented_in_a_sentence() -> None:
    inputs = (Asset, LoraSpec, EmbeddingSpec, Upscale, GenerateRequest)
    results = (ImageRef, LoraReceipt, EmbeddingReceipt, ImageReceipt, GenerateResult, JobStatus)
    for cls in inputs + results:
        documented = field_docs(cls)

        assert list(documented) == list(cls.__struct_fields__)
        assert all(re.fullmatch(r"[A-Z`][^\n]*\.", text) for text in documented.values())
