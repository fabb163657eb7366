"""Jobs with the tiny model and a real cache, which has their LoRAs unless a test says otherwise."""

import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import torch
from PIL import Image
from support.fakes import (
    TEXT,
    UNET,
    MemoryStore,
    a_request,
    kohya_lora,
    peft_lora,
    pixels,
    settings,
    write,
)
from support.jobs import Watch, lora_cache, make_child, run_job
from support.servers import reply, serving
from support.tiny_folder import TINY
from zlora.errors import (
    InvalidRequest,
    JobRevoked,
    LoraError,
    LoraMismatch,
    LoraNotAllowed,
    NotSafetensors,
    StoreFailed,
)
from zlora.schema import (
    MAX_IMAGES,
    MAX_SEED,
    Asset,
    EmbeddingSpec,
    GenerateResult,
    LoraSpec,
    OutputFormat,
    Phase,
    PromptReceipt,
    digest_of,
    seed_of,
)
from zlora_worker.child import Child
from zlora_worker.model.pipeline import Pipeline, PipelineState
from zlora_worker.results.store import FolderStore, Store

PHASES = ["fetch", "parse", "apply", "denoise", "restore", "tail", "encode", "upload"]


@pytest.fixture
def pinned(cached: Callable[..., Asset]) -> Callable[..., LoraSpec]:
    """Return a function that puts a LoRA's file in the cache, and returns its spec."""

    def put(file: Path, **fields: Any) -> LoraSpec:
        return LoraSpec(file=cached(file.read_bytes(), name=file.name), **fields)

    return put


def kohya_bytes(folder: Path) -> bytes:
    return write(folder / "served.safetensors", kohya_lora()).read_bytes()


def read(data: bytes) -> Image.Image:
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


# --- images and seeds


def test_image_i_is_the_image_of_a_job_with_seed_plus_i(child: Child, store: MemoryStore) -> None:
    result = run_job(child, "many", a_request(seed=40, num_images=2))

    assert result.seed == 40
    assert [image.seed for image in result.images] == [40, 41]
    for image in result.images:
        single = pixels(child.model, seed=image.seed)
        assert read(store.objects[image.key][0]).tobytes() == single


def test_a_job_without_a_seed_has_the_seed_of_its_id(child: Child, store: MemoryStore) -> None:
    """The seed is the same at each delivery, is in the result, and differs for another id."""
    results = [run_job(child, job_id, a_request()) for job_id in ("one", "one", "two")]

    assert [result.seed for result in results] == [seed_of("one"), seed_of("one"), seed_of("two")]
    assert results[0].images == results[1].images
    assert results[0].images[0].pixels_sha256 != results[2].images[0].pixels_sha256
    assert 0 <= results[0].seed <= MAX_SEED - MAX_IMAGES
    assert read(store.objects["runs/one/outputs/0.png"][0]).tobytes() == pixels(
        child.model, seed=seed_of("one")
    )


def test_seed_zero_is_not_replaced(child: Child) -> None:
    assert run_job(child, "zero", a_request(seed=0)).seed == 0


