"""Infotext of any request, read back by a parser of its published grammar."""

import json
import re
from typing import Any, Final

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.fakes import a_request, image_provenance
from zlora.prompt_syntax import parse
from zlora.schedulers import SCHEDULERS, Schedule, find_scheduler, recorded_name
from zlora.schema import Asset, EmbeddingSpec, GenerateRequest, LoraSpec, Upscale, parse_request
from zlora_worker.results.infotext import infotext

NEGATIVE: Final = "Negative prompt: "
CONTROLS: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
LONG: Final = 10_000  # characters; a prompt has no more
# Characters that end a line, a value or a tag, or are not characters, or are two in UTF-16.
ODD: Final = st.text(
    st.sampled_from("\0\t\n\r\x0b\x1c\x7f\x85\u2028\u2029\ufeff\ufffe\uffff\U0001f600:,\"\\<>'é ")
)
TEXTS: Final = st.text(max_size=30) | ODD
WEIGHTS: Final = st.floats(min_value=-4, max_value=4)
SPECS: Final = st.fixed_dictionaries(
    {"file": st.fixed_dictionaries({"url": st.text(min_size=1, max_size=30) | ODD.filter(bool)})},
    optional={
        "weight": WEIGHTS,
        "unet_weight": WEIGHTS,
        "text_encoder_weight": WEIGHTS,
        "adapter_name": TEXTS,
    },
)
REQUESTS: Final = st.fixed_dictionaries(
    {"prompt": TEXTS},
    optional={
        "negative_prompt": TEXTS,
        "loras": st.lists(SPECS, max_size=8),
        "guidance_scale": st.floats(min_value=0, max_value=50),
        "num_inference_steps": st.integers(1, 200),
        "output_format": st.sampled_from(["png", "jpeg", "webp"]),
    },
)


def spec(url: str = "https://a.invalid/b.safetensors", **fields: Any) -> LoraSpec:
    return LoraSpec(file=Asset(url=url), **fields)


def written(request: GenerateRequest, **fields: Any) -> str:
    return infotext(
        image_provenance(request, **fields),
        [digest(number) for number in range(sum(spec.is_used for spec in request.loras))],
    )


def digest(number: int) -> str:
    """Return a sha256 that is known by its first 12 digits, and not by fewer."""
    return f"{number:012x}".ljust(64, "f")


# --- the form


def test_infotext_has_the_hashes_of_embeddings() -> None:
    """By their words, without what would end a name."""
    specs = tuple(
        EmbeddingSpec(
            file=Asset(url="https://a.invalid/b.safetensors", sha256=digest(n)), token=token
        )
        for n, token in enumerate(("badhands", "<s0>", None))
    )

    hashes = 'TI hashes: "badhands: 000000000000, s0: 000000000001, b: 000000000002"'
    assert hashes in written(a_request(embeddings=specs))


def test_infotext_has_the_strength_and_the_blur_of_the_web_ui() -> None:
    image = Asset(url="https://a.invalid/b.png", sha256=digest(0))

    text = written(a_request(num_inference_steps=20, image=image, mask=image, mask_blur=4))

    assert "Steps: 20," in text
    assert "Denoising strength: 0.75, Mask blur: 4, " in text
    assert "Mask blur" not in written(a_request(image=image, strength=1))


def test_infotext_has_the_second_pass_as_the_web_ui_writes_it() -> None:
    """The size is that of the first pass."""
    upscale = Upscale(factor=2, strength=0.4, steps=12, mode="latent")

    text = written(a_request(width=512, height=768, upscale=upscale))

    assert "Denoising strength: 0.4, Hires upscale: 2, Hires steps: 12, " in text
    assert "Hires upscaler: Latent, Seed: 7, Size: 512x768, " in text
    assert "Hires upscaler: Lanczos" in written(a_request(upscale=Upscale(factor=2)))


