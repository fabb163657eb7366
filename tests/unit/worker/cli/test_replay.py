"""Images drawn again: identical, or what drifted and why; and files that are refused."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import load_file
from support.fakes import (
    Tensors,
    a_request,
    copy_model,
    kohya_lora,
    load_pipeline,
    peft_lora,
    settings,
    write,
)
from support.image_files import file_of, half_mask, picture
from support.jobs import Watcher
from support.redrawing import Drawing, provenance_in, rewritten
from support.servers import SECRETS, reply, serving
from support.tiny_folder import TINY
from zlora.errors import GenerationFailed, InvalidRequest, ModelUnavailable
from zlora.schema import Asset, GenerateRequest, LoraSpec, OutputFormat, Upscale
from zlora_worker import generate
from zlora_worker.cli.replay import RecordedImage, Redrawn, Replay, Replayer, recorded_images
from zlora_worker.model import loader
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.setting_parsers import NamedModel
from zlora_worker.settings import Settings

LOSSLESS: list[dict[str, Any]] = [
    {"output_format": "png"},
    {"output_format": "webp", "lossless": True},
]
LOSSY: list[dict[str, Any]] = [{"output_format": "jpeg"}, {"output_format": "webp", "quality": 40}]
Edit = Callable[[Image.Image], Image.Image]
OTHER = "0123456789abcdef" * 4
DrawJob = Callable[..., list[Path]]
Replays = Callable[..., Replay]


@pytest.fixture(scope="module")
def drawing(model: Pipeline) -> Drawing:
    return Drawing(model)


@pytest.fixture
def machine(model_home: Path, tmp_path: Path) -> Settings:
    """Return settings with a LoRA cache of this test; LoRAs and results may be in its folder."""
    variables = {
        "ZLORA_LORA_CACHE": str(tmp_path / "loras"),
        "ZLORA_LORA_ROOTS": str(tmp_path),
        "ZLORA_STORE": tmp_path.as_uri(),
    }
    return settings(model_home, **variables)


@pytest.fixture
def draw(drawing: Drawing, machine: Settings, tmp_path: Path) -> DrawJob:
    """Return a function that draws a job on that machine or another, and returns its images."""

    def drawn(
        request: GenerateRequest | None = None, *, on: Settings = machine, job_id: str = "job"
    ) -> list[Path]:
        return drawing(tmp_path, on, request or a_request(seed=7), job_id)

    return drawn


def redrawn(image: RecordedImage, model: Pipeline, settings: Settings) -> Redrawn:
    replayer = Replayer(dataclasses.replace(settings, model=model.name), model_named=True)
    replayer._worker._model, replayer._worker._loaded = model, model.name
    return replayer.replay(image, Watcher())


@pytest.fixture
def again(model: Pipeline, machine: Settings) -> Replays:
    """Return a function that replays an image, with the same model and machine by default."""

    def outcome(path: Path, *, by: Pipeline = model, on: Settings = machine) -> Replay:
        (image,) = recorded_images(path)
        return redrawn(image, by, on).replay

    return outcome


def with_a_dot(image: Image.Image) -> Image.Image:
    """Change one pixel."""
    red, green, blue = image.getpixel((3, 5))  # type: ignore[misc]
    image.putpixel((3, 5), (red ^ 128, green, blue))
    return image


# --- identical


@pytest.mark.parametrize("fields", LOSSLESS + LOSSY, ids=str)
def test_an_image_of_any_format_is_drawn_again(
    draw: DrawJob, again: Replays, fields: dict[str, Any]
) -> None:
    """For lossy formats the pixels before the encoding are compared, and those of the file too."""
    (path,) = draw(a_request(seed=7, width=72, **fields))

    found = again(path)

    assert (found.verdict, found.causes, found.edited) == ("identical", (), False)
    assert found.pixels_sha256 == found.recorded_pixels_sha256
    assert (found.mean_difference, found.greatest_difference) == (0, 0)
    assert (found.source, found.job_id, found.index, found.seed) == (str(path), "job", 0, 7)


@pytest.mark.parametrize("there", [True, False])
def test_the_images_of_a_manifest_are_drawn_again(
    draw: DrawJob, model: Pipeline, machine: Settings, there: bool
) -> None:
    """Each by its own seed. If an image file is missing, its recorded hash is compared."""
    paths = draw(a_request(seed=40, num_images=2, embed_metadata=False, scheduler="heun"))
    manifest = paths[0].parents[1] / "manifest.json"
    sources: list[tuple[str, str | None]] = [(str(path), str(path)) for path in paths]
    if not there:
        sources = [(f"{manifest}, index {index}", None) for index in range(2)]
        for path in paths:
            path.unlink()

    found = [redrawn(image, model, machine).replay for image in recorded_images(manifest)]

    assert [(one.verdict, one.index, one.seed) for one in found] == [
        ("identical", 0, 40),
        ("identical", 1, 41),
    ]
    assert [(one.source, one.file) for one in found] == sources
    assert {(one.mean_difference, one.edited) for one in found} == {
        (0, False) if there else (None, None)
    }


@pytest.mark.parametrize("fields", [LOSSLESS[0], LOSSY[0]], ids=str)
def test_without_a_recorded_hash_the_files_are_compared(
    draw: DrawJob, again: Replays, model: Pipeline, fields: dict[str, Any]
) -> None:
    """It is unknown then whether the file was edited."""
    (path,) = draw(a_request(seed=7, **fields))
    (pixels,) = model.draw(provenance_in(path).request, [7], lambda _step: None)

    same = again(rewritten(path, edit=lambda _: pixels, pixels_sha256=None))
    other = again(rewritten(path, edit=with_a_dot, pixels_sha256=None))

    assert (same.verdict, same.edited) == ("identical", None)
    assert (other.verdict, other.edited) == ("drifted", None)


def test_an_image_of_a_batch_is_drawn_in_such_a_batch_at_its_place(
    draw: DrawJob, model: Pipeline, machine: Settings
) -> None:
    """At a size for which the last bits depend on the place too."""
    odd: dict[str, Any] = {"width": 72, "height": 88, "guidance_scale": 1.0}
    paths = draw(a_request(seed=40, num_images=6, batch_size=4, num_inference_steps=2, **odd))
    recorded = [image for path in paths[2:5] for image in recorded_images(path)]
    recorded += recorded_images(paths[0].parents[1] / "manifest.json")[5:]

    found = [redrawn(image, model, machine).replay for image in recorded]

    assert [(one.index, one.seed, one.verdict, one.causes) for one in found] == [
        (index, 40 + index, "identical", ()) for index in (2, 3, 4, 5)
    ]
    assert [(image.request.num_images, image.place) for image in recorded] == [
        (4, 2),
        (4, 3),
        (2, 0),
        (2, 1),
    ]


def test_an_image_of_a_job_with_previews_is_drawn_again_without(
    draw: DrawJob, again: Replays
) -> None:
    (path,) = draw(a_request(seed=7, previews=True))
    (recorded,) = recorded_images(path)

    assert provenance_in(path).request.previews
    assert not recorded.request.previews
    assert again(path).verdict == "identical"


@pytest.mark.parametrize(
    "fields", [{"index": 6, "batch_size": 8}, {"index": 2**40}, {"seed": 0, "index": 1}], ids=str
)
def test_a_batch_that_no_job_has_is_refused_or_drawn(
    draw: DrawJob, again: Replays, fields: dict[str, Any]
) -> None:
    """Metadata may say anything: nothing else is raised."""
    (path,) = draw()
    path = rewritten(path, **{"batch_size": 2} | fields)

    with contextlib.suppress(InvalidRequest):
        assert again(path).verdict in ("identical", "drifted")


@pytest.mark.parametrize(("recorded", "used"), [(2, 2), (10**9, 1), (-1, 1), (None, 1)])
def test_the_recorded_number_of_threads_is_used(
    draw: DrawJob,
    again: Replays,
    monkeypatch: pytest.MonkeyPatch,
    recorded: int | None,
    used: int,
) -> None:
    """A number that no machine has is ignored. Torch's own number is restored after a failure."""
    seen = []

    def fail(*_: object) -> None:
        seen.append(torch.get_num_threads())
        raise GenerationFailed

    path = rewritten(*draw(), threads=recorded)
    monkeypatch.setattr(generate, "generate", fail)
    found = again(path)

    assert seen == [used]
    assert torch.get_num_threads() == 1
    assert (found.verdict, found.code) == ("impossible", "generation_failed")


