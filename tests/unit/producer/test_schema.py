"""The request document: what is taken, and how a refusal reads."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.servers import untimed
from zlora.errors import InvalidJobId, InvalidRequest
from zlora.schema import (
    MAX_IMAGES,
    MAX_SEED,
    Asset,
    GenerateRequest,
    LoraSpec,
    check_job_id,
    digest_of,
    parse_request,
    seed_of,
    to_dict,
)

DOCUMENTS = sorted((Path(__file__).parents[2] / "requests").glob("*.json"))
URL = "https://example.com/x.safetensors"
SECRETS = ("us3r", "pa55", "t0ken", "fr4g")
SECRET_URL = "https://us3r:pa55@example.com/x.safetensors?sig=t0ken#fr4g"
NAN, INF = float("nan"), float("inf")


def document(**fields: Any) -> dict[str, Any]:
    return {"prompt": "a portrait", **fields}


def with_lora(**fields: Any) -> dict[str, Any]:
    return document(loras=[{"file": {"url": URL}, **fields}])


def with_file(**fields: Any) -> dict[str, Any]:
    return document(loras=[{"file": fields}])


def over_the_wire(data: object) -> Any:
    """What a worker gets of it: kombu's JSON writes NaN and Infinity as Python does."""
    return json.loads(json.dumps(data))


def refusal(data: object) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        parse_request(data)
    json.dumps(raised.value.details)  # plain JSON, as all details are
    return raised.value


# --- what is taken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_a_request_document_is_taken_unchanged(path: Path) -> None:
    """All that it says is in the request, and the request says nothing else."""
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
    assert (request.num_inference_steps, request.guidance_scale, request.num_images) == (28, 7.5, 1)
    assert (request.width, request.height, request.seed, request.scheduler) == (
        None,
        None,
        None,
        None,
    )
    assert (request.negative_prompt, request.output_format, request.loras[0].weight) == (
        "",
        "png",
        1.0,
    )


def test_a_request_is_its_own_document() -> None:
    """A struct, its plain document and that document's JSON are one request."""
    request = parse_request(
        with_lora(weight=0.5, adapter_name="a.b") | {"seed": 3, "scheduler": "euler"}
    )

    assert parse_request(request) == request
    assert parse_request(to_dict(request)) == request
    assert parse_request(over_the_wire(to_dict(request))) == request


# --- bounds

INSIDE: list[dict[str, Any]] = [
    document(prompt=""),
    document(prompt="x" * 10_000),
    document(negative_prompt="x" * 10_000),
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
    *(document(output_format=name) for name in ("png", "jpeg", "webp")),
    *(
        document(scheduler=name)
        for name in ("ddim", "dpmpp_2m", "dpmpp_2m_karras", "euler", "euler_ancestral")
    ),
    *(document(scheduler=name) for name in ("heun", "lcm", "unipc", None)),
    with_lora(weight=-4),
    with_lora(weight=4),
    with_lora(unet_weight=-4, text_encoder_weight=4),
    with_lora(unet_weight=None, adapter_name=None),
    with_lora(adapter_name="x" * 200),
    with_file(url="x"),
    with_file(url="x" * 4096),
    with_file(cozy_ref="x" * 4096),
    with_file(ref="x", sha256="0123456789abcdef" * 4),
]

OUTSIDE: list[tuple[Any, str, str]] = [
    (document(prompt="x" * 10_001), "$.prompt", "10000"),
    (document(prompt=None), "$.prompt", "str"),
    (document(negative_prompt="x" * 10_001), "$.negative_prompt", "10000"),
    (document(loras=[{"file": {"url": URL}}] * 9), "$.loras", "8"),
    (document(loras=None), "$.loras", "array"),
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
    *((document(timeout=value), "$.timeout", "0") for value in (0, -1, -0.0)),
    (document(timeout=86_400.1), "$.timeout", "86400"),
    *((document(timeout=value), "$.timeout", "float") for value in (NAN, INF, True, "60")),
    (document(output_format="gif"), "$.output_format", "png, jpeg, webp"),
    (document(scheduler="Euler"), "$.scheduler", "euler_ancestral"),
    *(
        (with_lora(**{weight: value}), f"$.loras[0].{weight}", "float")
        for weight in ("weight", "unet_weight", "text_encoder_weight")
        for value in (-4.001, 4.001, NAN, INF, -INF)
    ),
    (with_lora(weight=None), "$.loras[0].weight", "float"),
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
    ({}, "$", "prompt"),
    (document(loras=[{"weight": 1}]), "$.loras[0]", "file"),
    (None, "$", "object"),
    ([], "$", "object"),
    ("a portrait", "$", "object"),
]


