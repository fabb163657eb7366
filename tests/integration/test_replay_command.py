"""`zlora replay` as its user runs it: output, files and exit statuses."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file
from support.fakes import a_request, links, load_pipeline, write
from support.jobs import make_spool, run_job
from support.processes import clean_environ
from support.redrawing import provenance_in, rewritten
from zlora.cli import main
from zlora.errors import BaseNotRestored, ModelUnavailable, StoreFailed
from zlora.schema import Asset, LoraSpec
from zlora_worker.child import Child
from zlora_worker.cli.replay import RecordedImage, Redrawn, Replayer
from zlora_worker.delivery.progress import Progress
from zlora_worker.demo.command import read_document
from zlora_worker.demo.server import TOKEN, serving
from zlora_worker.fetch.cache import Cache
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.model import loader
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results import encoding
from zlora_worker.results.store import FolderStore
from zlora_worker.settings import DEMO_LORAS, DEMO_MODEL, Settings

PNG: Final[dict[str, Any]] = {"output_format": "png"}
WEBP: Final[dict[str, Any]] = {"output_format": "webp", "lossless": True}
LOAD: Final = loader.load


class Scene(NamedTuple):
    """A worker's machine with the demo model, and a server of its LoRAs."""

    engine: Pipeline
    settings: Settings
    variables: dict[str, str]
    host: str
    folder: Path

    def draw(self, job_id: str, **fields: Any) -> list[Path]:
        """Draw a job and return its images in the store folder."""
        store = FolderStore(self.folder)
        child = Child(
            model=self.engine,
            lora_files=Cache.open(self.settings),
            loras=LoraMemoryCache(max_bytes=10**9),
            store=store,
            spool=make_spool(self.settings.cache_folder.with_name("spool")),
            urls=links(store),
            job_timeout=60,
            meter=Meter(),
        )
        result = run_job(child, job_id, a_request(**fields))
        return [self.folder / image.key for image in result.images]

    def fields_of(self, document: str) -> dict[str, Any]:
        """Return prompts, guidance and LoRAs of a request document."""
        request = read_document(document, self.host)
        names = ("prompt", "negative_prompt", "guidance_scale", "loras")
        return {name: getattr(request, name) for name in names}


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    with serving(DEMO_LORAS) as host:
        variables = {
            "ZLORA_HOME": str(folder / "home"),
            "ZLORA_DEVICE": "cpu",
            "ZLORA_LORA_CACHE": str(folder / "loras"),
            "ZLORA_ALLOW_HOSTS": host,
            "FILE_API_BASE_URL": f"http://{host}",
            "FILE_API_TOKEN": TOKEN,
        }
        yield Scene(
            load_pipeline(folder, ZLORA_MODEL="demo"),
            Settings.from_env({"ZLORA_MODEL": "demo"} | variables),
            variables,
            host,
            folder / "store",
        )