def test_infotext_has_the_form_of_the_web_ui() -> None:
    request = a_request(
        prompt="a city,\nat night",
        negative_prompt="blurry",
        loras=(
            spec(weight=0.8),
            spec(adapter_name="neon: lights, v2", unet_weight=0.5, text_encoder_weight=0.0),
        ),
    )

    assert written(
        request, scheduler="DPMSolverMultistepScheduler karras", model_sha256="a" * 64, model="x, y"
    ) == (
        "a city, at night <lora:b:0.8> <lora:neon lights v2:0:0.5>\n"
        "Negative prompt: blurry\n"
        "Steps: 1, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7.5, Seed: 7, Size: 64x72, "
        'Model hash: aaaaaaaaaa, Model: "x, y", RNG: CPU, '
        'Lora hashes: "b: 000000000000, neon lights v2: 000000000001", Version: z-image-lora 1.2'
    )


@pytest.mark.parametrize(
    ("base", "guidance", "shown"),
    [("SDXL", 7.5, "7.5"), ("SD 1.x", 1.0, "1"), ("Z-Image", 0.0, "1"), ("Z-Image", 3.5, "4.5")],
)
def test_the_guidance_scale_is_counted_as_in_the_web_ui(
    base: str, guidance: float, shown: str
) -> None:
    """One is no guidance there."""
    text = written(a_request(guidance_scale=guidance), base=base)

    assert pairs(text.rpartition("\n")[2])["CFG scale"] == shown


@given(document=REQUESTS, model=TEXTS)
@example(
    document={"prompt": "Negative prompt: a", "negative_prompt": "Steps: 1, Sampler: b"},
    model='"quoted"',
)
@example(document={"prompt": "Steps: 1, Sampler: b, Seed: 2, CFG scale: 3"}, model="a: b")
@example(
    document={"prompt": "", "loras": [{"file": {"url": "a"}, "adapter_name": "\0"}] * 8}, model=".."
)
def test_any_request_is_read_back(document: dict[str, Any], model: str) -> None:
    """Each part is one line, however lines are split.

    Prompts are read back except for spaces, numbers to their last digit, and each tag has a hash.
    """
    request = parse_request(document)

    text = written(request, model=model)
    lines = text.split("\n")
    settings = pairs(lines.pop())
    negative = (
        lines.pop().removeprefix(NEGATIVE) if lines and lines[-1].startswith(NEGATIVE) else ""
    )
    prompt = lines.pop() if lines else ""

    assert lines == []
    assert not any(re.search("Negative prompt:|^Steps:", line) for line in (prompt, negative))
    assert text.splitlines() == text.split("\n")
    assert CONTROLS.sub("", text) == text.replace("\n", "")
    assert letters(read(negative)) == letters(request.negative_prompt)
    assert (int(settings["Steps"]), float(settings["CFG scale"])) == (
        request.steps,
        request.guidance,
    )
    assert (settings["Sampler"], settings["Seed"], settings["Size"]) == ("Euler", "7", "64x72")
    assert (settings["Model hash"], settings["Version"]) == ("b" * 10, "z-image-lora 1.2")
    assert settings["RNG"] == "CPU"
    used = [lora.component_weights for lora in request.loras if lora.is_used]
    names, weights = tags(prompt, len(used))
    assert weights == used
    assert hashes(settings) == [(name, digest(number)[:12]) for number, name in enumerate(names)]
    assert letters(read(prompt)).startswith(letters(request.prompt))


def test_brackets_of_a_plain_prompt_are_no_weights_and_those_of_a_prompt_with_weights_are() -> None:
    prompt = r"a (city:1.3) \(1990\) [BREAK]"

    plain, a1111 = (
        written(a_request(prompt=prompt, prompt_syntax=syntax)).split("\n")[0]
        for syntax in ("plain", "a1111")
    )

    assert read(plain) == prompt
    assert a1111 == prompt


