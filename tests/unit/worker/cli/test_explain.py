"""`zlora explain`: images without LoRAs and with other weights, and how much they differ."""

import json
from pathlib import Path
from typing import Any, Final

import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageChops, ImageStat
from support.fakes import kohya_lora, load_pipeline, settings, write
from support.jobs import lora_cache
from support.redrawing import Drawing
from zlora.cli import main
from zlora.schema import GenerateRequest, parse_request
from zlora_worker.model import loader
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.settings import Settings

FACTORS: Final = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5]


@pytest.fixture(scope="module")
def model(model_home: Path) -> Pipeline:
    return load_pipeline(model_home)


@pytest.fixture
def machine(
    model: Pipeline, model_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    """Return the settings of the command, which loads no other model than that of the tests."""
    variables = lora_cache(tmp_path / "loras") | {"ZLORA_LORA_ROOTS": str(tmp_path)}
    made = settings(model_home, **variables)
    monkeypatch.setattr(loader, "load", lambda _settings: model)
    monkeypatch.setattr(Settings, "from_env", lambda *_: made)
    monkeypatch.setenv("ZLORA_MODEL", made.model)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.fixture
def draw(model: Pipeline, machine: Settings, tmp_path: Path) -> Any:
    """Return a function that draws a job and returns the file of its only image."""

    def drawn(request: GenerateRequest, job_id: str = "job") -> Path:
        (path,) = Drawing(model)(tmp_path, machine, request, job_id)
        return path

    return drawn


def job(tmp_path: Path, *loras: dict[str, Any], **fields: Any) -> GenerateRequest:
    files = [
        write(tmp_path / f"lora-{index}.safetensors", kohya_lora()) for index in range(len(loras))
    ]
    specs = [
        {"file": {"url": file.as_uri()}, **lora} for file, lora in zip(files, loras, strict=True)
    ]
    document = {"prompt": "a city", "seed": 4, "num_inference_steps": 2, "loras": specs}
    return parse_request(document | fields)


def explained(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["explain", *map(str, arguments)])


def test_the_differences_are_those_of_jobs_without_a_lora_and_with_other_weights(
    draw: Any, tmp_path: Path
) -> None:
    """The sheet has a row for the image without LoRAs, and one for each LoRA."""
    weights = ({"weight": 1.0}, {"weight": -0.5, "text_encoder_weight": 0})
    path = draw(job(tmp_path, *weights))

    result = explained(path, "--json", "--out", "out/sheet.png")

    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["is_identical"]
    assert [lora["unet_weight"] for lora in found["loras"]] == [1.0, -0.5]
    assert [[rung["factor"] for rung in lora["ladder"]] for lora in found["loras"]] == [FACTORS] * 2
    other = draw(job(tmp_path, {"weight": 0}, weights[1]), "other")
    assert found["loras"][0]["without"] == difference(path, other)
    half = draw(job(tmp_path, weights[0], weights[1] | {"weight": -0.25}), "half")
    assert found["loras"][1]["ladder"][2]["difference"] == difference(path, half)
    assert found["without_any"] == difference(path, draw(job(tmp_path), "none"))
    assert found["loras"][0]["ladder"][4]["difference"] == {"mean": 0.0, "changed": 0.0}
    with Image.open("out/sheet.png") as sheet:
        assert sheet.size == (12 + 7 * 268, 12 + 3 * (256 + 2 * 22 + 12) + 22)


def difference(one: Path, other: Path) -> dict[str, float]:
    with Image.open(one) as first, Image.open(other) as second:
        found = ImageChops.difference(first.convert("RGB"), second.convert("RGB"))
    visible = sum(max(pixel) >= 16 for pixel in zip(*[iter(found.tobytes())] * 3, strict=True))
    return {
        "mean": round(sum(ImageStat.Stat(found).mean) / 3, 3),
        "changed": round(visible / (found.width * found.height), 4),
    }


def test_weights_beyond_their_bounds_are_left_out(draw: Any, tmp_path: Path) -> None:
    path = draw(job(tmp_path, {"weight": 3.0}))

    result = explained(path, "--json")

    found = json.loads(result.stdout)
    assert [rung["factor"] for rung in found["loras"][0]["ladder"]] == FACTORS[:-1]
    assert Path(found["sheet"]).name == f"{path.stem}-explained.png"


def test_strengths_over_the_steps_are_scaled(draw: Any, tmp_path: Path) -> None:
    """The recorded request has them."""
    spec = {"weights": [[0, 1], [0.5, 0]], "text_encoder_weight": 0}
    path = draw(job(tmp_path, spec, output_format="webp", quality=60))
    scaled = {"weights": [[0, 0.5], [0.5, 0]], "text_encoder_weight": 0}
    other = draw(job(tmp_path, scaled), "other")
    plain = draw(job(tmp_path, spec), "plain")

    found = json.loads(explained(path, "--json").stdout)

    assert found["is_identical"]
    assert found["loras"][0]["ladder"][2]["difference"] == difference(plain, other)


def test_the_output_for_people_has_the_numbers(draw: Any, tmp_path: Path) -> None:
    result = explained(draw(job(tmp_path, {})))

    assert result.exit_code == 0, result.output
    for words in (
        "identical to what was recorded",
        "lora-0: weight 1, relative norm",
        "x 0.25:",
        "x 1: 0.0",
    ):
        assert words in result.stdout


def test_another_base_is_named(
    draw: Any, tmp_path: Path, model_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the output and by the exit status: its numbers are those of another model."""
    path = draw(job(tmp_path, {}))
    other = load_pipeline(model_home)
    other.resident.base_sha256 = "0" * 64
    monkeypatch.setattr(loader, "load", lambda _settings: other)

    result, as_json = explained(path), explained(path, "--json")

    words = "the base model differs: tiny-sdxl ("
    assert (result.exit_code, as_json.exit_code) == (3, 3)
    assert words in result.stdout
    found = json.loads(as_json.stdout)["other_base"]
    assert found.startswith(words)
    assert found.endswith(f" -> tiny-sdxl ({'0' * 12})")


@pytest.mark.parametrize("loras", [(), ({"weight": 0},)])
def test_an_image_without_loras_is_refused_before_anything_is_drawn(
    draw: Any, tmp_path: Path, loras: tuple[dict[str, Any], ...]
) -> None:
    result = explained(draw(job(tmp_path, *loras)))

    assert result.exit_code == 65
    assert "without LoRAs" in result.output
    assert not list(Path().glob("*-explained.png"))


@pytest.mark.parametrize("name", ["0.png", "folder", "sheet.jpg", "folder/"])
def test_a_target_that_cannot_be_is_refused_before_anything_is_drawn(
    draw: Any, tmp_path: Path, name: str
) -> None:
    """Such as the image itself, which has the only metadata."""
    path = draw(job(tmp_path, {}))
    (path.parent / "folder").mkdir()
    before = path.read_bytes()

    result = explained(path, "--out", path.parent / name)

    assert result.exit_code == 2, result.output
    assert path.read_bytes() == before


def test_a_manifest_is_refused_since_it_may_have_many_images(draw: Any, tmp_path: Path) -> None:
    manifest = draw(job(tmp_path, {})).parents[1] / "manifest.json"

    result = explained(manifest)

    assert result.exit_code == 65
    assert "not the file of one image" in result.output


def test_an_image_without_metadata_is_refused(machine: Settings, tmp_path: Path) -> None:
    assert machine
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")

    assert explained(tmp_path / "plain.png").exit_code == 65
    assert explained(tmp_path / "none.png").exit_code == 65
