"""`zlora replay`, as its user runs it: what it prints, what it leaves, and how it ends."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import load_file
from support.fakes import a_request, links, load_engine, write
from support.processes import clean_environ
from zlora.cli import main
from zlora.errors import BaseNotRestored, ModelUnavailable, StoreFailed
from zlora.schema import Asset, LoraSpec
from zlora_worker.cli.replay import Redrawn, Replayer
from zlora_worker.cli.replay_subjects import Subject
from zlora_worker.demo.command import read_document
from zlora_worker.demo.server import TOKEN, serving
from zlora_worker.fetch.cache import Cache
from zlora_worker.generate import Child, Report, generate
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.model import loader
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results import encoding
from zlora_worker.results.metadata import embed_metadata, provenance_of
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
        """The pictures of a job, as they lie in the store."""
        store, cache = FolderStore(self.folder), Cache.open(self.settings)
        shelf = LoraMemoryCache(max_bytes=10**9)
        runtime = Child(
            engine=self.engine,
            cache=cache,
            shelf=shelf,
            store=store,
            links=links(store),
            job_timeout=60,
            meter=Meter(),
        )
        result = generate(runtime, job_id, a_request(**fields), lambda *_: None)
        return [self.folder / image.key for image in result.images]

    def loras_of(self, document: str) -> dict[str, Any]:
        """A document's own prompt, guidance and LoRAs."""
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
            load_engine(folder, ZLORA_MODEL="demo"),
            Settings.from_env({"ZLORA_MODEL": "demo"} | variables),
            variables,
            host,
            folder / "store",
        )