@pytest.mark.parametrize(
    ("base", "shown"), [(None, "3"), ("SDXL", "3"), ("SD 1.x", "2"), ("SD 2.x", "2")]
)
def test_clip_skip_counts_from_the_last_layer(base: str | None, shown: str) -> None:
    """SDXL reads the last but one; results of earlier versions do not have the family."""
    skipped = [
        written(a_request(clip_skip=skip), base=base).split("\n")[-1] for skip in (None, 0, 1)
    ]

    assert [pairs(line).get("Clip skip") for line in skipped] == [None, None, shown]


def test_strengths_over_steps_and_by_block_are_pairs_of_their_own() -> None:
    """By the names of the tags, with the shares of the steps; a plain LoRA has none."""
    loras = (
        spec(adapter_name="a", start=0.2, end=0.85, weight=0.5),
        spec(
            adapter_name="b", weights=((0.0, 1.0), (0.5, 0.3)), blocks={"down.1": 0.5, "mid": 0.0}
        ),
        spec(adapter_name="c"),
    )

    prompt, last = written(a_request(loras=loras)).split("\n")

    assert prompt == "a city at night <lora:a:0:0.5> <lora:b:0:1> <lora:c:1>"
    assert pairs(last)["Lora weights"] == "a: 0@0 0.5@0.2 0@0.85, b: 1@0 0.3@0.5"
    assert pairs(last)["Lora blocks"] == "b: 0.5@down.1 0@mid"


def test_loras_of_the_same_name_get_numbers() -> None:
    """A numbered name that another LoRA has is skipped; each tag has its own hash."""
    loras = (
        spec(),
        spec("hf://o/r/b.safetensors"),
        spec(adapter_name="b_2"),
        spec("file:///b_2"),
        spec(adapter_name="b"),
    )

    prompt, last = written(a_request(loras=loras)).split("\n")

    names, _ = tags(prompt, 5)
    assert names == ["b", "b_2", "b_2_2", "b_2_3", "b_3"]
    assert hashes(pairs(last)) == [(name, digest(number)[:12]) for number, name in enumerate(names)]


@pytest.mark.parametrize(
    "address",
    ["https://a.invalid/", "file:///", "sha256:" + "0" * 64, "x" * 4096, "?", "civitai://7"],
)
def test_any_address_gives_a_name_of_bounded_length(address: str) -> None:
    prompt, last = written(a_request(loras=(spec(address),))).split("\n")

    names, _ = tags(prompt, 1)
    assert hashes(pairs(last)) == [(names[0], digest(0)[:12])]
    assert 0 < len(names[0]) <= 200


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_sampler_of_infotext_reads_back_to_the_same_scheduler(name: str) -> None:
    """With each schedule, as the web UI joins sampler and schedule type."""
    entry = SCHEDULERS[name]
    schedules: list[Schedule | None] = [None, *entry.schedules]
    for schedule in schedules:
        config = {**entry.options, **entry.formulas(schedule)}
        recorded = recorded_name(entry.class_name, config, schedule=schedule)

        settings = pairs(written(a_request(), scheduler=recorded).split("\n")[-1])

        given = f"{settings['Sampler']} {settings.get('Schedule type', '')}"
        assert find_scheduler(given) == find_scheduler(recorded) == (name, schedule)


@pytest.mark.parametrize(
    ("recorded", "sampler", "schedule_type"),
    [
        ("EulerDiscreteScheduler", "Euler", None),
        ("EulerAncestralDiscreteScheduler trailing", "Euler a", "SGM Uniform"),
        ("DPMSolverMultistepScheduler karras", "DPM++ 2M", "Karras"),
        ("DPMSolverMultistepScheduler dpmpp_2m_sde exponential", "DPM++ 2M SDE", "Exponential"),
        ("DPMSolverSDEScheduler karras", "DPM++ SDE", "Karras"),
        ("KDPM2AncestralDiscreteScheduler", "DPM2 a", None),
        ("PNDMScheduler", "PLMS", None),
        ("ScoreSdeVeScheduler karras", "ScoreSdeVe", "Karras"),
    ],
)
def test_a_scheduler_has_its_name_in_the_web_ui(
    recorded: str, sampler: str, schedule_type: str | None
) -> None:
    settings = pairs(written(a_request(), scheduler=recorded).split("\n")[-1])

    assert (settings["Sampler"], settings.get("Schedule type")) == (sampler, schedule_type)