# --- what drifted, and why


def test_another_base_model_is_named(
    draw: DrawJob, again: Replays, model_home: Path, model: Pipeline, tmp_path: Path
) -> None:
    """One weight that differs is enough; both models are named with their sha256."""
    (path,) = draw()
    folder = copy_model(model_home, tmp_path / "other")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors: Tensors = load_file(file)
    tensors["decoder.conv_out.bias"][0] += 0.1
    write(file, tensors)
    other = load_pipeline(model_home, ZLORA_MODEL=str(folder))

    found = again(path, by=other)

    (cause,) = found.causes
    assert found.verdict == "drifted"
    assert f"base model differs: {TINY} ({model.base_sha256[:12]}) -> " in cause
    assert cause.endswith(f" ({other.base_sha256[:12]})")
    assert found.edited is False
    assert 0 < (found.mean_difference or 0) <= (found.greatest_difference or 0) <= 255


@pytest.mark.parametrize(
    ("now", "code"),
    [
        pytest.param(reply(status=404), "lora_not_found", id="gone"),
        pytest.param(reply(b"<html>"), "not_safetensors", id="not a LoRA"),
        pytest.param(None, "lora_corrupt", id="another LoRA"),
    ],
)
def test_a_lora_that_is_gone_or_another_file_is_named(
    draw: DrawJob, again: Replays, tmp_path: Path, now: bytes | None, code: str
) -> None:
    """By its error, without the secrets of its address; a cached LoRA is used."""
    one, other = (
        write(tmp_path / kind.__name__, kind()).read_bytes() for kind in (kohya_lora, peft_lora)
    )
    answers = [reply(one), now or reply(other)]
    with serving(lambda _: answers[0]) as host:
        here, elsewhere = (
            settings(tmp_path, ZLORA_LORA_CACHE=str(tmp_path / name), ZLORA_ALLOW_HOSTS=host.name)
            for name in ("here", "elsewhere")
        )
        spec = LoraSpec(file=Asset(url=f"{host.url}/a.safetensors?sig=s3cret"))
        (path,) = draw(a_request(seed=7, loras=(spec,)), on=here)
        del answers[0]

        cached, found = again(path, on=here), again(path, on=elsewhere)

    assert (cached.verdict, cached.causes) == ("identical", ())
    assert (found.verdict, found.code, found.pixels_sha256) == ("impossible", code, None)
    (cause,) = found.causes
    assert f"127.0.0.1:{host.port}/a.safetensors" in cause
    assert cause.endswith(f"[{code}]")
    assert not [secret for secret in SECRETS if secret in repr(found)]


