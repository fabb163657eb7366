"""Sweeps: every image is that of a plain job, with one merge and one encoding for many images."""

import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from PIL import Image
from support.fakes import (
    TEXT,
    UNET,
    MemoryStore,
    kohya_lora,
    pixels,
    settings,
    write,
)
from support.jobs import lora_cache, make_child, run_job
from zlora.errors import InvalidRequest, LoraMismatch, LoraNotFound, ZloraError
from zlora.lora.catalogue import Catalogue, CatalogueRow
from zlora.schema import GenerateRequest, GenerateResult, Phase, parse_request, parse_result
from zlora_worker.child import Child
from zlora_worker.delivery.lease import LeaseLost
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.results.manifest import delete_images, image_keys, read_result
from zlora_worker.results.provenance import image_provenances

WEIGHT: Final = "loras[0].weight"
ONE: Final = {"file": {"url": "lora://one"}}
FAST: Final = {"file": {"url": "lora://fast"}}


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(1000)


@pytest.fixture
def child(model: Pipeline, store: MemoryStore, model_home: Path, tmp_path: Path) -> Child:
    """Return a child whose catalogue has a LoRA of all components and one of the UNet alone."""
    files = {
        "one": write(tmp_path / "one.safetensors", kohya_lora((*UNET, *TEXT))),
        "fast": write(tmp_path / "fast.safetensors", kohya_lora()),
    }
    rows = {name: CatalogueRow(source=file.as_uri()) for name, file in files.items()}
    rows["few steps"] = CatalogueRow(source=files["fast"].as_uri(), recipe="lightning-2")
    made = settings(model_home, **lora_cache(tmp_path / "loras"), ZLORA_LORA_ROOTS=str(tmp_path))
    return make_child(model, store, made, catalogue=Catalogue(rows))


@pytest.fixture
def calls(model: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return how often LoRAs are merged, prompts are encoded and images are drawn."""
    counted = Counter[str]()

    def count(target: Any, name: str, called: str) -> None:
        real: Callable[..., Any] = getattr(target, name)

        def call(*arguments: Any, **options: Any) -> Any:
            counted[called] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(target, name, call)

    count(model.patch, "_merge", "merges")
    count(Pipeline, "encode", "encodings")
    count(model, "draw", "drawn")
    return counted


def sweep(axes: dict[str, Any], **fields: Any) -> GenerateRequest:
    base = {"prompt": "a city", "seed": 7, "num_inference_steps": 2, "embed_metadata": False}
    return parse_request(base | {"loras": [ONE]} | fields | {"sweep": axes})


def digests(result: GenerateResult) -> list[str | None]:
    return [image.pixels_sha256 for image in result.images]


SWEEPS: Final[dict[str, GenerateRequest]] = {
    "a weight and seeds": sweep({WEIGHT: [0, 0.5, -1], "seed": [1, 2]}),
    "prompts and guidance": sweep(
        {
            "prompt": ["a city", "a (lake:1.2) <lora:fast:0.5>"],
            "guidance_scale": [1, 5],
            "negative_prompt": ["", "blurry"],
        },
        prompt_syntax="a1111",
    ),
    "files and recipes": sweep(
        {"loras[0].file": [{"url": "lora://fast"}, {"url": "lora://few steps"}], WEIGHT: [0, 1]}
    ),
    "whole LoRAs and steps": sweep(
        {"loras": [[], [ONE], [FAST, ONE]], "num_inference_steps": [1, 2]}
    ),
    "schedulers": sweep({"scheduler": ["ddim", "euler_ancestral", None], "clip_skip": [0, 1]}),
    "strengths over steps and by block": sweep(
        {"loras[0].weights": [[[0, 1], [0.5, 0]], [[0, 0.5]]], "loras[0].blocks": [{"mid": 0}]},
        loras=[FAST],
    ),
    "second passes": sweep(
        {"upscale": [None, {"factor": 1.5}, {"factor": 1.2}]}, width=64, height=64
    ),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_every_image_is_that_of_a_plain_job_byte_for_byte(
    child: Child, store: MemoryStore, name: str
) -> None:
    """Also its request in the result, which draws the image again, and its receipts."""
    request = SWEEPS[name]

    result = run_job(child, "sweep", request)

    assert len(result.images) == len(result.cells) == len(request.cells)
    for index, (cell, image) in enumerate(zip(result.cells, result.images, strict=True)):
        plain = run_job(child, f"plain-{index}", request.cells[index])
        assert store.objects[image.key] == store.objects[plain.images[0].key]
        assert plain.request is not None
        assert cell.request == msgspec.structs.replace(plain.request, seed=plain.seed)
        assert (image.seed, cell.scheduler) == (plain.seed, plain.scheduler)
        assert cell.relative_norms == tuple(receipt.relative_norm for receipt in plain.loras)
        again = run_job(child, f"again-{index}", cell.request)
        assert digests(again) == [image.pixels_sha256]
    assert len(set(digests(result))) > 1
    assert parse_result(msgspec.json.encode(result)) == result
    assert read_result(store, "sweep") == result


def test_images_differ_in_one_noise_only_if_seeds_are_swept(child: Child) -> None:
    """A seed that is not given is made from the job's id, and is that of all images."""
    request = msgspec.structs.replace(sweep({WEIGHT: [0, 0, 1]}), seed=None)

    result = run_job(child, "job", request)

    assert {image.seed for image in result.images} == {result.seed}
    first, second, third = digests(result)
    assert first == second != third


def test_the_order_of_the_images_does_not_depend_on_that_of_the_paths(child: Child) -> None:
    """A JSON object has no order: seeds follow one another, and weights change seldom."""
    result = run_job(child, "job", sweep({"seed": [3, 1], WEIGHT: [1, 0]}))

    expected = [(1.0, 3), (1.0, 1), (0.0, 3), (0.0, 1)]
    assert [(cell.values[WEIGHT], cell.values["seed"]) for cell in result.cells] == expected


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({WEIGHT: [0.5, 1], "seed": [1, 2, 3]}, {"merges": 2, "encodings": 2, "drawn": 6}),
        (
            {"loras[0].unet_weight": [0.5, 1, 0], "seed": [1, 2]},
            {"merges": 3, "encodings": 1, "drawn": 6},
        ),
        (
            {"prompt": ["a", "b"], "seed": [1, 2], "guidance_scale": [2, 5]},
            {"merges": 1, "encodings": 2, "drawn": 8},
        ),
    ],
)
def test_loras_are_merged_once_for_each_set_and_texts_are_encoded_once(
    child: Child, calls: Counter[str], axes: dict[str, Any], expected: dict[str, int]
) -> None:
    """A text is encoded again only if a LoRA has another strength in the text encoders."""
    run_job(child, "before", parse_request({"prompt": "a", "loras": [FAST]}))
    calls.clear()

    run_job(child, "job", sweep(axes))

    assert calls == expected


