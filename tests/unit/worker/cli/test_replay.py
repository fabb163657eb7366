"""What is told of pictures that are drawn again: identical, or what drifted and why; and what is refused."""

import dataclasses
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from support.fakes import (
    Tensors,
    a_request,
    copy_model,
    kohya_lora,
    load_engine,
    peft_lora,
    settings,
    write,
)
from support.redrawing import Drawing, recipe_in, rewritten, silent
from support.servers import SECRETS, reply, serving
from support.tiny_folder import TINY
from zlora.errors import GenerationFailed, ModelUnavailable
from zlora.schema import Asset, GenerateRequest, LoraSpec
from zlora_worker.cli import replay
from zlora_worker.cli.replay import Redrawn, Replay, Replayer
from zlora_worker.cli.replay_subjects import Subject, subjects
from zlora_worker.model import loader
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.settings import Settings

LOSSLESS: list[dict[str, Any]] = [
    {"output_format": "png"},
    {"output_format": "webp", "lossless": True},
]
LOSSY: list[dict[str, Any]] = [
    {"output_format": "jpeg"},
    {"output_format": "webp"},
    {"output_format": "jpeg", "quality": 40},
]
Edit = Callable[[Image.Image], Image.Image]
OTHER = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def engine(model_home: Path) -> Pipeline:
    return load_engine(model_home)


@pytest.fixture(scope="module")
def drawing(engine: Pipeline) -> Drawing:
    return Drawing(engine)


@pytest.fixture
def machine(model_home: Path, tmp_path: Path) -> Settings:
    """A machine with a LoRA cache of its own; LoRAs may come from a folder of the test."""
    variables = {"ZLORA_LORA_CACHE": str(tmp_path / "loras"), "ZLORA_LORA_ROOTS": str(tmp_path)}
    return settings(model_home, **variables)


@pytest.fixture
def draw(drawing: Drawing, machine: Settings, tmp_path: Path) -> Callable[..., list[Path]]:
    """The pictures of a job, drawn on that machine or another."""

    def drawn(
        request: GenerateRequest | None = None, *, its: Settings = machine, job_id: str = "job"
    ) -> list[Path]:
        return drawing(tmp_path, its, request or a_request(seed=7), job_id)

    return drawn


@pytest.fixture
def again(engine: Pipeline, machine: Settings) -> Callable[..., Replay]:
    """What is told of one picture, drawn on the same machine or another, with the same base or another."""

    def told(path: Path, *, base: Pipeline = engine, its: Settings = machine) -> Replay:
        (subject,) = subjects(path)
        return redrawn(subject, base, its).replay

    return told


def redrawn(subject: Subject, base: Pipeline, its: Settings) -> Redrawn:
    replayer = Replayer(dataclasses.replace(its, model=base.name), model_named=True)
    replayer._engine, replayer._loaded = base, base.name
    return replayer.replay(subject, silent)


def dotted(picture: Image.Image) -> Image.Image:
    """With one pixel changed."""
    red, green, blue = picture.getpixel((3, 5))  # type: ignore[misc]
    picture.putpixel((3, 5), (red ^ 128, green, blue))
    return picture


# --- identical


@pytest.mark.parametrize("fields", LOSSLESS + LOSSY, ids=str)
def test_a_picture_of_any_format_is_drawn_again(
    draw: Callable[..., list[Path]], again: Callable[..., Replay], fields: dict[str, Any]
) -> None:
    """Lossy ones are the same by the pixels before they were encoded, and by those of the file too."""
    (path,) = draw(a_request(seed=7, width=72, **fields))

    told = again(path)

    assert (told.verdict, told.causes, told.edited) == ("identical", (), False)
    assert told.pixels_sha256 == told.recorded_pixels_sha256
    assert (told.mean_difference, told.greatest_difference) == (0, 0)
    assert (told.source, told.job_id, told.index, told.seed) == (str(path), "job", 0, 7)