@pytest.mark.parametrize("output_format", get_args(OutputFormat))
def test_an_image_is_stored_as_the_result_describes_it(
    child: Child, store: MemoryStore, output_format: OutputFormat
) -> None:
    request = a_request(output_format=output_format, width=128, height=72)

    (image,) = run_job(child, "formats", request).images

    data, content_type = store.objects[image.key]
    assert image.key == f"runs/formats/outputs/0.{output_format}"
    assert image.url is None  # URLs are made when a result is read
    if request.keeps_pixels:
        assert image.pixels_sha256 == hashlib.sha256(read(data).tobytes()).hexdigest()
    assert (image.size, image.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert image.content_type == content_type == Image.MIME[str(read(data).format)]
    assert (image.width, image.height) == read(data).size == (128, 72)


# --- the store


def test_the_manifest_is_stored_last_and_is_the_result(child: Child, store: MemoryStore) -> None:
    result = run_job(child, "job-1", a_request(num_images=2), queued=0.5)

    images = [f"runs/job-1/outputs/{index}.png" for index in range(2)]
    assert [image.key for image in result.images] == images
    *stored, last = store.objects
    assert (sorted(stored), last) == (images, "runs/job-1/manifest.json")
    manifest, content_type = store.objects["runs/job-1/manifest.json"]
    assert msgspec.json.decode(manifest, type=GenerateResult) == result
    assert content_type == "application/json"


def test_a_job_delivered_twice_leaves_one_set_of_images(
    model: Pipeline, model_home: Path, tmp_path: Path
) -> None:
    child = make_child(
        model, FolderStore(tmp_path / "store"), settings(model_home, **lora_cache(tmp_path))
    )

    first, again = (run_job(child, "twice", a_request()) for _ in range(2))

    assert first.images == again.images
    files = sorted(path.name for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert files == ["0.png", "manifest.json"]


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_failure_of_the_store_leaves_no_manifest_and_an_intact_model(
    child: Child, plain: bytes, pinned: Callable[..., LoraSpec], tmp_path: Path, room: int
) -> None:
    """The store fails at the first image, at the second one, and at the manifest."""
    store = MemoryStore(room)
    child = dataclasses.replace(child, store=store)
    spec = pinned(write(tmp_path / "a.safetensors", kohya_lora()))
    request = a_request(num_images=2, loras=(spec,))

    with pytest.raises(StoreFailed):
        run_job(child, "unstored", request)

    assert "runs/unstored/manifest.json" not in store.objects
    assert child.model.state is PipelineState.READY
    assert pixels(child.model) == plain


def test_a_folder_that_cannot_be_written_is_a_store_failure(child: Child, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the folder should be")
    store: Store = FolderStore(tmp_path / "store")

    with pytest.raises(StoreFailed, match="runs/job/"):
        run_job(dataclasses.replace(child, store=store), "job", a_request())

    assert child.model.state is PipelineState.READY


# --- prompts


def test_a_job_encodes_its_prompts_once_and_says_how_they_were_read(
    child: Child, store: MemoryStore
) -> None:
    """Also with weights; the images are those of single jobs."""
    fields = {"prompt": "a (city:1.3) at night, " * 20, "negative_prompt": "fog"}
    request = a_request(**fields, prompt_syntax="a1111", num_images=2, seed=3)
    calls: list[object] = []
    with child.model.pipeline.text_encoder.register_forward_hook(lambda *_: calls.append(None)):
        result = run_job(child, "prompts", request)

    assert len(calls) == 4  # both prompts, and an empty text beside each
    assert result.prompt_receipt == PromptReceipt(tokens=100, windows=2)
    assert result.negative_prompt_receipt == PromptReceipt(tokens=3, windows=1)
    for image in result.images:
        single = pixels(child.model, seed=image.seed, **fields, prompt_syntax="a1111")
        assert read(store.objects[image.key][0]).tobytes() == single


def test_a_prompt_is_read_by_the_text_encoders_with_their_loras(
    child: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    lora = pinned(write(tmp_path / "text.safetensors", kohya_lora(TEXT)))
    fields = {"prompt": "a (city:1.3) at [night]", "prompt_syntax": "a1111"}

    digests = [
        run_job(child, f"text-{len(loras)}", a_request(seed=1, loras=loras, **fields)).images[0]
        for loras in ((), (lora,))
    ]

    assert digests[0].pixels_sha256 != digests[1].pixels_sha256


@pytest.mark.parametrize("fields", [{"prompt": "photo " * 751}, {"clip_skip": 3}])
def test_a_prompt_that_the_model_cannot_read_fails_its_job_only(
    child: Child, plain: bytes, store: MemoryStore, fields: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest):
        run_job(child, "unread", a_request(**fields))

    assert not store.objects
    assert child.model.state is PipelineState.READY
    assert pixels(child.model) == plain


# --- progress and receipts


def test_phases_and_steps_are_reported_in_order(
    child: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """Steps are counted over all images."""
    reports: list[tuple[Phase, int, int]] = []
    report: Watch = lambda *event: reports.append(event)  # noqa: E731 - typed
    files = [
        write(tmp_path / "1.safetensors", kohya_lora()),
        write(tmp_path / "2.safetensors", peft_lora()),
    ]
    loras = tuple(pinned(file) for file in files)

    run_job(child, "watched", a_request(num_images=2, num_inference_steps=3, loras=loras), report)

    assert list(dict.fromkeys(reports)) == [  # a phase repeats its last report while it lasts
        (Phase.PARSE, 0, 2),
        *((Phase.DENOISE, step, 6) for step in range(1, 7)),
        *((Phase.UPLOAD, done, 2) for done in (0, 2)),
    ]


def test_a_download_is_reported_with_its_bytes(
    model: Pipeline, model_home: Path, store: MemoryStore, tmp_path: Path
) -> None:
    """The download comes before every other phase."""
    reports: list[tuple[Phase, int, int]] = []
    report: Watch = lambda *event: reports.append(event)  # noqa: E731 - typed
    data = kohya_bytes(tmp_path)
    with serving(reply(data, ETag='"1"')) as host:
        allowed = lora_cache(tmp_path / "loras") | {"ZLORA_ALLOW_HOSTS": host.name}
        child = make_child(model, store, settings(model_home, **allowed))
        url = f"{host.url}/a.safetensors"
        run_job(child, "fetched", a_request(loras=(LoraSpec(file=Asset(url=url)),)), report)

    pieces = [event for event in reports if event[0] is Phase.FETCH]
    assert pieces
    assert reports[: len(pieces)] == pieces
    assert pieces[0] == (Phase.FETCH, 0, 0)  # before the server replies
    assert pieces[-1] == (Phase.FETCH, len(data), len(data))
    assert [received for _, received, _ in pieces] == sorted(
        {received for _, received, _ in pieces}
    )
    assert reports[len(pieces)] == (Phase.PARSE, 0, 1)


def test_a_job_that_is_cancelled_in_a_download_stores_nothing(
    model: Pipeline, model_home: Path, store: MemoryStore, tmp_path: Path
) -> None:
    cancelled = JobRevoked("job was cancelled", {"job_id": "job"})

    def report(phase: Phase, received: int, _expected: int) -> None:
        assert phase is Phase.FETCH
        if received:
            raise cancelled

    with serving(reply(kohya_bytes(tmp_path))) as host:
        allowed = lora_cache(tmp_path / "loras") | {"ZLORA_ALLOW_HOSTS": host.name}
        child = make_child(model, store, settings(model_home, **allowed))
        with pytest.raises(JobRevoked) as raised:
            run_job(
                child,
                "job",
                a_request(loras=(LoraSpec(file=Asset(url=f"{host.url}/a")),)),
                report,
            )

    assert raised.value is cancelled
    assert store.objects == {}
    files = [path.name for path in (tmp_path / "loras").rglob("*") if path.is_file()]
    assert files == ["lock"]


def test_the_result_has_the_time_the_attempt_and_the_request_of_the_job(child: Child) -> None:
    request, before = a_request(seed=3), time.time()

    result = run_job(child, "job", request, attempt=3)

    assert result.started_at is not None
    assert result.finished_at is not None
    assert before <= result.started_at <= result.finished_at <= time.time()
    assert (result.attempt, result.tiled, result.request_sha256) == (3, False, digest_of(request))
    in_parallel = result.timings["encode"] + result.timings["upload"]  # with the drawing
    in_turn = sum(result.timings.values()) - in_parallel
    assert result.finished_at - result.started_at >= in_turn - 0.01


def test_the_result_says_whether_its_model_was_compiled(
    child: Child, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Metadata of images say it only if it was: those of earlier versions mean the same."""
    results = []
    for mode in ("off", "blocks"):
        monkeypatch.setattr(child.model, "_compile_mode", mode)
        results.append(run_job(child, mode, a_request(seed=3)))

    assert [result.compile for result in results] == ["off", "blocks"]
    texts = [read(store.objects[result.images[0].key][0]).info["zlora"] for result in results]
    assert [json.loads(text).get("compile") for text in texts] == [None, "blocks"]


@pytest.mark.parametrize("index", [0, 1])
def test_a_result_is_tiled_if_any_of_its_images_was_decoded_in_tiles(
    child: Child, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    decode, decoded = child.model.vae._decode_whole, list[int]()

    def small(*arguments: Any, **options: Any) -> Any:
        decoded.append(1)
        if len(decoded) == index + 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*arguments, **options)

    monkeypatch.setattr(child.model.vae, "_decode_whole", small)

    assert run_job(child, "tiled", a_request(num_images=2)).tiled


def test_the_result_has_the_seconds_of_each_phase(child: Child) -> None:
    direct = run_job(child, "direct", a_request())
    queued = run_job(child, "queued", a_request(), queued=1.25)

    assert list(direct.timings) == PHASES
    assert list(queued.timings) == ["queued", *PHASES]
    assert queued.timings["queued"] == 1.25
    assert all(seconds >= 0 for seconds in direct.timings.values())
    assert direct.timings["denoise"] > 0


def test_two_loras_may_have_the_same_adapter_name(
    child: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """The name is a label of the producer, and identifies nothing in the worker."""
    files = [
        write(tmp_path / "one.safetensors", kohya_lora(UNET)),
        write(tmp_path / "two.safetensors", peft_lora(UNET)),
    ]
    loras = tuple(pinned(file, adapter_name="my.style") for file in files)

    result = run_job(child, "labels", a_request(loras=loras))

    assert [receipt.adapter_name for receipt in result.loras] == ["my.style", "my.style"]
    assert [receipt.format for receipt in result.loras] == ["kohya", "peft"]


def test_the_receipt_has_what_was_used_of_each_lora(
    child: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """Receipts are in the order of the request, and sources have no credentials and no query."""
    files = [
        write(tmp_path / "one.safetensors", kohya_lora(UNET)),
        write(tmp_path / "two.safetensors", peft_lora((*UNET, *TEXT), ranks=(4, 2))),
    ]
    loras = (
        pinned(files[0], weight=0.5),
        pinned(files[1], weight=0.75, text_encoder_weight=0.25, adapter_name="a.b"),
    )

    result = run_job(child, "receipt", a_request(loras=loras))

    one, two = result.loras
    assert [receipt.source for receipt in result.loras] == [
        f"https://files.invalid/{file.name}" for file in files
    ]
    assert [receipt.sha256 for receipt in result.loras] == [spec.file.sha256 for spec in loras]
    assert [receipt.size for receipt in result.loras] == [file.stat().st_size for file in files]
    assert (one.format, one.ranks, one.tier) == ("kohya", (2,), "disk")
    assert (two.format, two.ranks, two.tier) == ("peft", (2, 4), "disk")
    assert (one.unet_weight, one.text_encoder_weight, one.adapter_name) == (0.5, 0.5, None)
    assert (two.unet_weight, two.text_encoder_weight, two.adapter_name) == (0.75, 0.25, "a.b")
    assert one.modules == {"unet": 3}
    assert two.modules == {"unet": 3, "text_encoder": 3, "text_encoder_2": 3}
    assert all(
        receipt.milliseconds[phase] >= 0 for receipt in result.loras for phase in ("fetch", "parse")
    )
    assert all(
        receipt.relative_norm is not None and receipt.relative_norm > 0.1
        for receipt in result.loras
    )
    assert {receipt.kinds for receipt in result.loras} == {("lora",)}
    assert result.base_intact
    assert 0 < result.base_checked <= 1
    assert result.model == child.model.name == TINY
    assert {"z-image-lora", "torch", "diffusers"} <= result.versions.keys()
    assert "pa55" not in repr(result)
    assert "s3cret" not in repr(result)


def test_a_lora_that_was_used_before_comes_from_memory_with_any_weight(
    child: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """The image is the same as at first."""
    file = write(tmp_path / "a.safetensors", kohya_lora())
    requests = [
        a_request(seed=1, loras=(pinned(file, weight=weight),)) for weight in (0.5, 0.9, 0.5)
    ]

    first, other, again = (
        run_job(child, f"memory-{i}", request) for i, request in enumerate(requests)
    )

    assert [result.loras[0].tier for result in (first, other, again)] == [
        "disk",
        "memory",
        "memory",
    ]
    assert (
        first.images[0].pixels_sha256
        == again.images[0].pixels_sha256
        != other.images[0].pixels_sha256
    )


def test_tensors_without_a_target_are_ignored_if_strict_is_false_and_are_in_the_receipt(
    child: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """The parsed LoRA that is kept in memory does not depend on `strict`."""
    unmatched = {"unet.nowhere.lora_A.weight": torch.ones(2, 2), "emphasis": torch.ones(2)}
    file = write(tmp_path / "a.safetensors", peft_lora() | unmatched)
    plain = write(tmp_path / "b.safetensors", peft_lora())
    strict, lenient = (
        a_request(seed=1, loras=(pinned(file, strict=strict),)) for strict in (True, False)
    )

    with pytest.raises(LoraMismatch, match="strict"):
        run_job(child, "strict", strict)
    result = run_job(child, "lenient", lenient)
    with pytest.raises(LoraMismatch, match="strict"):
        run_job(child, "strict", strict)

    (receipt,) = result.loras
    assert receipt.unmatched == {"unet": 1, "unknown": 1}
    assert receipt.unmatched_names == ("emphasis", "unet.nowhere.lora_A.weight")
    without = run_job(child, "plain", a_request(seed=1, loras=(pinned(plain),)))
    assert result.images[0].pixels_sha256 == without.images[0].pixels_sha256


def test_a_weight_of_one_component_replaces_weight_even_if_it_is_zero(
    child: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    file = write(tmp_path / "a.safetensors", kohya_lora((*UNET, *TEXT)))
    cases: list[dict[str, float]] = [
        {"weight": 0.5},
        {"weight": 3.0, "unet_weight": 0.5, "text_encoder_weight": 0.5},
        {"weight": 0.5, "unet_weight": 0.0},
        {"weight": 0.5, "text_encoder_weight": 0.0},
        {"weight": 0.0},
    ]

    digests = [
        run_job(child, f"weights-{i}", a_request(seed=7, loras=(pinned(file, **case),)))
        .images[0]
        .pixels_sha256
        for i, case in enumerate(cases)
    ]
    without = run_job(child, "without", a_request(seed=7)).images[0].pixels_sha256

    assert digests[0] == digests[1]
    assert digests[4] == without
    assert len(set(digests)) == 4


# --- peft's alpha


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return the file of a folder that peft saved."""
    tensors = {
        f"base_model.model.{name.removeprefix('unet.')}": tensor
        for name, tensor in peft_lora().items()
    }
    path = write(tmp_path / "roots" / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
    path.with_name("adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def opener(model: Pipeline, store: MemoryStore, model_home: Path, tmp_path: Path) -> Child:
    """Return a child that opens files of folders."""
    variables = lora_cache(tmp_path / "loras") | {"ZLORA_LORA_ROOTS": str(tmp_path / "roots")}
    return make_child(model, store, settings(model_home, **variables))


def drawn(child: Child, job_id: str, spec: LoraSpec) -> tuple[GenerateResult, str]:
    result = run_job(child, job_id, a_request(seed=3, loras=(spec,)))
    return result, str(result.images[0].pixels_sha256)


def test_a_job_uses_the_configuration_beside_its_file_and_a_replay_pins_it(
    opener: Child, saved: Path
) -> None:
    """The strength is that of peft, also in a job after one without the configuration."""
    spec, config = LoraSpec(file=Asset(url=saved.as_uri())), saved.with_name("adapter_config.json")
    first, image = drawn(opener, "first", spec)
    _, doubled = drawn(opener, "doubled", LoraSpec(file=Asset(url=saved.as_uri()), alpha=4.0))
    (receipt,) = first.loras
    recorded = first.request.loras[0] if first.request else spec
    assert image == doubled
    assert receipt.config_sha256 == hashlib.sha256(config.read_bytes()).hexdigest()
    assert receipt.warnings == ()

    config.unlink()
    alone, weaker = drawn(opener, "alone", spec)
    assert alone.loras[0].warnings == ("alpha: assumed equal to rank",)
    assert (alone.loras[0].config_sha256, weaker == image) == ("none", False)

    assert drawn(opener, "replayed", recorded)[1] == image
    config.write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 40}))
    recorded = alone.request.loras[0] if alone.request else spec
    assert drawn(opener, "replayed-alone", recorded)[1] == weaker


def test_an_assumed_alpha_is_a_warning_of_the_receipt(
    child: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """An alpha of the request replaces it, and the merged weights are not those without it."""
    file = write(tmp_path / "a.safetensors", peft_lora())

    plain, assumed = drawn(child, "assumed", pinned(file))
    named, stronger = drawn(child, "named", pinned(file, alpha=4.0))
    _, doubled = drawn(child, "doubled", pinned(file, weight=2.0))
    again = drawn(child, "again", pinned(file))[1]

    assert plain.loras[0].warnings == ("alpha: assumed equal to rank",)
    assert named.loras[0].warnings == ()
    assert stronger == doubled != assumed == again


def test_a_lora_of_weight_0_is_not_fetched_and_has_a_receipt(
    child: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """Its file may be one that a job with a weight is refused for."""
    file = write(tmp_path / "a.safetensors", peft_lora())
    away = Asset(url="https://user:pa55@nowhere.invalid/b?token=s3cret")
    loras = (LoraSpec(file=away, weight=0.0), pinned(file), LoraSpec(file=away, unet_weight=0.0))

    result = run_job(child, "zero", a_request(seed=3, loras=loras[:2]))
    with pytest.raises(LoraNotAllowed):
        run_job(child, "text", a_request(loras=loras))

    unused, used = result.loras
    assert (unused.source, unused.sha256, unused.modules) == ("https://nowhere.invalid/b", "", {})
    assert unused.warnings == ("weight 0: the file was not fetched",)
    assert used.modules == {"unet": 3}
    assert result.request is not None
    assert [spec.weight for spec in result.request.loras] == [0.0, 1.0]
    assert drawn(child, "replayed", result.request.loras[1])[1] == result.images[0].pixels_sha256
    assert run_job(child, "again", result.request).images[0].pixels_sha256 == (
        result.images[0].pixels_sha256
    )


def test_strengths_over_steps_and_by_block_are_in_the_receipt_and_a_replay_draws_them(
    child: Child, plain: bytes, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """Each field changes the image; a scheduled LoRA with a constant one; the next job is plain."""
    file = write(tmp_path / "a.safetensors", peft_lora())
    both = write(tmp_path / "b.safetensors", peft_lora((*UNET, *TEXT), ranks=(4,)))
    constant = pinned(both, weight=0.5)
    steps: dict[str, Any] = {
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "seed": 3,
        "num_images": 2,
    }
    variants: list[dict[str, Any]] = [
        {},
        {"start": 0.3},
        {"end": 0.5},
        {"weights": ((0.0, 1.0), (0.5, 0.3))},
        {"blocks": {"down.1": 0.5}},
        {"weight": 1.5, "start": 0.3, "end": 0.8, "blocks": {"IN04": 0.5}},
    ]
    results = [
        run_job(
            child, f"job-{number}", a_request(loras=(pinned(file, **fields), constant), **steps)
        )
        for number, fields in enumerate(variants)
    ]

    images = [result.images[1].pixels_sha256 for result in results]
    assert len(set(images)) == len(results)
    assert [result.loras[0].unet_weights for result in results] == [
        (),
        ((1, 0.0), (3, 1.0)),
        ((1, 1.0), (3, 0.0)),
        ((1, 1.0), (3, 0.3)),
        (),
        ((1, 0.0), (3, 1.5)),
    ]
    last = results[-1]
    assert (last.loras[0].unet_weight, last.loras[0].text_encoder_weight) == (1.5, 0.0)
    assert (last.loras[0].blocks, last.loras[1].blocks) == ({"IN04": 0.5}, {})
    for result in (results[3], last):
        assert result.request is not None
        again = run_job(child, f"again-{result.job_id}", result.request)
        assert again.loras[0].unet_weights == result.loras[0].unet_weights
        assert [image.pixels_sha256 for image in again.images] == [
            image.pixels_sha256 for image in result.images
        ]
    assert pixels(child.model) == plain


def test_an_image_of_a_resumed_job_has_the_weights_of_its_own_steps(
    child: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """The second image is the same whether the first one was drawn before it or not."""
    file = write(tmp_path / "a.safetensors", peft_lora())
    loras = (pinned(file, weights=((0.0, 1.0), (0.5, 0.3))),)
    request = a_request(loras=loras, seed=3, num_images=2, num_inference_steps=4)
    whole = run_job(child, "whole", request)
    store = MemoryStore()
    child = dataclasses.replace(child, store=store)
    resumed = run_job(child, "resumed", request)
    for key in ("runs/resumed/manifest.json", resumed.images[1].key):
        store.delete(key)

    result = run_job(child, "resumed", request, is_resumed=True)

    assert result.images[1].pixels_sha256 == whole.images[1].pixels_sha256


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"blocks": {"down.1": 1.0, "down.7": 0.5}}, "$.loras[0].blocks"),
        ({"blocks": {"OUT09": 0.5}}, "$.loras[0].blocks"),
        ({"blocks": {"mid.attentions.0.nothing": 0.5}}, "$.loras[0].blocks"),
    ],
)
def test_a_block_that_the_model_lacks_is_refused_before_anything_is_fetched(
    child: Child, fields: dict[str, Any], path: str
) -> None:
    unreachable = LoraSpec(file=Asset(url="https://loras.invalid/a.safetensors"), **fields)

    with pytest.raises(InvalidRequest, match=list(fields["blocks"])[-1]) as raised:
        run_job(child, "block", a_request(loras=(unreachable,)))

    assert raised.value.details["path"] == path


def test_changes_of_text_encoders_have_no_schedule(
    child: Child, plain: bytes, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """The file is refused by the name of the weight that uses the rest of it."""
    file = write(tmp_path / "a.safetensors", peft_lora((*UNET, *TEXT)))

    with pytest.raises(LoraMismatch, match="`text_encoder_weight: 0`"):
        run_job(child, "text", a_request(loras=(pinned(file, end=0.5),)))

    spec = pinned(file, end=0.5, text_encoder_weight=0.0)
    result = run_job(child, "unet", a_request(loras=(spec,)))
    assert result.loras[0].text_encoder_weight == 0.0
    assert pixels(child.model) == plain


def test_a_lora_that_no_step_has_is_refused_with_the_steps_of_a_recipe(
    child: Child, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """The request alone does not show how many steps there are."""
    fast = write(tmp_path / "sdxl_lightning_2step_lora.safetensors", peft_lora())
    loras = (pinned(fast), pinned(fast, start=0.6))

    with pytest.raises(InvalidRequest, match="2 steps") as raised:
        run_job(child, "never", a_request(loras=loras, num_inference_steps=None))

    assert raised.value.details["path"] == "$.loras[1].start"


# --- failures


@pytest.mark.parametrize("error", [LoraMismatch, NotSafetensors])
def test_a_lora_that_is_refused_changes_neither_the_store_nor_the_next_job(
    child: Child,
    plain: bytes,
    pinned: Callable[..., LoraSpec],
    tmp_path: Path,
    error: type[Exception],
) -> None:
    store = MemoryStore()
    child = dataclasses.replace(child, store=store)
    bad = tmp_path / "bad.safetensors"
    if error is LoraMismatch:
        write(
            bad,
            {key.replace("blocks.0", "blocks.9"): tensor for key, tensor in peft_lora().items()},
        )
    else:
        bad.write_text("<!DOCTYPE html><title>Log in</title>" * 10)

    with pytest.raises(error) as raised:
        run_job(child, "bad", a_request(loras=(pinned(bad),)))

    assert store.objects == {}
    assert "s3cret" not in str(raised.value)
    assert child.model.state is PipelineState.READY
    assert pixels(child.model) == plain


@pytest.mark.parametrize("fault", ["absent", "no safetensors file", "of another model"])
def test_an_error_of_a_file_says_which_file_of_the_request_it_is_about(
    child: Child, pinned: Callable[..., LoraSpec], tmp_path: Path, fault: str
) -> None:
    """Callers show it beside the field; LoRAs with the weight 0 count."""
    good, bad = write(tmp_path / "good.safetensors", peft_lora()), tmp_path / "bad.safetensors"
    if fault == "of another model":
        write(bad, {name.replace("blocks.0", "blocks.9"): t for name, t in peft_lora().items()})
    else:
        bad.write_text("<!DOCTYPE html><title>Log in</title>" * 10)
    wrong = pinned(bad) if fault != "absent" else LoraSpec(file=Asset(url="demo://absent"))
    loras = (pinned(bad, weight=0), pinned(good), wrong)
    embeddings = (EmbeddingSpec(file=wrong.file, token="word"),)

    with pytest.raises(LoraError) as of_lora:
        run_job(child, "lora", a_request(loras=loras))
    with pytest.raises(LoraError) as of_embedding:
        run_job(child, "embedding", a_request(prompt="a word", embeddings=embeddings))

    assert of_lora.value.details["index"] == 2
    assert "field" not in of_lora.value.details
    place = {"index": 0, "field": "embeddings"}
    assert of_embedding.value.details.items() >= place.items()


@pytest.mark.parametrize(
    "fields", [{"scheduler": "FlowMatchEuler"}, {"eta": 0.5, "recipes": "off"}], ids=str
)
def test_a_scheduler_that_the_model_lacks_is_refused_before_anything_is_fetched(
    child: Child, store: MemoryStore, plain: bytes, fields: dict[str, Any]
) -> None:
    unreachable = LoraSpec(file=Asset(url="https://loras.invalid/a.safetensors"))

    with pytest.raises(InvalidRequest, match="uler") as raised:
        run_job(child, "flow", a_request(loras=(unreachable,), **fields))

    assert raised.value.details["path"] == f"$.{next(iter(fields))}"
    assert store.objects == {}
    assert pixels(child.model) == plain


def test_the_result_names_the_scheduler_with_its_schedule(child: Child, plain: bytes) -> None:
    """The request is kept as it was typed; both names draw the image again."""
    typed, schedule = "DPM++ 2M SDE", {"schedule": "beta"}
    result = run_job(child, "typed", a_request(scheduler=typed, num_inference_steps=2, **schedule))
    assert result.request is not None
    assert (result.request.scheduler, result.request.schedule) == (typed, "beta")
    assert result.scheduler == "DPMSolverMultistepScheduler dpmpp_2m_sde beta"

    named = run_job(
        child,
        "named",
        a_request(scheduler=result.scheduler, num_inference_steps=2, seed=result.seed),
    )

    assert named.images[0].pixels_sha256 == result.images[0].pixels_sha256
    assert pixels(child.model) == plain


def test_an_error_of_a_progress_report_does_not_change_the_next_job(
    child: Child, plain: bytes, pinned: Callable[..., LoraSpec], tmp_path: Path
) -> None:
    """The broker may be down while a LoRA is merged into the model."""
    spec = pinned(write(tmp_path / "a.safetensors", kohya_lora()))

    def report(phase: Phase, _step: int, _steps: int) -> None:
        if phase is Phase.DENOISE:
            raise ConnectionError("the broker is gone")

    with pytest.raises(ConnectionError):
        run_job(child, "unwatched", a_request(loras=(spec,)), report)

    assert child.model.state is PipelineState.READY
    assert pixels(child.model) == plain