def test_a_sweep_changes_nothing_in_the_next_job(child: Child) -> None:
    before = pixels(child.model)

    result = run_job(child, "sweep", sweep({WEIGHT: [0, 1], "scheduler": ["ddpm", "lcm"]}))

    assert result.base_intact
    assert pixels(child.model) == before


def test_steps_of_all_images_are_reported_together(child: Child) -> None:
    reports = list[tuple[int, int]]()

    def watch(phase: Phase, done: int, total: int) -> None:
        if phase is Phase.DENOISE:
            reports.append((done, total))

    run_job(child, "job", sweep({"num_inference_steps": [1, 3]}), watch)

    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("is_stopped", [True, False])
def test_a_later_delivery_draws_only_the_missing_images(
    child: Child, store: MemoryStore, calls: Counter[str], is_stopped: bool
) -> None:
    """Of an attempt that was stopped between two images, or whose images are partly lost."""
    request = sweep({WEIGHT: [0, 1], "seed": [1, 2, 3]}, embed_metadata=True)
    whole = run_job(child, "whole", request)
    kept = (0, 1, 2, 3)
    if is_stopped:

        def stop(phase: Phase, done: int, _total: int) -> None:
            if (phase, done) == (Phase.DENOISE, 9):
                raise LeaseLost("the worker stood still")

        with pytest.raises(LeaseLost):
            run_job(child, "job", request, stop)
    else:
        run_job(child, "job", request)
        kept = (0, 2, 3, 5)
        store.objects = {key: data for key, data in store.objects.items() if "runs/job/" not in key}
    for index in kept:  # as the sidecar stores them
        run = store.objects[f"runs/whole/outputs/{index}.png"]
        store.objects[f"runs/job/outputs/{index}.png"] = run
    calls.clear()

    again = run_job(child, "job", request, attempt=2, is_resumed=True)

    assert calls["drawn"] == 2
    assert digests(again) == digests(whole)
    assert again.cells == whole.cells
    assert again.sheet is not None
    assert whole.sheet is not None
    assert store.objects[again.sheet.key] == store.objects[whole.sheet.key]