@pytest.mark.parametrize("data", INSIDE)
def test_a_value_on_its_bound_is_taken(data: dict[str, Any]) -> None:
    assert parse_request(over_the_wire(data)) == parse_request(data)


@pytest.mark.parametrize(("data", "path", "bound"), OUTSIDE)
def test_a_value_just_beyond_its_bound_is_refused_with_path_value_and_bound(
    data: Any, path: str, bound: str
) -> None:
    """In the message for people and in the details, here and after Celery's JSON."""
    for given_data in (data, over_the_wire(data)):
        error = refusal(given_data)

        assert error.details["path"] == path
        assert bound in error.details["expected"]
        assert (
            error.message
            == f"{path}: {error.details['expected']}; the value is {error.details['value']}"
        )


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (document(num_inference_steps=201), "201"),
        (with_lora(weight=4.001), "4.001"),
        (with_lora(weight=NAN), "nan"),
        (document(scheduler="Euler"), "'Euler'"),
        (document(prompt=["a"]), "an array of 1"),
        (document(prompt={"b": 1, "a": 2}), "an object with a, b"),
        (document(prompt={}), "an object with no fields"),
        (document(prompt=None), "None"),
    ],
)
def test_the_offending_value_is_shown(data: dict[str, Any], value: str) -> None:
    assert refusal(data).details["value"] == value


def test_a_long_value_is_cut() -> None:
    error = refusal(document(prompt="x" * 1_000_000))

    assert len(error.message) < 300


@pytest.mark.parametrize(
    ("data", "path"),
    [
        (document(wieght=1), "$"),
        (with_lora(wieght=1), "$.loras[0]"),
        (with_file(url=URL, wieght=1), "$.loras[0].file"),
    ],
)
def test_a_misspelt_field_is_refused_by_name(data: dict[str, Any], path: str) -> None:
    error = refusal(data)

    assert "`wieght`" in error.message
    assert error.details["path"] == path


def test_a_field_name_that_looks_like_a_path_is_refused_as_any_other() -> None:
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
def test_text_that_no_encoding_carries_is_refused(data: dict[str, Any]) -> None:
    """JSON can say half of a surrogate pair; UTF-8, and with it a hash, a URL and a file name, cannot."""
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


@pytest.mark.parametrize(
    ("asset", "address"),
    [
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
    ],
)
def test_each_form_of_an_address_has_one_spelling(asset: Asset, address: str) -> None:
    assert asset.address == address


def test_the_last_image_s_seed_is_bounded_too() -> None:
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


@untimed
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


@untimed
@given(data=in_bounds)
def test_a_request_within_the_bounds_survives_the_wire_field_by_field(data: dict[str, Any]) -> None:
    request = parse_request(over_the_wire(to_dict(parse_request(data))))

    assert all(getattr(request, name) == value for name, value in data.items() if name != "loras")
    for spec, given_spec in zip(request.loras, data.get("loras", []), strict=True):
        assert spec.file.url == given_spec["file"]["url"]
        assert all(
            getattr(spec, name) == value for name, value in given_spec.items() if name != "file"
        )


@untimed
@given(
    name=st.sampled_from(["weight", "unet_weight", "text_encoder_weight"]),
    value=st.floats().filter(lambda value: not -4 <= value <= 4),
)
def test_no_weight_beyond_the_bounds_gets_in(name: str, value: float) -> None:
    assert refusal(with_lora(**{name: value})).details["path"] == f"$.loras[0].{name}"


# --- secrets

characters = string.ascii_letters + string.digits


