"""What is read of a stranger's file before anything is drawn again, and what is refused."""

import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.fakes import a_request, load_engine, settings
from support.redrawing import Drawing, rewritten
from zlora.errors import InvalidRequest
from zlora.schema import GenerateRequest, OutputFormat
from zlora_worker.cli import replay_subjects as reading
from zlora_worker.cli.replay_subjects import subjects

UNTOLD = "it does not say what it was drawn from: look for its manifest.json"


@pytest.fixture(scope="module")
def drawing(model_home: Path) -> Drawing:
    return Drawing(load_engine(model_home))


@pytest.fixture
def draw(drawing: Drawing, model_home: Path, tmp_path: Path) -> Callable[..., list[Path]]:
    """The pictures of a job without LoRAs."""

    def drawn(request: GenerateRequest | None = None, *, job_id: str = "job") -> list[Path]:
        machine = settings(model_home, ZLORA_LORA_CACHE=str(tmp_path / "loras"))
        return drawing(tmp_path, machine, request or a_request(seed=7), job_id)

    return drawn


def refusal(path: Path) -> str:
    """One line that names the file."""
    with pytest.raises(InvalidRequest) as raised:
        subjects(path)
    assert str(raised.value).startswith(f"{path}: ") or path.name == "manifest.json"
    assert str(raised.value).isprintable()
    return str(raised.value)


def test_what_is_no_picture_of_this_project_is_refused(tmp_path: Path) -> None:
    files: dict[str, bytes] = {
        "text": b"a city at night",
        "empty": b"",
        "gif": b"GIF89a" + bytes(50),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert "neither a PNG, JPEG or WebP picture" in refusal(tmp_path / name)
    assert "No such file" in refusal(tmp_path / "missing")
    assert "not a file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refusal(tmp_path / "pipe")


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_a_picture_that_says_nothing_or_is_damaged_is_refused(
    draw: Callable[..., list[Path]], output_format: OutputFormat
) -> None:
    (silent_one,) = draw(a_request(seed=7, output_format=output_format, embed_metadata=False))
    (path,) = draw(a_request(seed=7, output_format=output_format), job_id="other")
    data = path.read_bytes()

    assert refusal(silent_one) == f"{silent_one}: {UNTOLD}"
    for length in (len(data) - 40, 3 * len(data) // 4, 200):
        path.write_bytes(data[:length])
        assert "damaged" in refusal(path) or "neither" in refusal(path)


def test_a_jpeg_without_room_for_what_it_was_drawn_from_is_by_its_manifest(
    draw: Callable[..., list[Path]],
) -> None:
    """The refusal says where to look."""
    (path,) = draw(
        a_request(seed=7, output_format="jpeg", prompt="🐱" * 10_000, negative_prompt="🐶" * 10_000)
    )

    assert refusal(path) == f"{path}: {UNTOLD}"
    assert [subject.file for subject in subjects(path.parents[1] / "manifest.json")] == [path]


def clear(picture: Image.Image) -> Image.Image:
    picture.putalpha(0)
    return picture


@pytest.mark.parametrize(
    ("edit", "options", "mode"),
    [
        (lambda picture: picture, {}, "RGB"),
        (lambda picture: picture.convert("RGBA"), {}, "RGB"),
        (lambda picture: picture.convert("P"), {}, "RGB"),
        (lambda picture: picture.convert("L"), {}, "RGB"),
        (lambda picture: picture.convert("P"), {"transparency": b"\xff" * 256}, "RGB"),
        (clear, {}, "RGBA"),
        (lambda picture: clear(picture.convert("L")), {}, "RGBA"),
        (
            lambda picture: picture.convert("P"),
            {"transparency": b"\xff" * 60 + b"\xfe" * 196},
            "RGBA",
        ),
        (lambda picture: picture, {"transparency": (1, 2, 3)}, "RGBA"),
    ],
)
def test_pixels_that_are_seen_through_have_alpha(
    draw: Callable[..., list[Path]],
    edit: Callable[[Image.Image], Image.Image],
    options: dict[str, Any],
    mode: str,
) -> None:
    """However a PNG says so; any others are RGB, as ours are."""
    (path,) = draw()
    (subject,) = subjects(path)
    with Image.open(path) as picture:
        picture.putpixel((0, 0), (1, 2, 3))
        edit(picture.copy()).save(path, **options)

    pixels = subject.pixels()

    assert pixels
    assert pixels.mode == mode


@pytest.mark.parametrize("said", [b"{", b"[" * 10_000, b"{}", b'{"job_id": "../x"}', b"\xff"])
def test_words_that_are_no_recipe_are_refused(tmp_path: Path, said: bytes) -> None:
    chunks = PngInfo()
    chunks.add(b"iTXt", b"zlora\0\0\0\0\0" + said)
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=chunks)

    assert refusal(tmp_path / "a.png")


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 80_000},
        {"height": 60},
        {"width": 0},
        {"seed": -1},
        {"seed": 2**60},
        {"job_id": "../../x"},
    ],
)
def test_a_picture_that_asks_for_more_than_a_job_may_is_refused(
    draw: Callable[..., list[Path]], fields: dict[str, Any]
) -> None:
    (path,) = draw()

    assert next(iter(fields)) in refusal(rewritten(path, **fields))