@pytest.fixture
def run(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command in this process, with the model that is loaded already."""
    for name in [name for name in os.environ if name.startswith("ZLORA_")]:
        monkeypatch.delenv(name)
    for name, value in scene.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(loader, "load", lambda _settings: scene.engine)
    return lambda *arguments: CliRunner().invoke(main, ["replay", *map(str, arguments)])


def with_words(path: Path, target: Path, **fields: Any) -> Path:
    """The same pixels in a file that says something else of itself."""
    with Image.open(path) as picture:
        recipe = provenance_of(picture)
        assert recipe
        said = msgspec.structs.replace(recipe, **fields)
        target.write_bytes(
            encoding.encode(picture, recipe.request, **embed_metadata(said, "", "png"))
        )
    return target


# --- identical


def test_twenty_pictures_are_identical(scene: Scene, tmp_path: Path) -> None:
    """Of all formats that keep pixels, with LoRAs and without, by what they say and by their manifests.

    In a process of its own, which has another number of threads, an empty cache and no base named. It says nothing
    beside its verdicts.
    """
    given = [
        *scene.draw("basic", **PNG, **scene.loras_of("basic"), num_inference_steps=4),
        *scene.draw("single", **PNG, **scene.loras_of("single_lora"), num_inference_steps=2),
        *scene.draw(
            "multiple",
            **PNG,
            **scene.loras_of("multiple_loras"),
            num_images=2,
            scheduler="euler_ancestral",
        ),
        *scene.draw("cozy", **PNG, **scene.loras_of("cozy_ref"), width=72, height=128),
        *scene.draw("basic-webp", **WEBP, **scene.loras_of("basic"), scheduler="ddim", seed=0),
        *scene.draw(
            "single-webp",
            **WEBP,
            **scene.loras_of("single_lora"),
            scheduler="dpmpp_2m_karras",
            height=96,
        ),
        *scene.draw(
            "multiple-webp", **WEBP, **scene.loras_of("multiple_loras"), num_images=2, width=128
        ),
        *scene.draw(
            "cozy-webp",
            **WEBP,
            **scene.loras_of("cozy_ref"),
            scheduler="unipc",
            num_inference_steps=3,
        ),
        *scene.draw("heun", **PNG, scheduler="heun", width=104),
        *scene.draw("lcm", **PNG, scheduler="lcm", guidance_scale=0.0),
        *scene.draw("dpmpp_2m", **WEBP, scheduler="dpmpp_2m", num_inference_steps=2),
        *scene.draw(
            "euler",
            **WEBP,
            scheduler="euler",
            negative_prompt="blurry",
            seed=2**53 - 2,
            num_images=2,
        ),
    ]
    asset = Asset(url=f"http://{scene.host}/anime-style.safetensors?sig=s3cret")
    lora = LoraSpec(file=asset, weight=1.5, text_encoder_weight=0.25)
    manifests = [
        scene.draw("by-manifest", **PNG, num_images=3, loras=(lora,), embed_metadata=False),
        scene.draw("by-manifest-webp", **WEBP, num_images=2, width=200, embed_metadata=False),
    ]
    given += [pictures[0].parents[1] / "manifest.json" for pictures in manifests]
    environ = clean_environ(
        scene.variables | {"ZLORA_LORA_CACHE": str(tmp_path), "OMP_NUM_THREADS": "2"}
    )
    zlora = str(Path(sys.executable).with_name("zlora"))

    ended = subprocess.run(
        [zlora, "replay", "--json", *map(str, given)],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (ended.returncode, ended.stderr) == (0, "")
    told = json.loads(ended.stdout)
    assert [
        (one["source"], one["verdict"])
        for one in told
        if one["verdict"] != "identical" or one["causes"]
    ] == []
    assert len(told) == len({one["pixels_sha256"] for one in told}) == 20
    assert {one["mean_difference"] for one in told} == {0.0}
    assert len(list((tmp_path / "files").iterdir())) == 4


def test_pictures_whose_files_are_gone_are_told_by_their_manifest(
    scene: Scene, run: Callable[..., Result]
) -> None:
    """In the text and the JSON alike: what is identical is what was recorded."""
    here, gone = scene.draw("half", num_images=2)
    gone.unlink()
    manifest = here.parents[1] / "manifest.json"

    result, told = run(manifest), json.loads(run(manifest, "--json").stdout)

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        f"identical   {here}",
        f"identical   {manifest}, index 1",
        "            no file there: compared with the recorded hash",
        "2 pictures: 2 identical",
    ]
    assert [(one["source"], one["file"], one["verdict"]) for one in told] == [
        (str(here), str(here), "identical"),
        (f"{manifest}, index 1", None, "identical"),
    ]


# --- drifted


def test_what_drifted_is_told_and_shown(
    scene: Scene, run: Callable[..., Result], tmp_path: Path
) -> None:
    """By the version that differs, where the pixels are others too; and beside the picture of now."""
    (same,) = scene.draw("told")
    (path,) = scene.draw("drifting", guidance_scale=3.0)
    versions = dict(present := recipe(path).versions) | {"torch": "1.0"}
    other = with_words(
        path,
        tmp_path / "other.png",
        versions=versions,
        request=a_request(guidance_scale=7.0, seed=recipe(path).seed),
    )

    result = run(same, other, "--out", tmp_path / "out")

    assert (result.exit_code, result.stderr) == (3, "")
    lines = result.stdout.splitlines()
    assert lines[:2] == [f"identical   {same}", f"drifted     {other}"]
    assert re.fullmatch(r" {12}[\d.]+ of 255 on average, \d+ at most", lines[2])
    assert lines[3:] == [
        f"            torch: 1.0 -> {present['torch']}",
        "2 pictures: 1 identical, 1 drifted",
    ]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "1-told-0.png", "2-drifting-0-drift.png", "2-drifting-0.png",
    ]  # fmt: skip
    with Image.open(tmp_path / "out" / "1-told-0.png") as picture:
        assert encoding.pixels_sha256(picture) == recipe(same).pixels_sha256
    with Image.open(tmp_path / "out" / "2-drifting-0-drift.png") as sheet:
        tiles = [sheet.crop((8 + x * 264, 28, 264 + x * 264, 284)) for x in range(3)]
    assert (
        encoding.pixels_sha256(tiles[0].resize((64, 64), Image.Resampling.NEAREST))
        == recipe(path).pixels_sha256
    )
    assert max(tiles[2].tobytes()) > 127


def test_a_file_that_is_not_opaque_is_shown_as_it_is_seen(
    scene: Scene, run: Callable[..., Result], tmp_path: Path
) -> None:
    """On white, though its colours are there."""
    (path,) = scene.draw("clear")
    with Image.open(path) as picture:
        said, clear = provenance_of(picture), picture.convert("RGBA")
    assert said
    clear.putalpha(0)
    path.write_bytes(encoding.encode(clear, said.request, **embed_metadata(said, "", "png")))

    result = run(path, "--out", tmp_path)

    assert (result.exit_code, result.stderr) == (3, "")
    assert "  the file was edited after it was drawn: it is not opaque\n" in result.stdout
    with Image.open(tmp_path / "1-clear-0-drift.png") as sheet:
        assert set(sheet.crop((8, 28, 264, 284)).tobytes()) == {255}
        assert max(sheet.crop((536, 28, 792, 284)).tobytes()) > 127


def recipe(path: Path) -> Any:
    with Image.open(path) as picture:
        return provenance_of(picture)


def test_another_base_is_named(
    scene: Scene, run: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZLORA_MODEL's draws, whatever the picture says; one weight of it is another."""
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
    assert f"  the base differs: demo ({scene.engine.base_sha256[:12]}) -> " in result.stdout
    assert result.stdout.endswith("1 picture: 1 drifted\n")


def test_a_terminal_sees_how_far_it_is(
    scene: Scene, run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the error stream; the verdicts are what they are without."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    (path,) = scene.draw("watched")

    result = run(path)

    assert result.stdout == f"identical   {path}\n1 picture: 1 identical\n"
    assert "1 of 1" in result.stderr


# --- what cannot be drawn


def test_a_picture_that_cannot_be_drawn_is_one_line_after_the_verdicts(
    scene: Scene, run: Callable[..., Result], tmp_path: Path
) -> None:
    """The others are drawn all the same."""
    (same,) = scene.draw("sound")
    gone = LoraSpec(
        file=Asset(url=f"http://{scene.host}/gone.safetensors?sig=s3cret", sha256="0" * 64)
    )
    path = with_words(same, tmp_path / "gone.png", request=a_request(loras=(gone,)))

    result = run(path, same, "--out", tmp_path / "out")

    assert result.exit_code == 1
    assert result.stdout.splitlines()[0] == f"impossible  {path}"
    assert result.stdout.splitlines()[2:] == [
        f"identical   {same}",
        "2 pictures: 1 identical, 1 impossible",
    ]
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        f"Error: {path} cannot be drawn: http://{scene.host}/gone.safetensors: "
    )
    assert result.stderr.endswith("[lora_not_found]\n")
    assert "s3cret" not in result.output
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["2-sound-0.png"]


@pytest.mark.parametrize(
    ("end", "line", "status"),
    [
        (ModelUnavailable("some/base is gone"), "Error: some/base is gone [model_unavailable]", 69),
        (BaseNotRestored(), f"Error: {BaseNotRestored()} [{BaseNotRestored.code}]", 75),
        (StoreFailed("no space"), "Error: no space [store_failed]", 75),
        (KeyboardInterrupt(), "interrupted [interrupted]", 130),
    ],
    ids=lambda end: type(end).__name__ if isinstance(end, BaseException) else "",
)
@pytest.mark.parametrize("drawn", [0, 1])
def test_verdicts_before_an_end_are_told(
    scene: Scene,
    run: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    *,
    end: BaseException,
    line: str,
    status: int,
    drawn: int,
) -> None:
    """And the end is what it is without them: one line and its exit status."""
    (path,) = scene.draw("ended")

    class Ending(Replayer):
        def replay(self, subject: Subject, report: Report) -> Redrawn:
            if next(left) == 0:
                raise end
            return super().replay(subject, report)

    monkeypatch.setattr("zlora_worker.cli.replay.Replayer", Ending)
    left = iter(range(drawn, -1, -1))
    told = run(path, path, path)
    left = iter(range(drawn, -1, -1))
    told_json = run(path, path, path, "--json")

    verdicts = f"identical   {path}\n1 picture: 1 identical\n" if drawn else ""
    assert (told.exit_code, told.stdout, told.stderr.strip()) == (status, verdicts, line)
    assert (told_json.exit_code, told_json.stderr.strip()) == (status, line)
    assert [one["verdict"] for one in json.loads(told_json.stdout)] == drawn * ["identical"]


def text(folder: Path, _picture: Path) -> Path:
    (folder / "notes.txt").write_text("a city at night")
    return folder / "notes.txt"


def truncated(folder: Path, picture: Path) -> Path:
    (folder / "half.png").write_bytes(picture.read_bytes()[:3000])
    return folder / "half.png"


def untold(folder: Path, picture: Path) -> Path:
    with Image.open(picture) as opened:
        Image.frombytes("RGB", opened.size, opened.tobytes()).save(folder / "untold.png")
    return folder / "untold.png"


def missing(folder: Path, _picture: Path) -> Path:
    return folder / "missing.png"


def older(folder: Path, picture: Path) -> Path:
    """A manifest of before pictures said what they are."""
    document = json.loads((picture.parents[1] / "manifest.json").read_text())
    new = ("request", "base_sha256", "model_sha256", "scheduler", "device", "dtype", "threads")
    (folder / "manifest.json").write_text(
        json.dumps({name: document[name] for name in document if name not in new})
    )
    return folder / "manifest.json"


@pytest.mark.parametrize("given", [text, truncated, untold, missing, older])
def test_what_does_not_say_what_it_is_is_one_line(
    scene: Scene, run: Callable[..., Result], tmp_path: Path, given: Callable[[Path, Path], Path]
) -> None:
    """Before anything is drawn, whatever is beside it; as JSON, nothing is an array too."""
    (picture,) = scene.draw("beside")
    path = given(tmp_path, picture)

    result = run(picture, path, "--out", tmp_path / "out")
    as_json = run(picture, path, "--json")

    assert (result.exit_code, result.stdout) == (65, "")
    assert result.stderr.startswith(f"Error: {path}: ")
    assert result.stderr.count("\n") == 1
    assert (as_json.exit_code, as_json.stdout, as_json.stderr) == (65, "[]\n", result.stderr)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_one_line(
    scene: Scene, run: Callable[..., Result], tmp_path: Path
) -> None:
    """After the verdict of what could not be written there."""
    (tmp_path / "out").write_text("a file")
    (path,) = scene.draw("unwritten")

    result = run(path, "--out", tmp_path / "out")

    assert result.stdout == f"identical   {path}\n1 picture: 1 identical\n"
    assert (result.exit_code, result.stderr) == (
        73,
        f"Error: {tmp_path / 'out'}: File exists [cannot_write]\n",
    )


def test_the_command_brings_in_no_library_of_the_worker() -> None:
    """`zlora` loads it at each start, also where there is only a producer."""
    code = "import sys, zlora_worker.cli.replay_command; print(sorted(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout

    assert not [
        name
        for name in ("torch", "boto3", "PIL", "ssrfguard", "diffusers")
        if f"'{name}'" in modules
    ]
