"""Requests of fal's endpoints: what is accepted, what is refused, and results in their form."""

import json
from typing import Any

import msgspec
import pytest
from zlora.contrib.fal import from_result, to_request
from zlora.errors import InvalidRequest
from zlora.schema import Asset, GenerateRequest, GenerateResult, LoraSpec, parse_request
from zlora.testing import fake_result

URL = "https://example.com/anime.safetensors?sig=t0ken"
Z_IMAGE_TURBO = {
    "prompt": "a fast train through the mountains",
    "image_size": "landscape_16_9",
    "num_inference_steps": 8,
    "seed": 7,
    "loras": [{"path": URL, "scale": 0.8}, {"path": "owner/repo"}],
    "num_images": 2,
    "output_format": "webp",
    "acceleration": "regular",
    "enable_safety_checker": False,
    "enable_prompt_expansion": False,
    "sync_mode": True,
}
FAST_SDXL = {
    "prompt": "a robot in a meadow",
    "negative_prompt": "blurry",
    "image_size": {"width": 896, "height": 1152},
    "num_inference_steps": 25,
    "guidance_scale": 5,
    "loras": [],
    "embeddings": [],
    "expand_prompt": False,
    "format": "jpeg",
}


def refusal(document: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        to_request(document)
    json.dumps(raised.value.details)
    return raised.value


def test_a_request_of_z_image_turbo_is_converted() -> None:
    loras = (
        LoraSpec(file=Asset(url=URL), weight=0.8),
        LoraSpec(file=Asset(url="owner/repo")),
    )

    assert to_request(Z_IMAGE_TURBO) == GenerateRequest(
        prompt="a fast train through the mountains",
        width=1024,
        height=576,
        num_inference_steps=8,
        seed=7,
        loras=loras,
        num_images=2,
        output_format="webp",
        inline=True,
    )
    assert loras[1].file.address == "hf://owner/repo"


def test_a_request_of_fast_sdxl_is_converted() -> None:
    assert to_request(FAST_SDXL) == GenerateRequest(
        prompt="a robot in a meadow",
        negative_prompt="blurry",
        width=896,
        height=1152,
        num_inference_steps=25,
        guidance_scale=5,
        output_format="jpeg",
    )


@pytest.mark.parametrize(
    ("fields", "ours"),
    [
        ({"scheduler": "Euler (trailing timesteps)"}, {"scheduler": "Euler (trailing timesteps)"}),
        ({"scheduler": "DDIM", "eta": 0.5}, {"scheduler": "DDIM", "eta": 0.5}),
        ({"timesteps": {"method": "array", "array": [999, 5]}}, {"timesteps": (999, 5)}),
        ({"sigmas": {"method": "array", "array": [9, 0.5]}}, {"sigmas": (9.0, 0.5)}),
        ({"sigmas": {"method": "default", "array": []}, "timesteps": {"method": "default"}}, {}),
    ],
    ids=str,
)
def test_the_sampling_of_fal_lora_is_converted(
    fields: dict[str, Any], ours: dict[str, Any]
) -> None:
    request = to_request({"prompt": "x", **fields})

    assert request == GenerateRequest(prompt="x", width=1024, height=768, **ours)


def test_defaults_are_ours_except_for_the_size() -> None:
    """Steps and guidance scale are left to the base model of the queue."""
    assert to_request({"prompt": "x"}) == GenerateRequest(prompt="x", width=1024, height=768)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("square_hd", (1024, 1024)),
        ("square", (512, 512)),
        ("portrait_4_3", (768, 1024)),
        ("portrait_16_9", (576, 1024)),
        ("landscape_4_3", (1024, 768)),
        ("landscape_16_9", (1024, 576)),
    ],
)
def test_an_image_size_preset_is_a_width_and_height(name: str, size: tuple[int, int]) -> None:
    request = to_request({"prompt": "x", "image_size": name})

    assert (request.width, request.height) == size


def test_an_embedding_has_the_words_that_fal_gives_it() -> None:
    document = {"prompt": "x", "embeddings": [{"path": URL}, {"path": "o/r", "tokens": ["cat"]}]}

    request = to_request(document)

    assert [(spec.file.url, spec.token) for spec in request.embeddings] == [
        (URL, "<s0><s1>"),
        ("o/r", "cat"),
    ]