@pytest.mark.parametrize("there", [True, False])
def test_the_pictures_of_a_manifest_are_drawn_again(
    draw: Callable[..., list[Path]], engine: Pipeline, machine: Settings, there: bool
) -> None:
    """Each by its own seed, beside its file or by the hash of its pixels alone, which is told."""
    paths = draw(a_request(seed=40, num_images=2, embed_metadata=False, scheduler="heun"))
    for path in [] if there else paths:
        path.unlink()

    manifest = paths[0].parents[1] / "manifest.json"
    told = [redrawn(subject, engine, machine).replay for subject in subjects(manifest)]

    assert [(one.verdict, one.index, one.seed) for one in told] == [
        ("identical", 0, 40),
        ("identical", 1, 41),
    ]
    assert [(one.source, one.file) for one in told] == [
        (str(path), str(path)) if there else (f"{manifest}, index {index}", None)
        for index, path in enumerate(paths)
    ]
    assert {(one.mean_difference, one.edited) for one in told} == {
        (0, False) if there else (None, None)
    }


@pytest.mark.parametrize("fields", [LOSSLESS[0], LOSSY[0]], ids=str)
def test_without_a_hash_files_are_compared(
    draw: Callable[..., list[Path]],
    again: Callable[..., Replay],
    engine: Pipeline,
    fields: dict[str, Any],
) -> None:
    """Whether one was edited cannot be told then."""
    (path,) = draw(a_request(seed=7, **fields))
    drawn = engine.draw(recipe_in(path).request, 7, lambda _step: None)

    same = again(rewritten(path, edit=lambda _: drawn, pixels_sha256=None))
    other = again(rewritten(path, edit=dotted, pixels_sha256=None))

    assert (same.verdict, same.edited) == ("identical", None)
    assert (other.verdict, other.edited) == ("drifted", None)


@pytest.mark.parametrize(("recorded", "used"), [(2, 2), (10**9, 1), (0, 1), (-1, 1), (None, 1)])
def test_a_recorded_number_of_threads_is_drawn_with(
    draw: Callable[..., list[Path]],
    again: Callable[..., Replay],
    monkeypatch: pytest.MonkeyPatch,
    recorded: int | None,
    used: int,
) -> None:
    """And torch's own is back afterwards, however the job ends; a number that no machine has is not tried."""
    seen = []

    def fail(*_: object) -> None:
        seen.append(torch.get_num_threads())
        raise GenerationFailed

    monkeypatch.setattr(replay, "generate", fail)
    told = again(rewritten(*draw(), threads=recorded))

    assert seen == [used]
    assert torch.get_num_threads() == 1
    assert (told.verdict, told.code) == ("impossible", "generation_failed")


# --- what drifted, and why


def test_another_base_is_named(
    draw: Callable[..., list[Path]],
    again: Callable[..., Replay],
    model_home: Path,
    engine: Pipeline,
    tmp_path: Path,
) -> None:
    """One weight of it is enough. Both are told by name and digest."""
    (path,) = draw()
    folder = copy_model(model_home, tmp_path / "other")
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors: Tensors = load_file(file)
    tensors["decoder.conv_out.bias"][0] += 0.1
    write(file, tensors)
    other = load_engine(model_home, ZLORA_MODEL=str(folder))

    told = again(path, base=other)

    (cause,) = told.causes
    assert told.verdict == "drifted"
    assert cause.startswith(f"the base differs: {TINY} ({engine.base_sha256[:12]}) -> ")
    assert cause.endswith(f" ({other.base_sha256[:12]})")
    assert told.edited is False
    assert 0 < (told.mean_difference or 0) <= (told.greatest_difference or 0) <= 255


@pytest.mark.parametrize(
    ("now", "code"),
    [
        pytest.param(reply(status=404), "lora_not_found", id="gone"),
        pytest.param(reply(b"<html>"), "not_safetensors", id="no LoRA"),
        pytest.param(None, "lora_corrupt", id="another LoRA"),
    ],
)
def test_a_lora_that_is_gone_or_another_file_is_named(
    draw: Callable[..., list[Path]],
    again: Callable[..., Replay],
    tmp_path: Path,
    now: bytes | None,
    code: str,
) -> None:
    """By its error, without the secrets of its address. Where the cache still has it, it is drawn with."""
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
        (path,) = draw(a_request(seed=7, loras=(spec,)), its=here)
        del answers[0]

        cached, told = again(path, its=here), again(path, its=elsewhere)

    assert (cached.verdict, cached.causes) == ("identical", ())
    assert (told.verdict, told.code, told.pixels_sha256) == ("impossible", code, None)
    (cause,) = told.causes
    assert f"127.0.0.1:{host.port}/a.safetensors" in cause
    assert cause.endswith(f"[{code}]")
    assert not [secret for secret in SECRETS if secret in repr(told)]