def test_files_and_pictures_have_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before their pixels are decoded; where Pillow would warn or raise by itself, it is the same."""
    Image.new("L", (4104, 8)).save(tmp_path / "wide.png")
    Image.new("1", (30_000, 4000)).save(tmp_path / "warned.png")
    Image.new("1", (60_000, 4000)).save(tmp_path / "bomb.png")

    assert "more than 4096 pixels" in refusal(tmp_path / "wide.png")
    assert "could be decompression bomb" in refusal(tmp_path / "warned.png")
    assert "could be decompression bomb" in refusal(tmp_path / "bomb.png")
    monkeypatch.setattr(reading, "_MAX_BYTES", 50)
    assert "more than 50 bytes" in refusal(tmp_path / "wide.png")


def test_a_damaged_palette_is_refused(tmp_path: Path) -> None:
    """Pillow finds it only when it is asked for colours: there is none, or it has fewer than there are alphas."""
    Image.new("P", (8, 8)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    start, end = data.index(b"PLTE") - 4, data.index(b"IDAT") - 4
    alphas = b"tRNS" + b"\xff" * 400
    longer = struct.pack(">I", 400) + alphas + struct.pack(">I", zlib.crc32(alphas))

    for palette in (b"", data[start:end] + longer):
        (tmp_path / "a.png").write_bytes(data[:start] + palette + data[end:])
        assert re.search("a damaged picture: .", refusal(tmp_path / "a.png"))


def without(*names: str) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: {name: value for name, value in manifest.items() if name not in names}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without("request"), "does not say what its pictures were drawn from"),
        (without("base_sha256"), "does not say what its pictures were drawn from"),
        (without("scheduler"), "scheduler"),
        (without("device"), "device"),
        (without("images"), "no manifest"),
        (lambda manifest: manifest | {"images": []}, "1 to 8 pictures"),
        (lambda manifest: manifest | {"images": 9 * manifest["images"]}, "1 to 8 pictures"),
        (lambda manifest: manifest | {"job_id": "../../x"}, "job_id"),
        (lambda manifest: manifest | {"seed": "7"}, "no manifest"),
    ],
)
def test_a_manifest_that_is_not_whole_is_refused(
    draw: Callable[..., list[Path]], change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    """Also one of before pictures said what they are."""
    manifest = draw()[0].parents[1] / "manifest.json"
    manifest.write_text(json.dumps(change(json.loads(manifest.read_text()))))

    assert reason in refusal(manifest)


@pytest.mark.parametrize("key", ["", "..", "a/../../secret", "x" * 5000, "a\0b", "/etc/passwd"])
def test_a_manifest_names_no_file_elsewhere(draw: Callable[..., list[Path]], key: str) -> None:
    manifest = draw()[0].parents[1] / "manifest.json"
    document = json.loads(manifest.read_text())
    document["images"][0]["key"] = key
    manifest.write_text(json.dumps(document))

    (subject,) = subjects(manifest)

    assert subject.file is None
    assert subject.source == f"{manifest}, index 0"