@pytest.mark.parametrize(
    "data",
    [
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
    ],
)
def test_a_refusal_shows_no_secret_of_an_address(data: object) -> None:
    error = refusal(data)

    said = f"{error} {error.details} {error!r}"
    assert not [secret for secret in SECRETS if secret in said]


# --- job ids and seeds


@pytest.mark.parametrize(
    "job_id", ["a", "0", "-", "_", "A" * 64, "7d3f9e66-9a36-4f0f-a2f7-4b9f2a6c0d4e"]
)
def test_a_job_id_is_taken(job_id: str) -> None:
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
        "\u0661\u0662",
        "é",
        "\uff21",
        None,
        7,
        b"a",
        ["a"],
    ],
)
def test_a_job_id_that_might_be_another_path_is_refused(job_id: object) -> None:
    with pytest.raises(InvalidJobId) as raised:
        check_job_id(job_id)

    json.dumps(raised.value.details)
    assert raised.value.details["path"] == "job_id"
    assert repr(job_id)[:20] in raised.value.message or isinstance(job_id, list)


@untimed
@given(job_id=st.text(max_size=70))
def test_a_job_id_is_taken_only_as_one_plain_word(job_id: str) -> None:
    word = 1 <= len(job_id) <= 64 and set(job_id) <= set(characters + "-_")

    try:
        taken = check_job_id(job_id) == job_id
    except InvalidJobId:
        taken = False

    assert taken is word


@untimed
@given(
    job_id=st.text(characters + "-_", min_size=1, max_size=64),
    num_images=st.integers(1, MAX_IMAGES),
)
def test_a_job_s_own_seed_leaves_room_for_all_its_images(job_id: str, num_images: int) -> None:
    seed = seed_of(job_id)

    assert parse_request(document(seed=seed, num_images=num_images)).seed == seed


def test_a_job_s_own_seed_is_the_same_for_ever() -> None:
    """Golden values: a job id of yesterday draws the same picture tomorrow."""
    assert {job_id: seed_of(job_id) for job_id in ("a", "doc-basic")} == {
        "a": 6_615_842_164_569_790,
        "doc-basic": 3_741_980_285_127_288,
    }


def test_two_jobs_have_two_seeds() -> None:
    assert len({seed_of(f"job-{index}") for index in range(1000)}) == 1000


# --- how pictures are stored


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
def test_what_a_format_cannot_be_is_refused(fields: dict[str, Any], path: str) -> None:
    """A quality of a picture that keeps every pixel would be a silent nothing."""
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
def test_which_pictures_keep_every_pixel(fields: dict[str, Any], kept: bool) -> None:
    assert parse_request(document(**fields)).keeps_pixels is kept


# --- one request, one digest


def digest(**fields: Any) -> str:
    return digest_of(parse_request(document(**fields)))


def test_a_request_has_one_digest_however_it_is_spelt() -> None:
    """What is absent is its default; the order of fields, and whether a number is written 1 or 1.0, say nothing."""
    lora = {"file": {"url": URL}}
    spelt: list[dict[str, Any]] = [
        document(loras=[lora]),
        {"loras": [{"weight": 1.0, **lora}], "prompt": "a portrait"},
        document(
            loras=[{"strict": True, "weight": 1, **lora}],
            num_images=1,
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


def test_any_other_request_has_another_digest() -> None:
    loras = [{"file": {"url": URL}}, {"file": {"url": URL + "?v=2"}}]
    others = [
        digest(),
        digest(prompt="another"),
        digest(seed=0),
        digest(num_images=2),
        digest(timeout=60),
        digest(loras=loras),
        digest(loras=loras[::-1]),
        digest(loras=loras[:1]),
        digest(loras=[{**loras[0], "weight": 0.5}]),
        digest(loras=[{"file": {"url": URL, "sha256": "0" * 64}}]),
    ]

    assert len(set(others)) == len(others)


def test_a_digest_is_the_same_for_ever() -> None:
    """A golden value: a record of yesterday is of the same request tomorrow, whatever fields are added meanwhile."""
    assert digest() == "cf1acbd6e17513bf30457771ee3ff90188e6335c1dd90f5f19f7c3c3587af59a"