def test_a_lora_that_is_not_pinned_is_named(draw: DrawJob, again: Replays, tmp_path: Path) -> None:
    """Metadata of another program may have only an address, which may have another file now."""
    file = write(tmp_path / "a.safetensors", kohya_lora())
    loose = a_request(seed=7, loras=(LoraSpec(file=Asset(url=file.as_uri())),))
    path = rewritten(*draw(loose), request=loose)

    same = again(path)
    write(file, peft_lora(ranks=(4,)))
    other = again(path)

    cause = "a LoRA's file is not recorded, only its address"
    assert same.causes == (f"{cause}, which changed nothing",)
    assert (other.verdict, other.causes) == ("drifted", (cause,))


def test_every_recorded_condition_that_differs_is_named(draw: DrawJob, again: Replays) -> None:
    """As a cause if the pixels differ, and as a change without effect if they do not."""
    (path,) = draw()
    rewritten(
        path,
        versions={
            "torch": "1.0",
            "diffusers": metadata.version("diffusers"),
            "some-engine": "3",
        },
        device="NVIDIA H100",
        dtype="float16",
        threads=None,
        compile="blocks",
        scheduler="DDIMScheduler",
        model="a\nb",
        base_sha256=OTHER,
    )

    same = again(path)
    other = again(rewritten(path, pixels_sha256=OTHER))

    expected = [
        f"the base model differs: a b ({OTHER[:12]}) -> {TINY} (",
        "scheduler: DDIMScheduler -> EulerDiscreteScheduler",
        f"device: NVIDIA H100 -> cpu {torch.backends.cpu.get_cpu_capability()}",
        "dtype: float16 -> float32",
        "threads: not recorded -> 1",
        "compile: blocks -> off",
        "some-engine: 3 -> not recorded",
        f"torch: 1.0 -> {torch.__version__}",
    ]
    assert (same.verdict, other.verdict) == ("identical", "drifted")
    for outcome in (same, other):
        causes = [cause for cause in outcome.causes if "edited" not in cause]
        assert len(causes) == len(expected)
        for cause, beginning in zip(causes, expected, strict=True):
            assert cause.startswith(beginning)
            assert cause.endswith("changed nothing") is (outcome is same)