def test_a_lora_that_is_not_pinned_is_named(
    draw: Callable[..., list[Path]], again: Callable[..., Replay], tmp_path: Path
) -> None:
    """A picture of somebody else's may have only an address, where another file may lie now."""
    file = write(tmp_path / "a.safetensors", kohya_lora())
    (path,) = draw(a_request(seed=7, loras=(LoraSpec(file=Asset(url=file.as_uri())),)))
    loose = a_request(seed=7, loras=(LoraSpec(file=Asset(url=file.as_uri())),))
    rewritten(path, request=loose)

    same = again(path)
    write(file, peft_lora(ranks=(4,)))
    other = again(path)

    assert same.causes == (
        "a LoRA's file is not recorded, only its address, which changed nothing",
    )
    assert (other.verdict, other.causes) == (
        "drifted",
        ("a LoRA's file is not recorded, only its address",),
    )


DIFFERENCES: list[tuple[dict[str, Any], str]] = [
    (
        {"versions": {"torch": "1.0", "diffusers": metadata.version("diffusers")}},
        f"torch: 1.0 -> {torch.__version__}",
    ),
    ({"versions": {"some-engine": "3"}}, "some-engine: 3 -> not told"),
    (
        {"device": "NVIDIA H100"},
        f"device: NVIDIA H100 -> cpu {torch.backends.cpu.get_cpu_capability()}",
    ),
    ({"dtype": "float16"}, "dtype: float16 -> float32"),
    ({"threads": 10**9}, "threads: 1000000000 -> 1"),
    ({"threads": None}, "threads: not told -> 1"),
    ({"scheduler": "DDIMScheduler"}, "scheduler: DDIMScheduler -> EulerDiscreteScheduler"),
    ({"model": "a\nb", "base_sha256": OTHER}, f"the base differs: a b ({OTHER[:12]}) -> {TINY} ("),
]


@pytest.mark.parametrize(
    ("fields", "sentence"), DIFFERENCES, ids=[sentence for _, sentence in DIFFERENCES]
)
def test_whatever_is_recorded_and_differs_is_named(
    draw: Callable[..., list[Path]],
    again: Callable[..., Replay],
    fields: dict[str, Any],
    sentence: str,
) -> None:
    """As a cause where the pixels differ; where they are the same, it changed nothing."""
    (path,) = draw()
    same = again(rewritten(path, **fields))
    other = again(rewritten(path, pixels_sha256=OTHER))

    assert (same.verdict, len(same.causes)) == ("identical", 1)
    assert same.causes[0].startswith(sentence)
    assert same.causes[0].endswith(", which changed nothing")
    assert other.verdict == "drifted"
    assert other.causes[-1].startswith(sentence)
    assert not other.causes[-1].endswith("nothing")


