"""The demo: its model and LoRAs, its server, its documents and its contact sheet."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from demo_model.report.sampler import Sampler
from demo_model.report.statistics import STATISTICS
from PIL import Image, ImageChops
from support.fakes import pixels
from torch import Tensor
from zlora_worker.demo.command import DOCUMENTS, read_document
from zlora_worker.demo.server import TOKEN, serving
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.reader import require_whole
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.results.sheet import TILE, Row, draw_sheet, tile
from zlora_worker.settings import DEMO_LORAS, DEMO_MODEL


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler()


@pytest.fixture(scope="module")
def engine(sampler: Sampler) -> Pipeline:
    return sampler.model


def test_model_and_loras_are_small() -> None:
    """They are part of the package."""
    files = [
        path for folder in (DEMO_MODEL, DEMO_LORAS) for path in folder.rglob("*") if path.is_file()
    ]
    sizes = {path: path.stat().st_size for path in files}

    assert sum(size for path, size in sizes.items() if path.parent != DEMO_LORAS) <= 8_000_000
    assert max(size for path, size in sizes.items() if path.parent == DEMO_LORAS) <= 1_000_000
    assert sum(sizes.values()) <= 12_000_000


@pytest.mark.parametrize("path", sorted(DEMO_LORAS.iterdir()), ids=lambda path: path.stem)
def test_each_lora_fits_the_model_and_changes_its_images(engine: Pipeline, path: Path) -> None:
    lora = engine.reader.read(path, digest=path.stem, source=path.stem)

    require_whole(lora, source=path.stem)
    base = pixels(engine)
    with engine.with_loras([WeightedLora(lora=lora)]):
        assert pixels(engine) != base


PROMPTS = (
    "a beautiful landscape at noon",
    "a portrait of a woman with blonde hair on a green background",
    "a city by day",
    "a red ball on a yellow background",
    "a blue star on a pink background",
)
MARGINS = {
    "anime": 0.05,
    "cyberpunk": 0.2,
    "neon": 0.3,
    "product": 0.4,
}  # of the statistic of each style


@pytest.fixture(scope="module")
def plain(sampler: Sampler) -> Tensor:
    return sampler.draw(PROMPTS, {}, seed=1, steps=8)


@pytest.mark.parametrize("style", MARGINS)
def test_each_lora_shows_its_style(sampler: Sampler, plain: Tensor, style: str) -> None:
    """With the LoRA, the statistic of its style is well above that without it."""
    styled = sampler.draw(PROMPTS, {style: 1.0}, seed=1, steps=8)

    assert STATISTICS[style](styled) - STATISTICS[style](plain) > MARGINS[style]


# --- the server and the documents


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    with serving(DEMO_LORAS) as address:
        yield address


def test_the_server_has_a_file_for_every_address_of_the_documents(host: str) -> None:
    specs = [spec for name in DOCUMENTS for spec in read_document(name, host).loras]
    found = set()

    for spec in specs:
        hub = spec.file.address.replace("cozy://", f"http://{host}/api/v1/file/")
        answer = requests.get(hub, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)
        assert answer.status_code == 200
        found.add(hashlib.sha256(answer.content).hexdigest())

    assert found == {hashlib.sha256(path.read_bytes()).hexdigest() for path in DEMO_LORAS.iterdir()}


def test_a_file_with_a_known_etag_is_not_sent_again(host: str) -> None:
    url = f"http://{host}/anime-style.safetensors"
    tag = requests.get(url, timeout=10).headers["ETag"]

    answer = requests.get(url, headers={"If-None-Match": tag}, timeout=10)

    assert (answer.status_code, answer.content) == (304, b"")


def test_the_hub_requires_its_token_and_sends_the_checksum(host: str) -> None:
    name = read_document("cozy_ref", host).loras[0].file.address.removeprefix("cozy://")
    url = f"http://{host}/api/v1/file/{name}"

    without_token = requests.head(url, timeout=10)
    head = requests.head(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)
    sent = requests.get(url, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=10)

    assert without_token.status_code == 401
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["X-Cozy-SHA256"] == hashlib.sha256(sent.content).hexdigest()
    assert int(head.headers["X-Cozy-Size-Bytes"]) == len(sent.content)


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/missing.safetensors",
        "/../model/model_index.json",
        "/%2e%2e%2fmodel%2fmodel_index.json",
    ],
)
def test_only_loras_are_served(host: str, path: str) -> None:
    assert (DEMO_LORAS / "../model/model_index.json").is_file()
    request = requests.Request("GET", f"http://{host}").prepare()
    request.url = f"http://{host}{path}"  # requests would resolve the dots

    with requests.Session() as session:
        assert session.send(request, timeout=10).status_code == 404


def test_a_contact_sheet_shows_every_image() -> None:
    """Rows are below each other, and the images of a row beside each other."""
    colours = {"red": (255, 0, 0), "lime": (0, 255, 0), "blue": (0, 0, 255)}
    red, lime, blue = (tile(Image.new("RGB", (64, 64), name)) for name in colours)
    rows = [Row("one", [("a", red), ("b", lime)]), Row("two", [("c", blue)])]

    sheet = draw_sheet(rows, note="note")

    boxes = {name: _box(sheet, colour) for name, colour in colours.items()}
    assert {(right - left, bottom - top) for left, top, right, bottom in boxes.values()} == {
        (TILE, TILE)
    }
    assert boxes["red"][2] < boxes["lime"][0]
    assert boxes["red"][1] == boxes["lime"][1]
    assert boxes["red"][0] == boxes["blue"][0]
    assert boxes["red"][3] < boxes["blue"][1]


def _box(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Return the bounding box of a colour: left, top, right, bottom."""
    distance = ImageChops.difference(sheet, Image.new("RGB", sheet.size, colour)).convert("L")
    box = ImageChops.invert(distance).point([0] * 255 + [255]).getbbox()
    assert box is not None
    return box