@pytest.fixture
def run(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Return a function that runs the command in this process, with the loaded model."""
    for name in [name for name in os.environ if name.startswith("ZLORA_")]:
        monkeypatch.delenv(name)
    for name, value in scene.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(loader, "load", lambda _settings: scene.engine)
    return lambda *arguments: CliRunner().invoke(main, ["replay", *map(str, arguments)])


# --- identical


def test_images_of_every_kind_are_identical_in_another_process(
    scene: Scene, tmp_path: Path
) -> None:
    """Lossless formats, with LoRAs and without, by metadata and by manifest.

    The process has another number of threads, an empty cache and no named model. It prints nothing
    but the outcomes.
    """
    paths = [
        *scene.draw("basic", **PNG, **scene.fields_of("basic"), num_inference_steps=4),
        *scene.draw(
            "cozy",
            **PNG,
            **scene.fields_of("cozy_ref"),
            width=72,
            scheduler="DPM++ SDE Karras",
            num_inference_steps=2,
        ),
        *scene.draw("lcm", **PNG, scheduler="lcm", guidance_scale=0.0),
        *scene.draw(
            "single",
            **WEBP,
            **scene.fields_of("single_lora"),
            scheduler="dpmpp_2m_karras",
            num_inference_steps=3,
        ),
        *scene.draw(
            "multiple",
            **WEBP,
            **scene.fields_of("multiple_loras"),
            num_images=2,
            scheduler="euler",
            timesteps=(999, 500),
            seed=2**53 - 2,
        ),
    ]
    asset = Asset(url=f"http://{scene.host}/anime-style.safetensors?sig=s3cret")
    lora = LoraSpec(file=asset, weight=1.5, text_encoder_weight=0.25)
    for job_id, fields in (("manifest-png", PNG), ("manifest-webp", WEBP)):
        image, *_ = scene.draw(job_id, **fields, num_images=2, loras=(lora,), embed_metadata=False)
        paths.append(image.parents[1] / "manifest.json")
    variables = {"ZLORA_LORA_CACHE": str(tmp_path), "OMP_NUM_THREADS": "2"}

    ended = subprocess.run(
        [str(Path(sys.executable).with_name("zlora")), "replay", "--json", *map(str, paths)],
        env=clean_environ(scene.variables | variables),
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    outcomes = json.loads(ended.stdout)
    assert [(one["verdict"], one["causes"]) for one in outcomes] == [("identical", [])] * 10
    assert len({one["pixels_sha256"] for one in outcomes}) == 10
    assert {one["mean_difference"] for one in outcomes} == {0.0}
    assert len(list((tmp_path / "files").iterdir())) == 4


def test_missing_files_are_compared_by_their_recorded_hashes(
    scene: Scene, run: Callable[..., Result]
) -> None:
    """The text and the JSON say so."""
    here, gone = scene.draw("half", num_images=2)
    gone.unlink()
    manifest = here.parents[1] / "manifest.json"

    result, outcomes = run(manifest), json.loads(run(manifest, "--json").stdout)

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"identical   {here}",
        f"identical   {manifest}, index 1",
        "            the file is missing: compared with the recorded hash",
        "2 images: 2 identical",
    ]
    assert [(one["source"], one["file"], one["verdict"]) for one in outcomes] == [
        (str(here), str(here), "identical"),
        (f"{manifest}, index 1", None, "identical"),
    ]


# --- drifted


def test_a_drifted_image_is_reported_and_shown(
    scene: Scene, run: Callable[..., Result], tmp_path: Path
) -> None:
    """With the version that differs, and beside the image drawn now."""
    (same,) = scene.draw("same")
    (path,) = scene.draw("drifting", guidance_scale=3.0)
    drawn = provenance_in(path)
    other = rewritten(
        path,
        target=tmp_path / "other.png",
        versions=drawn.versions | {"torch": "1.0"},
        request=a_request(guidance_scale=7.0, seed=drawn.seed),
    )

    (tmp_path / "out").mkdir()
    for name in ("1-same-0.png", "2-drifting-0-drift.png"):  # planted links are not followed
        (tmp_path / "out" / name).symlink_to(tmp_path / "elsewhere")

    result = run(same, other, "--out", tmp_path / "out")

    assert (result.exit_code, result.stderr) == (3, "")
    assert not (tmp_path / "elsewhere").exists()
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"identical   {same}", f"drifted     {other}"]
    assert re.fullmatch(r" {12}[\d.]+ of 255 on average, \d+ at most", lines[2])
    assert lines[3:] == [
        f"            torch: 1.0 -> {drawn.versions['torch']}",
        "2 images: 1 identical, 1 drifted",
    ]
    out = tmp_path / "out"
    assert sorted(file.name for file in out.iterdir()) == [
        "1-same-0.png",
        "2-drifting-0-drift.png",
        "2-drifting-0.png",
    ]
    with Image.open(out / "1-same-0.png") as image:
        assert encoding.pixels_sha256(image) == provenance_in(same).pixels_sha256
    with Image.open(out / "2-drifting-0-drift.png") as sheet:
        tiles = [sheet.crop((8 + x * 264, 28, 264 + x * 264, 284)) for x in range(3)]
    small = tiles[0].resize((64, 64), Image.Resampling.NEAREST)
    assert encoding.pixels_sha256(small) == drawn.pixels_sha256
    assert max(tiles[2].tobytes()) > 127


def test_a_file_that_is_not_opaque_is_shown_on_white(
    scene: Scene, run: Callable[..., Result], tmp_path: Path
) -> None:
    (path,) = scene.draw("clear")

    def transparent(image: Image.Image) -> Image.Image:
        image.putalpha(0)
        return image

    result = run(rewritten(path, edit=transparent), "--out", tmp_path)

    assert (result.exit_code, result.stderr) == (3, "")
    assert "  the file was edited after it was drawn: it is not opaque\n" in result.stdout
    with Image.open(tmp_path / "1-clear-0-drift.png") as sheet:
        assert set(sheet.crop((8, 28, 264, 284)).tobytes()) == {255}
        assert max(sheet.crop((536, 28, 792, 284)).tobytes()) > 127


def test_another_base_model_is_named(
    scene: Scene, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZLORA_MODEL draws, whatever the file says; one weight of it differs."""
    (path,) = scene.draw("based")
    shutil.copytree(DEMO_MODEL, tmp_path / "base")
    file = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_out.bias"][0] += 0.5
    write(file, tensors)
    monkeypatch.setattr(loader, "load", LOAD)
    monkeypatch.setenv("ZLORA_MODEL", str(tmp_path / "base"))

    result = run(path)

    assert (result.exit_code, result.stderr) == (3, "")
    assert f"  the base model differs: demo ({scene.engine.base_sha256[:12]}) -> " in result.stdout
    assert result.stdout.endswith("1 image: 1 drifted\n")


def test_a_terminal_shows_progress_on_stderr(
    scene: Scene, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    (path,) = scene.draw("watched")

    result = run(path)

    assert result.stdout == f"identical   {path}\n1 image: 1 identical\n"
    assert "1 of 1" in result.stderr


# --- what cannot be drawn


def test_an_image_that_cannot_be_drawn_is_one_line_after_the_outcomes(
    scene: Scene, run: Callable[..., Result], tmp_path: Path
) -> None:
    """The other images are drawn."""
    (same,) = scene.draw("intact")
    gone = LoraSpec(
        file=Asset(url=f"http://{scene.host}/gone.safetensors?sig=s3cret", sha256="0" * 64)
    )
    path = rewritten(same, target=tmp_path / "gone.png", request=a_request(loras=(gone,)))

    result = run(path, same, "--out", tmp_path / "out")

    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == f"impossible  {path}"
    assert result.stdout.splitlines()[2:] == [
        f"identical   {same}",
        "2 images: 1 identical, 1 impossible",
    ]
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        f"Error: {path} cannot be drawn: http://{scene.host}/gone.safetensors: "
    )
    assert result.stderr.endswith("[lora_not_found]\n")
    assert "s3cret" not in result.output
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["2-intact-0.png"]


@pytest.mark.parametrize(
    ("end", "line", "status", "drawn"),
    [
        (ModelUnavailable("no base"), "Error: no base [model_unavailable]", 69, 0),
        (BaseNotRestored(), f"Error: {BaseNotRestored()} [{BaseNotRestored.code}]", 75, 1),
        (StoreFailed("no space"), "Error: no space [store_failed]", 75, 1),
        (KeyboardInterrupt(), "interrupted [interrupted]", 130, 1),
    ],
    ids=lambda end: type(end).__name__ if isinstance(end, BaseException) else "",
)
def test_outcomes_before_an_error_are_printed(
    scene: Scene,
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    *,
    end: BaseException,
    line: str,
    status: int,
    drawn: int,
) -> None:
    """The error is one line with its exit status, with outcomes before it or without."""
    (path,) = scene.draw("ended")

    class Ending(Replayer):
        def replay(self, image: RecordedImage, progress: Progress) -> Redrawn:
            if next(left) == 0:
                raise end
            return super().replay(image, progress)

    monkeypatch.setattr("zlora_worker.cli.replay.Replayer", Ending)
    left = iter(range(drawn, -1, -1))
    text = run(path, path, path)
    left = iter(range(drawn, -1, -1))
    as_json = run(path, path, path, "--json")

    outcomes = f"identical   {path}\n1 image: 1 identical\n" if drawn else ""
    assert (text.exit_code, text.stdout, text.stderr.strip()) == (status, outcomes, line)
    assert (as_json.exit_code, as_json.stderr.strip()) == (status, line)
    assert [one["verdict"] for one in json.loads(as_json.stdout)] == drawn * ["identical"]


def text(folder: Path, _image: Path) -> Path:
    (folder / "notes.txt").write_text("a city at night")
    return folder / "notes.txt"


def truncated(folder: Path, image: Path) -> Path:
    (folder / "half.png").write_bytes(image.read_bytes()[:3000])
    return folder / "half.png"


def bare(folder: Path, image: Path) -> Path:
    with Image.open(image) as opened:
        Image.frombytes("RGB", opened.size, opened.tobytes()).save(folder / "bare.png")
    return folder / "bare.png"


def missing(folder: Path, _image: Path) -> Path:
    return folder / "missing.png"


def older(folder: Path, image: Path) -> Path:
    """Write a manifest of the first versions, without provenance."""
    document = json.loads((image.parents[1] / "manifest.json").read_text())
    new = ("request", "base_sha256", "model_sha256", "scheduler", "device", "dtype", "threads")
    (folder / "manifest.json").write_text(
        json.dumps({name: document[name] for name in document if name not in new})
    )
    return folder / "manifest.json"


@pytest.mark.parametrize("given", [text, truncated, bare, missing, older])
def test_a_file_without_provenance_is_one_line(
    scene: Scene, run: Callable[..., Result], tmp_path: Path, given: Callable[[Path, Path], Path]
) -> None:
    """Before anything is drawn, whichever files are beside it; the JSON is an empty array."""
    (image,) = scene.draw("beside")
    path = given(tmp_path, image)

    result = run(image, path, "--out", tmp_path / "out")
    as_json = run(image, path, "--json")

    assert (result.exit_code, result.stdout) == (65, "")
    assert result.stderr.startswith(f"Error: {path}: ")
    assert result.stderr.count("\n") == 1
    assert (as_json.exit_code, as_json.stdout, as_json.stderr) == (65, "[]\n", result.stderr)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(
    scene: Scene, run: Callable[..., Result], tmp_path: Path
) -> None:
    """After the outcome of the image that cannot be written."""
    (tmp_path / "out").write_text("a file")
    (path,) = scene.draw("unwritten")

    result = run(path, "--out", tmp_path / "out")

    assert result.stdout == f"identical   {path}\n1 image: 1 identical\n"
    assert (result.exit_code, result.stderr) == (
        73,
        f"Error: {tmp_path / 'out'}: File exists [cannot_write]\n",
    )


def test_importing_the_command_imports_no_library_of_the_worker() -> None:
    """`zlora` imports it at each start, also if only the producer is installed."""
    code = "import sys, zlora_worker.cli.replay; print(sorted(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout

    assert not [
        name
        for name in ("torch", "boto3", "PIL", "ssrfguard", "diffusers")
        if f"'{name}'" in modules
    ]