def test_a_picture_that_was_decoded_in_tiles_is_again(
    draw: Callable[..., list[Path]],
    again: Callable[..., Replay],
    engine: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tiles are told as a cause where it drifts all the same, and where they are new. Nothing of it stays."""
    decode = engine._decode_whole

    def small(*arguments: Any, **options: Any) -> Any:
        """As where memory suffices for tiles only."""
        if not engine.pipeline.vae.use_tiling:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(*arguments, **options)

    (whole,) = draw()
    with monkeypatch.context() as patched:
        patched.setattr(engine, "_decode_whole", small)
        (path,) = draw(job_id="tiled")
        tiled_now = again(whole)

    same = again(path)
    drifted = again(rewritten(path, pixels_sha256=OTHER, tiled=True))

    assert recipe_in(path).tiled
    assert (same.verdict, same.causes) == ("identical", ())
    assert same.pixels_sha256 != recipe_in(whole).pixels_sha256
    assert drifted.causes[-1] == "the picture was decoded in tiles, for want of memory"
    assert (tiled_now.verdict, tiled_now.causes) == (
        "drifted",
        ("the picture is decoded in tiles now, for want of memory",),
    )
    assert again(whole).verdict == "identical"


def test_where_nothing_recorded_differs_this_is_said(
    draw: Callable[..., list[Path]], again: Callable[..., Replay]
) -> None:
    (path,) = draw()
    request = msgspec.structs.replace(recipe_in(path).request, guidance_scale=3.0)

    told = again(rewritten(path, request=request))

    assert (told.verdict, told.edited) == ("drifted", False)
    assert told.causes == ("nothing that is recorded differs",)
    assert told.pixels_sha256 != told.recorded_pixels_sha256
    assert told.greatest_difference


@pytest.mark.parametrize("fields", LOSSLESS + LOSSY, ids=str)
def test_a_file_that_was_edited_is_found(
    draw: Callable[..., list[Path]], again: Callable[..., Replay], fields: dict[str, Any]
) -> None:
    """One pixel is enough; its pixels are drawn again all the same."""
    (path,) = draw(a_request(seed=7, **fields))

    told = again(rewritten(path, edit=dotted))

    assert (told.verdict, told.edited) == ("drifted", True)
    assert told.pixels_sha256 == told.recorded_pixels_sha256
    (cause,) = told.causes
    assert cause.startswith("the file was edited after it was drawn")
    assert 0 < (told.mean_difference or 0) < (told.greatest_difference or 0)


def folded(picture: Image.Image) -> Image.Image:
    """The same bytes in rows of half the length."""
    return Image.frombytes("RGB", (picture.width // 2, picture.height * 2), picture.tobytes())


@pytest.mark.parametrize("fields", LOSSLESS + LOSSY, ids=str)
@pytest.mark.parametrize("edit", [lambda picture: picture.crop((0, 0, 32, 64)), folded])
def test_a_file_of_another_size_is_edited(
    draw: Callable[..., list[Path]],
    again: Callable[..., Replay],
    fields: dict[str, Any],
    edit: Edit,
) -> None:
    """There is no difference between pixels to tell then. What it says of itself is its old size."""
    told = again(rewritten(draw(a_request(seed=7, **fields))[0], edit=edit))

    assert (told.verdict, told.edited, told.mean_difference) == ("drifted", True, None)
    assert told.causes == ("the file was edited after it was drawn: it has another size",)


def seen_through(alpha: int) -> Edit:
    return lambda picture: Image.merge(
        "RGBA", (*picture.split(), Image.new("L", picture.size, alpha))
    )


@pytest.mark.parametrize("fields", [*LOSSLESS, LOSSY[1]], ids=str)
@pytest.mark.parametrize("alpha", [0, 254])
def test_a_file_that_is_not_opaque_is_edited(
    draw: Callable[..., list[Path]],
    again: Callable[..., Replay],
    fields: dict[str, Any],
    alpha: int,
) -> None:
    """Though its colours are those that were drawn; also where no hash is recorded."""
    (path,) = draw(a_request(seed=7, **fields))

    told = again(rewritten(path, edit=seen_through(alpha)))
    unrecorded = again(rewritten(path, edit=seen_through(alpha), pixels_sha256=None))

    assert (told.verdict, told.edited, unrecorded.verdict, unrecorded.edited) == (
        "drifted",
        True,
        "drifted",
        True,
    )
    assert told.pixels_sha256 == told.recorded_pixels_sha256
    assert told.causes == ("the file was edited after it was drawn: it is not opaque",)
    assert (told.greatest_difference or 0) >= 255 - alpha


def test_a_file_of_another_mode_is_edited_where_it_shows_another_picture(
    draw: Callable[..., list[Path]], again: Callable[..., Replay]
) -> None:
    (path,) = draw()

    opaque = again(rewritten(path, edit=seen_through(255)))
    grey = again(rewritten(path, edit=lambda picture: picture.convert("L")))

    assert (opaque.verdict, opaque.edited) == ("identical", False)
    assert (grey.verdict, grey.edited) == ("drifted", True)


# --- which base


@pytest.mark.parametrize(("named", "loaded"), [(False, "demo"), (True, "some/base")])
def test_the_demo_draws_its_own_where_no_base_is_named(
    draw: Callable[..., list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    machine: Settings,
    *,
    named: bool,
    loaded: str,
) -> None:
    """A picture's word is taken for nothing else: the base is the operator's choice."""
    asked = list[tuple[str, str]]()

    def load(its: Settings) -> Pipeline:
        asked.append((its.model, its.vae))
        raise ModelUnavailable

    monkeypatch.setattr(loader, "load", load)
    replayer = Replayer(
        dataclasses.replace(machine, model="some/base", vae="a-vae"), model_named=named
    )
    for path in (
        rewritten(*draw(), model="demo"),
        rewritten(*draw(job_id="strange"), model="strange/base"),
    ):
        with pytest.raises(ModelUnavailable):
            replayer.replay(subjects(path)[0], silent)

    assert asked == [(loaded, "a-vae" if named else ""), ("some/base", "a-vae")]
