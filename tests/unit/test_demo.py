"""The built-in model: the same bytes wherever it is built, whole or absent; its LoRAs, its server, its documents."""

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from fakes import DEMO_LORAS, Tensors, demo_lora, load_engine
from PIL import Image, ImageChops
from processes import clean_environ
from zlora_worker.demo import loras
from zlora_worker.demo.command import _DOCUMENTS, read_document
from zlora_worker.demo.folder import build_demo, demo_folder
from zlora_worker.demo.server import TOKEN, serving
from zlora_worker.demo.sheet import Row, draw_sheet

BUILDER = """
import pathlib, sys
import torch
from zlora_worker.demo.folder import build_demo
torch.set_num_threads(1)
print(build_demo(pathlib.Path(sys.argv[1])))
"""


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_another_process_builds_the_same_bytes(model_home: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BUILDER, str(tmp_path)]
    built = subprocess.run(command, env=clean_environ({}), capture_output=True, text=True, check=True).stdout.strip()

    assert built == str(demo_folder(tmp_path))
    assert list((tmp_path / "demo").iterdir()) == [demo_folder(tmp_path)]
    assert digests(demo_folder(tmp_path)) == digests(demo_folder(model_home))


def test_a_builder_that_comes_second_keeps_what_the_first_one_built(
    model_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is done between this one's look and its rename."""
    build = loras.build

    def overtaken(pipeline: object, folder: Path) -> None:
        build(pipeline, folder)
        shutil.copytree(demo_folder(model_home), demo_folder(tmp_path))
        (demo_folder(tmp_path) / "first").touch()

    monkeypatch.setattr(loras, "build", overtaken)

    assert build_demo(tmp_path) == demo_folder(tmp_path)

    assert (demo_folder(tmp_path) / "first").exists()
    assert list((tmp_path / "demo").iterdir()) == [demo_folder(tmp_path)]


def test_a_build_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_pipeline: object, _folder: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(loras, "build", fail)

    with pytest.raises(OSError, match="no space left"):
        build_demo(tmp_path)

    assert list((tmp_path / "demo").iterdir()) == []


def test_what_is_built_is_not_built_again(model_home: Path) -> None:
    folder = demo_folder(model_home)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in model_home.rglob("*")}

    assert build_demo(model_home) == folder

    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in model_home.rglob("*")} == before


def test_the_model_is_small(model_home: Path) -> None:
    sizes = {path: path.stat().st_size for path in demo_folder(model_home).rglob("*") if path.is_file()}

    assert sum(sizes.values()) < 10_000_000
    assert max(size for path, size in sizes.items() if path.parent.name == "loras") < 500_000


# --- the LoRAs

KOHYA = (
    r"(lora_unet_((input|output)_blocks_\d|middle_block)_\d_\w+"
    r"|lora_te[12]_text_model_encoder_layers_\d+_self_attn_(q|k|v|out)_proj)"
    r"\.(alpha|lora_down\.weight|lora_up\.weight)"
)
PEFT = (
    r"(unet\.(down_blocks\.\d|up_blocks\.\d|mid_block)\.[\w.]+"
    r"|text_encoder(_2)?\.text_model\.encoder\.layers\.\d+\.self_attn\.(q|k|v|out)_proj)"
    r"\.lora_[AB]\.weight"
)


@pytest.mark.parametrize(
    ("name", "spelling", "pattern"),
    [
        ("anime-style", "kohya", KOHYA),
        ("cyberpunk-style", "peft", PEFT),
        ("neon-lights", "kohya", KOHYA),
        ("product-photography-v1", "peft", PEFT),
    ],
)
def test_each_lora_is_spelt_as_people_have_it(model_home: Path, name: str, spelling: str, pattern: str) -> None:
    path = demo_folder(model_home) / "loras" / f"{name}.safetensors"

    assert load_engine(model_home).reader.read(path, digest=name, source=name).format == spelling
    assert [key for key in demo_lora(model_home, name) if not re.fullmatch(pattern, key)] == []


def parts(tensors: Tensors) -> set[str]:
    return {
        part
        for part in ("unet", "te1", "te2", "text_encoder", "text_encoder_2")
        for key in tensors
        if starts(key, part)
    }


def starts(key: str, part: str) -> bool:
    return key.startswith((f"lora_{part}_", f"{part}."))