def test_an_image_decoded_in_tiles_is_decoded_in_tiles_again(
    draw: DrawJob, again: Replays, model: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles are a cause if such an image drifts, and if they are new. They end with the image."""
    decode = model.vae._decode_whole

    def fail_as_a_whole(*arguments: Any, **options: Any) -> Any:
        if not model.pipeline.vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*arguments, **options)

    (whole,) = draw()
    with monkeypatch.context() as patched:
        patched.setattr(model.vae, "_decode_whole", fail_as_a_whole)
        (path,) = draw(job_id="tiled")
        tiled_now = again(whole)

    same = again(path)
    drifted = again(rewritten(path, pixels_sha256=OTHER, tiled=True))

    assert provenance_in(path).tiled
    assert (same.verdict, same.causes) == ("identical", ())
    assert same.pixels_sha256 != provenance_in(whole).pixels_sha256
    assert "was decoded in tiles" in drifted.causes[-1]
    assert tiled_now.verdict == "drifted"
    assert ["is decoded in tiles now" in cause for cause in tiled_now.causes] == [True]
    assert again(whole).verdict == "identical"


def test_an_image_that_started_from_another_is_drawn_again(
    draw: DrawJob,
    again: Replays,
    machine: Settings,
    model: Pipeline,
    tmp_path: Path,
) -> None:
    """Its start is pinned by its sha256, also an earlier job's; it was encoded whole."""
    (tmp_path / "start.png").write_bytes(file_of(picture()))
    (tmp_path / "mask.png").write_bytes(file_of(half_mask()))
    fields: dict[str, Any] = {"seed": 7, "num_inference_steps": 3, "mask_blur": 5}
    files = {name: Asset(url=(tmp_path / f"{name}.png").as_uri()) for name in ("start", "mask")}
    request = a_request(**fields, image=files["start"], mask=files["mask"], strength=0.7)
    decode = model.vae._decode_whole

    def fail_as_a_whole(*arguments: Any, **options: Any) -> Any:
        if not model.pipeline.vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*arguments, **options)

    (path,) = draw(request)
    (larger,) = draw(a_request(seed=9, upscale=Upscale(factor=1.5, strength=1)), job_id="larger")
    (chained,) = draw(a_request(seed=8, image=Asset(url="job:job#0"), strength=1), job_id="next")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model.vae, "_decode_whole", fail_as_a_whole)
        (tiled,) = draw(request, job_id="tiled")

    for image in (path, larger, chained, tiled):
        outcome = again(image)
        assert (outcome.verdict, outcome.causes) == ("identical", ())
    shutil.rmtree(machine.cache_folder)
    (tmp_path / "start.png").write_bytes(file_of(picture(seed=2)))
    changed = again(path)
    assert (changed.verdict, changed.code) == ("impossible", "lora_corrupt")


def test_a_drift_without_a_recorded_cause_says_so(draw: DrawJob, again: Replays) -> None:
    (path,) = draw()
    request = msgspec.structs.replace(provenance_in(path).request, guidance_scale=3.0)

    found = again(rewritten(path, request=request))

    assert (found.verdict, found.edited) == ("drifted", False)
    assert found.causes == ("nothing that is recorded differs",)
    assert found.pixels_sha256 != found.recorded_pixels_sha256
    assert found.greatest_difference