@pytest.mark.parametrize(
    ("scheduler", "name"), [("DDIMScheduler", "Eta DDIM"), ("TCDScheduler", "Eta")]
)
def test_eta_has_the_name_of_its_setting_in_the_web_ui(scheduler: str, name: str) -> None:
    settings = pairs(written(a_request(eta=0.25), scheduler=scheduler).split("\n")[-1])

    assert settings[name] == "0.25"


def test_custom_levels_are_read_back() -> None:
    """The web UI has no name for them, and keeps what it does not know."""
    settings = pairs(written(a_request(timesteps=(999, 5))).split("\n")[-1])
    assert settings["Timesteps"] == "999, 5"

    settings = pairs(written(a_request(sigmas=(14.6, 0.1))).split("\n")[-1])
    assert settings["Sigmas"] == "14.6, 0.1"


@pytest.mark.parametrize(("prompt", "negative"), [(LONG, LONG), (LONG, 10), (0, LONG)])
@pytest.mark.parametrize("character", ["a", "\u6f22", "\U0001f600"])
def test_long_prompts_are_cut_in_a_jpeg_only_and_only_if_they_must_be(
    character: str, prompt: int, negative: int
) -> None:
    """Whole characters are kept up to an ellipsis, as many as there is room for."""
    loras = tuple(spec(adapter_name="\U0001f600" * 199 + str(number)) for number in range(8))
    fields = {"prompt": character * prompt, "negative_prompt": character * negative, "loras": loras}

    whole, jpeg = (written(a_request(output_format=form, **fields)) for form in ("webp", "jpeg"))

    size = len(jpeg.encode("utf-16-be"))
    assert size <= 64_100
    if len(whole.encode("utf-16-be")) <= 64_000:
        assert jpeg == whole
        return
    assert size >= 63_900
    for line, full in zip(jpeg.split("\n"), whole.split("\n"), strict=True):
        begin, _, end = line.partition("…")
        assert full.startswith(begin)
        assert full.endswith(end)


# --- the parser


def pairs(line: str) -> dict[str, str]:
    """Return the pairs of a key, a colon, and a JSON string or text up to the comma."""
    found: dict[str, str] = {}
    while line:
        key, colon, line = line.partition(": ")
        assert colon
        assert key not in found
        end = len(line.split(",")[0])
        if line.startswith('"'):
            found[key], end = json.JSONDecoder().raw_decode(line)
        else:
            found[key] = line[:end]
        assert line[end : end + 2] in (", ", "")
        line = line[end + 2 :]
    return found


def hashes(settings: dict[str, str]) -> list[tuple[str, str]]:
    """Return names and hashes; each name must be unique, since tools look up hashes by it."""
    entries = [entry.split(": ") for entry in settings.get("Lora hashes", "").split(", ") if entry]
    assert len({name for name, _ in entries}) == len(entries)
    return [(name, found) for name, found in entries]


def tags(prompt: str, number: int) -> tuple[list[str], list[tuple[float, float]]]:
    """Return names and weights (UNet, text encoders) of the last `number` tags."""
    found = re.findall(r"<lora:([^:<>,]+):([^:<>]+)(?::([^:<>]+))?>", prompt)
    last = found[len(found) - number :]
    return [name for name, *_ in last], [
        (float(unet or text), float(text)) for _, text, unet in last
    ]


def read(prompt: str) -> str:
    """Return the text of a prompt in the web UI's syntax, in which nothing has a weight."""
    ((fragment,),) = parse(prompt, "a1111").sections
    assert fragment.weight == 1
    return fragment.text


def letters(text: str) -> str:
    """Return a text without spaces and control characters."""
    return "".join(CONTROLS.sub("", text).split())