def test_the_loras_cover_text_encoders_and_convolutions(model_home: Path) -> None:
    found = {name: parts(demo_lora(model_home, name)) for name in DEMO_LORAS}
    convolved = {
        name for name in DEMO_LORAS if any(tensor.ndim == 4 for tensor in demo_lora(model_home, name).values())
    }

    assert found == {
        "anime-style": {"unet", "te1", "te2"},
        "cyberpunk-style": {"unet"},
        "neon-lights": {"unet"},
        "product-photography-v1": {"unet", "text_encoder", "text_encoder_2"},
    }
    assert convolved == {"neon-lights"}


def test_kohyas_alpha_is_half_the_rank(model_home: Path) -> None:
    """An alpha that is ignored would show."""
    for name in ("anime-style", "neon-lights"):
        tensors = demo_lora(model_home, name)
        ranks = {key.removesuffix(".lora_down.weight"): len(down) for key, down in tensors.items() if "down" in key}
        alphas = {key.removesuffix(".alpha"): float(alpha) for key, alpha in tensors.items() if key.endswith(".alpha")}
        assert alphas == {module: rank / 2 for module, rank in ranks.items()}


# --- the server and the documents


@pytest.fixture(scope="module")
def host(model_home: Path) -> Iterator[str]:
    with serving(demo_folder(model_home) / "loras") as address:
        yield address


def test_every_address_of_the_documents_has_a_file(model_home: Path, host: str) -> None:
    """By URL as it stands, by hub reference with the token."""
    specs = [spec for name in _DOCUMENTS for spec in read_document(name, host).loras]
    found = set()

    for spec in specs:
        hub = spec.file.address.replace("cozy://", f"http://{host}/api/v1/file/")
        answer = requests.get(hub, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)
        assert answer.status_code == 200
        found.add(hashlib.sha256(answer.content).hexdigest())

    files = demo_folder(model_home) / "loras"
    assert found == {hashlib.sha256(path.read_bytes()).hexdigest() for path in files.iterdir()}


def test_a_file_that_is_known_is_not_sent_again(host: str) -> None:
    url = f"http://{host}/anime-style.safetensors"
    tag = requests.get(url, timeout=10).headers["ETag"]

    answer = requests.get(url, headers={"If-None-Match": tag}, timeout=10)

    assert (answer.status_code, answer.content) == (304, b"")


def test_the_hub_wants_its_token_and_tells_the_digest(host: str) -> None:
    name = read_document("cozy_ref", host).loras[0].file.address.removeprefix("cozy://")
    url = f"http://{host}/api/v1/file/{name}"

    bare = requests.head(url, timeout=10)
    told = requests.head(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)
    sent = requests.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)

    assert bare.status_code == 401
    assert (told.status_code, told.content) == (200, b"")
    assert told.headers["X-Cozy-SHA256"] == hashlib.sha256(sent.content).hexdigest()
    assert int(told.headers["X-Cozy-Size-Bytes"]) == len(sent.content)


@pytest.mark.parametrize("path", ["/", "/missing.safetensors", "/../model_index.json", "/%2e%2e%2fmodel_index.json"])
def test_nothing_but_loras_is_served(host: str, path: str) -> None:
    request = requests.Request("GET", f"http://{host}").prepare()
    request.url = f"http://{host}{path}"  # as it stands: requests would resolve the dots itself

    with requests.Session() as session:
        assert session.send(request, timeout=10).status_code == 404


def test_a_contact_sheet_shows_every_picture(tmp_path: Path) -> None:
    """Rows below each other, pictures beside each other, whatever the lengths of the rows."""
    colours = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}
    for name in colours:
        Image.new("RGB", (64, 64), name).save(tmp_path / f"{name}.png")
    rows = [
        Row("one", [("a", tmp_path / "red.png"), ("b", tmp_path / "lime.png")]),
        Row("two", [("c", tmp_path / "blue.png")]),
    ]

    draw_sheet(rows, tmp_path / "new" / "sheet.png", note="note")

    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        boxes = {name: _box(sheet, colour) for name, colour in colours.items()}
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes.values()} == {(192, 192)}
    assert boxes["red"][2] < boxes["lime"][0]
    assert boxes["red"][1] == boxes["lime"][1]
    assert boxes["red"][0] == boxes["blue"][0]
    assert boxes["red"][3] < boxes["blue"][1]


def _box(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Where a colour is: left, top, right, bottom."""
    distance = ImageChops.difference(sheet, Image.new("RGB", sheet.size, colour)).convert("L")
    box = ImageChops.invert(distance).point([0] * 255 + [255]).getbbox()
    assert box is not None
    return box