def test_an_image_of_another_cell_is_not_taken_for_a_missing_one(
    child: Child, store: MemoryStore, calls: Counter[str]
) -> None:
    request = sweep({WEIGHT: [0, 1]}, embed_metadata=True)
    whole = run_job(child, "whole", request)
    store.objects["runs/job/outputs/1.png"] = store.objects["runs/whole/outputs/0.png"]
    calls.clear()

    again = run_job(child, "job", request, attempt=2, is_resumed=True)

    assert calls["drawn"] == 2
    assert digests(again) == digests(whole)


def test_the_sheet_shows_the_images_in_rows_of_the_last_path(
    child: Child, store: MemoryStore
) -> None:
    """Each tile is its image, enlarged by a whole factor, with its caption below it."""
    result = run_job(child, "job", sweep({WEIGHT: [0, 1], "seed": [1, 2, 3]}))

    assert result.sheet is not None
    data, content_type = store.objects[result.sheet.key]
    assert content_type == result.sheet.content_type == "image/jpeg"
    assert len(data) == result.sheet.size
    with Image.open(io.BytesIO(data)) as sheet:
        assert sheet.size == (result.sheet.width, result.sheet.height)
        assert sheet.width == 12 + 3 * (256 + 12)
        for index, image in enumerate(result.images):
            row, column = divmod(index, 3)
            left, top = 12 + column * 268, 12 + row * (256 + 2 * 22 + 12) + 22
            shown = sheet.crop((left, top, left + 256, top + 256)).resize((64, 64))
            with Image.open(io.BytesIO(store.objects[image.key][0])) as drawn:
                assert mean_difference(shown, drawn.convert("RGB")) < 8
            caption = sheet.crop((left, top + 258, left + 256, top + 278)).convert("L")
            assert sum(caption.histogram()[:128])  # pixels of dark letters


def mean_difference(one: Image.Image, other: Image.Image) -> float:
    pairs = zip(one.tobytes(), other.tobytes(), strict=True)
    return sum(abs(a - b) for a, b in pairs) / len(one.tobytes())


def test_the_images_and_the_sheet_of_a_failed_sweep_are_deleted(
    child: Child, store: MemoryStore
) -> None:
    request = sweep({WEIGHT: [0, 1]})
    run_job(child, "job", request)

    delete_images(store, image_keys("job", request))

    assert [key for key in store.objects if key.startswith("runs/job/")] == [
        "runs/job/manifest.json"
    ]


@pytest.mark.parametrize(
    ("axes", "error"),
    [
        ({"loras[0].file": [{"url": "lora://one"}, {"url": "lora://none"}]}, LoraNotFound),
        ({"clip_skip": [0, 50]}, InvalidRequest),
        ({"prompt": ["a", "b " * 4900]}, InvalidRequest),
        ({"loras[0].start": [0, 0.5]}, LoraMismatch),  # the LoRA changes the text encoders too
    ],
)
def test_one_image_that_cannot_be_drawn_fails_the_sweep_before_any_is_drawn(
    child: Child, calls: Counter[str], axes: dict[str, Any], error: type[ZloraError]
) -> None:
    with pytest.raises(error) as raised:
        run_job(child, "job", sweep(axes))

    assert raised.value.details["image"] == 1
    assert not calls


def test_secrets_in_the_values_are_in_no_result(child: Child, store: MemoryStore) -> None:
    known = run_job(child, "first", sweep({"seed": [1]})).loras[0]
    axes = {
        "loras[0].file": [
            {"url": "https://files.invalid/one.safetensors?hidden", "sha256": known.sha256},
            ONE["file"],
        ],
        "loras[0].adapter_name": ["https://user:hidden@host/name?token=hidden"],
    }

    result = run_job(child, "job", sweep(axes, embed_metadata=True))

    assert "hidden" not in repr(result)
    assert not any(b"hidden" in data for data, _ in store.objects.values())
    for provenance in image_provenances(result):
        assert provenance.request.loras[0].file.sha256 == known.sha256


def test_a_lora_is_opened_once_however_many_images_have_it(child: Child) -> None:
    fetches = list[tuple[int, int]]()

    def watch(phase: Phase, done: int, total: int) -> None:
        if phase is Phase.PARSE:
            fetches.append((done, total))

    run_job(child, "job", sweep({WEIGHT: [1, 2, 3]}), watch)

    assert fetches == [(0, 1)]