@pytest.mark.parametrize(
    ("fields", "path", "expected"),
    [
        ({"strange": 0.5}, "$.strange", "prompt"),
        ({"strength": 0.5}, "$.strength", "without `image_url`"),
        ({"image_url": 1}, "$.image_url", "str"),
        ({"image_url": URL, "mask_url": ""}, "$.mask_url", ">= 1"),
        ({"scheduler": "dreamy"}, "$.scheduler", "such as"),
        ({"timesteps": [9]}, "$.timesteps", "`method`"),
        ({"timesteps": {"method": "default", "array": [9]}}, "$.timesteps", "`method`"),
        ({"sigmas": {"method": "array"}}, "$.sigmas", "`array`"),
        ({"sigmas": {"method": "array", "array": ["a"]}}, "$.sigmas.array[0]", "float"),
        ({"enable_safety_checker": True}, "$.enable_safety_checker", "False"),
        ({"enable_safety_checker": 0}, "$.enable_safety_checker", "False"),
        ({"expand_prompt": True}, "$.expand_prompt", "False"),
        ({"embeddings": "owner/repo"}, "$.embeddings", "array"),
        ({"embeddings": [{"path": URL}, {}]}, "$.embeddings[1]", "`path`"),
        ({"embeddings": [{"path": URL, "token": "x"}]}, "$.embeddings[0]", "`tokens`"),
        ({"embeddings": [{"path": URL, "tokens": "x"}]}, "$.embeddings[0].tokens", "list"),
        ({"embeddings": [{"path": 1}]}, "$.embeddings[0].path", "str"),
        ({"embeddings": [{"path": URL, "tokens": []}]}, "$.embeddings[0].tokens", ">= 1"),
        ({"acceleration": "warp"}, "$.acceleration", "regular"),
        ({"image_size": "huge"}, "$.image_size", "square_hd"),
        ({"image_size": ["square"]}, "$.image_size", "square_hd"),
        ({"image_size": {"width": 512}}, "$.image_size", "width and height"),
        ({"image_size": {"width": 512, "height": 513}}, "$.image_size.height", "multiple of 8"),
        ({"image_size": {"width": "512", "height": 512}}, "$.image_size.width", "int"),
        ({"loras": "owner/repo"}, "$.loras", "array"),
        ({"loras": [{"path": URL}, {"scale": 1}]}, "$.loras[1]", "`path`"),
        ({"loras": [{"path": URL, "weight": 1}]}, "$.loras[0]", "`scale`"),
        ({"loras": [{"path": URL, "scale": 5}]}, "$.loras[0].scale", "<= 4"),
        ({"loras": [{"path": URL, "scale": float("nan")}]}, "$.loras[0].scale", "4"),
        ({"loras": [{"path": 1}]}, "$.loras[0].path", "str"),
        ({"num_images": 9}, "$.num_images", "<= 8"),
        ({"sync_mode": "yes"}, "$.sync_mode", "bool"),
        ({"output_format": "gif"}, "$.output_format", "webp"),
        ({"format": "gif"}, "$.format", "webp"),
        ({"format": "png", "output_format": "png"}, "$.format", "one of"),
    ],
    ids=str,
)
def test_an_unsupported_value_is_refused_with_its_path(
    fields: dict[str, Any], path: str, expected: str
) -> None:
    error = refusal({"prompt": "x", **fields})

    assert error.details["path"] == path
    assert expected in error.details["expected"]
    assert (
        str(error) == f"{path}: {error.details['expected']}; the value is {error.details['value']}"
    )


@pytest.mark.parametrize("document", [None, [], "prompt", {}, {"prompt": None}], ids=str)
def test_a_document_without_a_prompt_is_refused(document: Any) -> None:
    assert refusal(document).details["path"] in ("$", "$.prompt")


def test_images_have_their_own_size_unless_one_is_named() -> None:
    document = {"prompt": "x", "image_url": URL, "mask_url": "job:a#0", "strength": 0.5}

    request = to_request(document)
    sized = to_request({**document, "image_size": "square"})

    assert request.image == Asset(url=URL)
    assert request.mask == Asset(url="job:a#0")
    assert (request.strength, request.width, request.height) == (0.5, None, None)
    assert (sized.width, sized.height) == (512, 512)


def test_a_refusal_shows_no_secret_of_an_address() -> None:
    error = refusal({"prompt": "x", "control_image_url": URL})

    assert "t0ken" not in f"{error} {error.details}"


def test_a_result_has_the_fields_of_fal() -> None:
    result = fake_result(
        "job-1", parse_request({"prompt": "x", "seed": 3, "num_images": 2, "output_format": "jpeg"})
    )

    assert from_result(msgspec.structs.replace(result, timings={"denoise": 2.5, "fetch": 9.0})) == {
        "images": [
            {
                "url": f"https://pictures.invalid/runs/job-1/outputs/{index}.jpeg",
                "width": 1024,
                "height": 1024,
                "content_type": "image/jpeg",
                "file_name": f"{index}.jpeg",
                "file_size": 0,
            }
            for index in range(2)
        ],
        "timings": {"inference": 2.5},
        "seed": 3,
        "has_nsfw_concepts": [False, False],
        "prompt": "x",
    }


def test_a_request_of_fal_comes_back_as_its_result() -> None:
    """Sizes, prompt and seed are those of the request, and images are inline if requested."""
    answer = from_result(fake_result("job-1", to_request(Z_IMAGE_TURBO)))

    assert (answer["prompt"], answer["seed"]) == (Z_IMAGE_TURBO["prompt"], Z_IMAGE_TURBO["seed"])
    assert [(image["width"], image["height"]) for image in answer["images"]] == [(1024, 576)] * 2
    assert {image["url"] for image in answer["images"]} == {"data:image/webp;base64,"}


def test_a_result_without_urls_cannot_be_converted() -> None:
    result: GenerateResult = fake_result(
        "job-1", parse_request({"prompt": "x", "url_policy": "key"})
    )

    with pytest.raises(InvalidRequest) as raised:
        from_result(result)

    assert raised.value.details["path"] == "$.url_policy"