# --- edited files


def folded(image: Image.Image) -> Image.Image:
    """Return the same bytes in rows of half the length."""
    return Image.frombytes("RGB", (image.width // 2, image.height * 2), image.tobytes())


@pytest.mark.parametrize("fields", LOSSLESS + LOSSY, ids=str)
def test_an_edited_file_is_found(draw: DrawJob, again: Replays, fields: dict[str, Any]) -> None:
    """By one pixel, or by its size alone. The recorded pixels are drawn again all the same."""
    (path,) = draw(a_request(seed=7, **fields))

    dotted = again(rewritten(path, target=path.with_name("dotted"), edit=with_a_dot))
    resized = again(rewritten(path, target=path.with_name("folded"), edit=folded))

    assert (dotted.verdict, dotted.edited) == ("drifted", True)
    assert dotted.pixels_sha256 == dotted.recorded_pixels_sha256
    (cause,) = dotted.causes
    assert cause.startswith("the file was edited after it was drawn")
    assert 0 < (dotted.mean_difference or 0) < (dotted.greatest_difference or 0)
    assert (resized.verdict, resized.edited, resized.mean_difference) == ("drifted", True, None)
    assert resized.causes == ("the file was edited after it was drawn: it has another size",)


def with_alpha(alpha: int) -> Edit:
    return lambda image: Image.merge("RGBA", (*image.split(), Image.new("L", image.size, alpha)))


@pytest.mark.parametrize("fields", [*LOSSLESS, LOSSY[1]], ids=str)
@pytest.mark.parametrize("alpha", [0, 254])
def test_a_file_that_is_not_opaque_is_edited(
    draw: DrawJob, again: Replays, fields: dict[str, Any], alpha: int
) -> None:
    """Although its colours are those that were drawn; also if no hash is recorded."""
    (path,) = draw(a_request(seed=7, **fields))

    found = again(rewritten(path, edit=with_alpha(alpha)))
    unrecorded = again(rewritten(path, edit=with_alpha(alpha), pixels_sha256=None))

    assert (found.verdict, found.edited) == ("drifted", True)
    assert (unrecorded.verdict, unrecorded.edited) == ("drifted", True)
    assert found.pixels_sha256 == found.recorded_pixels_sha256
    assert found.causes == ("the file was edited after it was drawn: it is not opaque",)
    assert (found.greatest_difference or 0) >= 255 - alpha


def test_a_file_of_another_mode_is_edited_if_its_pixels_differ(
    draw: DrawJob, again: Replays
) -> None:
    (path,) = draw()

    opaque = again(rewritten(path, edit=with_alpha(255)))
    grey = again(rewritten(path, edit=lambda image: image.convert("L")))

    assert (opaque.verdict, opaque.edited) == ("identical", False)
    assert (grey.verdict, grey.edited) == ("drifted", True)


# --- which base model


@pytest.mark.parametrize("named", [False, True])
def test_the_demo_model_draws_its_own_images_unless_a_model_is_named(
    draw: DrawJob, monkeypatch: pytest.MonkeyPatch, machine: Settings, *, named: bool
) -> None:
    """No other model is loaded by its name in a file, and none that nobody named."""
    loads = list[tuple[str, str]]()

    def load(settings: Settings) -> Pipeline:
        loads.append((settings.model, settings.vae))
        raise ModelUnavailable

    paths = [
        rewritten(*draw(), model="demo"),
        rewritten(*draw(job_id="other"), model="other/base", base="SD 1.x"),
    ]
    monkeypatch.setattr(loader, "load", load)
    chosen = dataclasses.replace(machine, model="some/base", vae="a-vae")
    replayer = Replayer(chosen, model_named=named)
    for path in paths:
        with pytest.raises(ModelUnavailable) as error:
            replayer.replay(recorded_images(path)[0], Watcher())

    assert loads == ([("some/base", "a-vae")] * 2 if named else [("demo", "")])
    if not named:
        assert "drawn by `other/base` (SD 1.x): name this model in ZLORA_MODEL" in str(error.value)


def test_a_base_of_a_list_is_found_by_its_name_or_refused(
    draw: DrawJob, monkeypatch: pytest.MonkeyPatch, machine: Settings
) -> None:
    loads = list[str]()

    def load(settings: Settings) -> Pipeline:
        loads.append(settings.models[0].name)
        raise ModelUnavailable

    monkeypatch.setattr(loader, "load", load)
    models = (NamedModel("first", "a/b", ""), NamedModel("second", "c/d", ""))
    replayer = Replayer(dataclasses.replace(machine, models=models), model_named=True)
    for name in ("second", "third"):
        path = rewritten(*draw(), model=name)
        with pytest.raises(ModelUnavailable) as error:
            replayer.replay(recorded_images(path)[0], Watcher())

    assert loads == ["second"]
    assert "drawn by `third`: no model of ZLORA_MODELS has this name" in str(error.value)


# --- files that are refused before anything is drawn

NO_PROVENANCE = "does not say what it was drawn from: try its manifest.json"


def refusal(path: Path) -> str:
    """Return the error of a file: one line that names it."""
    with pytest.raises(InvalidRequest) as raised:
        recorded_images(path)
    assert str(raised.value).startswith(f"{path}: ") or path.name == "manifest.json"
    assert str(raised.value).isprintable()
    return str(raised.value)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, data in {"text": b"a city", "empty": b"", "gif": b"GIF89a" + bytes(50)}.items():
        (tmp_path / name).write_bytes(data)
        assert "not an image" in refusal(tmp_path / name)
    assert "No such file" in refusal(tmp_path / "missing")
    assert "not a file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refusal(tmp_path / "pipe")
    assert "not a file" in refusal(Path("/dev/zero"))


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_an_image_without_metadata_or_damaged_is_refused(
    draw: DrawJob, output_format: OutputFormat
) -> None:
    (bare,) = draw(a_request(seed=7, output_format=output_format, embed_metadata=False))
    (path,) = draw(a_request(seed=7, output_format=output_format), job_id="other")
    data = path.read_bytes()

    assert NO_PROVENANCE in refusal(bare)
    for length in (len(data) - 40, 3 * len(data) // 4, 200):
        path.write_bytes(data[:length])
        assert re.search("damaged|not an image", refusal(path))


def test_a_jpeg_without_room_for_its_provenance_is_drawn_by_its_manifest(draw: DrawJob) -> None:
    blanks = "\v" * 10_000  # six bytes each in JSON, and no tokens
    (path,) = draw(a_request(seed=7, output_format="jpeg", prompt=blanks, negative_prompt=blanks))

    assert NO_PROVENANCE in refusal(path)
    assert [image.file for image in recorded_images(path.parents[1] / "manifest.json")] == [path]


def transparent(image: Image.Image) -> Image.Image:
    image.putalpha(0)
    return image


@pytest.mark.parametrize(
    ("edit", "options", "mode"),
    [
        (lambda image: image, {}, "RGB"),
        (lambda image: image.convert("RGBA"), {}, "RGB"),
        (lambda image: image.convert("L"), {}, "RGB"),
        (lambda image: image.convert("P"), {"transparency": b"\xff" * 256}, "RGB"),
        (transparent, {}, "RGBA"),
        (lambda image: transparent(image.convert("L")), {}, "RGBA"),
        (lambda image: image.convert("P"), {"transparency": b"\xff" * 60 + b"\xfe" * 196}, "RGBA"),
        (lambda image: image, {"transparency": (1, 2, 3)}, "RGBA"),
    ],
)
def test_pixels_have_alpha_only_if_they_are_not_opaque(
    draw: DrawJob, edit: Edit, options: dict[str, Any], mode: str
) -> None:
    """In whichever way a PNG says so."""
    (path,) = draw()
    (recorded,) = recorded_images(path)
    with Image.open(path) as image:
        image.putpixel((0, 0), (1, 2, 3))
        edit(image.copy()).save(path, **options)

    pixels = recorded.pixels()

    assert pixels
    assert pixels.mode == mode


@pytest.mark.parametrize("json_text", [b"{", b"[" * 10_000, b"{}", b'{"job_id": "../x"}', b"\xff"])
def test_invalid_metadata_is_refused(tmp_path: Path, json_text: bytes) -> None:
    chunks = PngInfo()
    chunks.add(b"iTXt", b"zlora\0\0\0\0\0" + json_text)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=chunks)

    assert "metadata" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize(
    "fields",
    [{"width": 80_000}, {"height": 60}, {"width": 0}, {"seed": 2**60}, {"job_id": "../../x"}],
)
def test_an_image_beyond_the_bounds_of_a_request_is_refused(
    draw: DrawJob, fields: dict[str, Any]
) -> None:
    (path,) = draw()

    assert next(iter(fields)) in refusal(rewritten(path, **fields))


def test_files_and_images_have_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checked before the pixels are decoded, also if Pillow itself would warn or raise."""
    Image.new("L", (4104, 8)).save(tmp_path / "wide.png")
    Image.new("1", (30_000, 4000)).save(tmp_path / "warned.png")
    Image.new("1", (60_000, 4000)).save(tmp_path / "bomb.png")

    assert "more than 4096 pixels" in refusal(tmp_path / "wide.png")
    assert "more than 16777216 pixels" in refusal(tmp_path / "warned.png")
    assert "more than 16777216 pixels" in refusal(tmp_path / "bomb.png")
    monkeypatch.setattr("zlora_worker.cli.replay._MAX_BYTES", 50)
    assert "more than 50 bytes" in refusal(tmp_path / "wide.png")


def test_a_damaged_palette_is_refused(tmp_path: Path) -> None:
    """Pillow finds it when colours are converted: it is missing, or has too few entries."""
    Image.new("P", (8, 8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    start, end = data.index(b"PLTE") - 4, data.index(b"IDAT") - 4
    alphas = b"tRNS" + b"\xff" * 400
    longer = struct.pack(">I", 400) + alphas + struct.pack(">I", zlib.crc32(alphas))

    for palette in (b"", data[start:end] + longer):
        (tmp_path / "a.png").write_bytes(data[:start] + palette + data[end:])
        assert re.search("a damaged image: .", refusal(tmp_path / "a.png"))


def without(*names: str) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: {name: value for name, value in manifest.items() if name not in names}


def a_cell(**fields: Any) -> dict[str, Any]:
    return {"values": {"seed": 1}, "request": {"prompt": "a", **fields}, "scheduler": "S"}


def swept(manifest: dict[str, Any], *cells: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest with a request of a sweep, and these cells."""
    request = manifest["request"] | {"sweep": {"seed": [1]}}
    return manifest | {"request": request, "cells": list(cells)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("request"), "does not say what its images were drawn from"),
        (without("base_sha256"), "does not say what its images were drawn from"),
        (without("scheduler"), "scheduler"),
        (without("images"), "not a manifest"),
        (lambda manifest: manifest | {"images": []}, "1 to 8 images"),
        (lambda manifest: manifest | {"images": 9 * manifest["images"]}, "1 to 8 images"),
        (lambda manifest: manifest | {"cells": [a_cell()]}, "only a sweep has cells"),
        (swept, "as many cells as images"),
        (lambda manifest: swept(manifest, a_cell(), a_cell()), "as many cells as images"),
        (lambda manifest: swept(manifest, a_cell(sweep={"seed": [1]})), "has no sweep"),
        (lambda manifest: manifest | {"job_id": "../../x"}, "job_id"),
        (lambda manifest: manifest | {"seed": "7"}, "not a manifest"),
    ],
)
def test_an_incomplete_manifest_is_refused(
    draw: DrawJob, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    """Also a manifest of the first versions, which had no provenance."""
    manifest = draw()[0].parents[1] / "manifest.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))

    assert reason in refusal(manifest)


def test_a_manifest_names_no_file_outside_its_folder(draw: DrawJob) -> None:
    manifest = draw()[0].parents[1] / "manifest.json"
    document = json.loads(manifest.read_text())
    for key in ("", "..", "a/../../secret", "x" * 5000, "a\0b", "/etc/passwd"):
        document["images"][0]["key"] = key
        manifest.write_text(json.dumps(document))

        (image,) = recorded_images(manifest)

        assert image.file is None
        assert image.source == f"{manifest}, index 0"
