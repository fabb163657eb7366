"""Several base models on one worker: each draws as it does alone, whatever was drawn before."""

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from support import figures, tiny_sdxl
from support.fakes import (
    PLACES,
    TEXT,
    UNET,
    MemoryStore,
    Tensors,
    a_request,
    kohya_lora,
    load_pipeline,
    peft_lora,
    settings,
    weights,
)
from support.interruption import Cancelled, TimeLimit, cancel, time_limit
from support.jobs import Watch, lora_cache, make_child, make_spool, put_in_cache, run_job
from support.tiny_folder import tiny_sd15
from zlora.errors import BaseNotRestored, InvalidRequest, LoraMismatch, ModelUnavailable
from zlora.lora.catalogue import Catalogue
from zlora.schema import GenerateResult, LoraSpec, Phase
from zlora_worker.child import Child
from zlora_worker.model import loader
from zlora_worker.model.base import BaseModel
from zlora_worker.model.bases import BaseModels
from zlora_worker.model.checksum import weights_sha256
from zlora_worker.model.pipeline import Pipeline, PipelineState
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results.manifest import read_result

CHANGES: Final = int(os.environ.get("ZLORA_BASE_CHANGES", "24"))
# Bases that are in host memory. A worker with two of three changes both from memory and from disk.
ROOMS: Final = ("all", "two", "none") if "ZLORA_BASE_CHANGES" in os.environ else ("two", "none")
NAMES: Final = ("plain", "velocity", "other")
KINDS: Final = ("none", "kohya", "peft", "dora")
SPACIOUS: Final = 10**9  # bytes


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of three models with the same layout, other weights and other configurations."""
    folder = tmp_path_factory.mktemp("bases")
    for seed, name in enumerate(NAMES):
        tiny_sdxl.build(folder / name, seed=seed)
    edit(folder / "velocity/scheduler/scheduler_config.json", prediction_type="v_prediction")
    edit(folder / "other/model_index.json", force_zeros_for_empty_prompt=False)
    edit(folder / "other/vae/config.json", scaling_factor=0.2)
    edit(folder / "other/unet/config.json", sample_size=16)
    return {name: folder / name for name in NAMES}


def drawn(result: GenerateResult) -> str:
    """Return the digest of the image, and the relative norms of its LoRAs."""
    norms = [receipt.relative_norm for receipt in result.loras]
    return f"{result.images[0].sha256} {norms}"


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


class Worker:
    """Child of a worker without a broker, which has one base model or several."""

    def __init__(self, home: Path, folder: Path, variables: dict[str, str]) -> None:
        loaded = settings(home, **{"ZLORA_MODEL": ""} | variables | lora_cache(folder / "cache"))
        torch.set_num_threads(1)
        self.model: Pipeline = loader.load(loaded)
        self.bases = BaseModels.open(loaded, self.model) if loaded.models else None
        self.child = make_child(self.model, MemoryStore(100_000), loaded, bases=self.bases)
        self._count = 0
        self._loras = {
            "kohya": kohya_lora((*UNET, *TEXT)),
            "peft": peft_lora(UNET),
            "dora": kohya_lora() | {f"{UNET[0].kohya}.dora_scale": torch.ones(32, 1)},
        }

    def lora(self, tensors: Tensors) -> LoraSpec:
        """Put a file into the cache."""
        return LoraSpec(file=put_in_cache(self.child, tensors))

    def run(
        self, name: str | None, kind: str = "none", watch: Watch = lambda *_: None, **fields: Any
    ) -> GenerateResult:
        """Run one job on a base."""
        self._count += 1
        loras = (self.lora(self._loras[kind]),) if kind in self._loras else ()
        request = a_request(seed=3, model=name, embed_metadata=False, **{"loras": loras} | fields)
        return run_job(self.child, f"job-{self._count}", request, watch)

    def sha256(self) -> str:
        """Return the digest of the weights that are in memory now."""
        names = ("unet", "text_encoder", "text_encoder_2", "vae")
        return weights_sha256({name: getattr(self.model.pipeline, name) for name in names})


def of_all(bases: dict[str, Path], **variables: str) -> dict[str, str]:
    listed = ",".join(f"{name}={path}" for name, path in bases.items())
    return {"ZLORA_MODELS": listed} | variables


Alone = dict[str, tuple[str, dict[str, str]]]  # digest and images of each base by the kind of job


# A wider scope than that of `alone`, so that what each base draws alone is drawn once.
@pytest.fixture(scope="session", params=PLACES)
def place(request: pytest.FixtureRequest) -> dict[str, str]:
    variables: dict[str, str] = request.param
    return variables


@pytest.fixture(scope="module")
def alone(
    place: dict[str, str],
    bases: dict[str, Path],
    model_home: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Alone:
    """Return what a worker with one base draws."""
    found = {}
    for name, path in bases.items():
        worker = Worker(
            model_home, tmp_path_factory.mktemp("alone"), {"ZLORA_MODEL": str(path)} | place
        )
        images = {kind: drawn(worker.run(None, kind)) for kind in KINDS}
        found[name] = (worker.model.base_sha256, images)
    return found


@pytest.fixture(scope="module", params=ROOMS)
def worker(
    request: pytest.FixtureRequest,
    alone: Alone,
    bases: dict[str, Path],
    model_home: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Worker:
    """Return a worker whose host memory holds all bases, two of them, or none."""
    place: dict[str, str] = request.getfixturevalue("place")
    one = load_pipeline(model_home, ZLORA_MODEL=str(bases["plain"]), **place).resident.nbytes
    room = {"all": SPACIOUS, "two": 2 * one + one // 2, "none": one - 1}[request.param]
    variables = of_all(bases, ZLORA_MODELS_BYTES=str(room)) | place
    return Worker(model_home, tmp_path_factory.mktemp("worker"), variables)


def test_each_base_draws_as_it_does_alone_in_any_order_of_jobs(
    worker: Worker, alone: Alone
) -> None:
    assert worker.bases is not None
    kinds = KINDS if worker.bases._copies else KINDS[1::2]  # each job reads its base from disk
    order = [(name, kind) for name in NAMES for kind in kinds]
    random.Random(1).shuffle(order)
    images = {}

    for name, kind in order:
        result = worker.run(name, kind)
        images[name, kind] = drawn(result)

        assert (result.model, result.base_sha256) == (name, alone[name][0])
        assert worker.sha256() == result.base_sha256
        assert worker.bases.nbytes <= worker.bases._max_bytes

    assert images == {(name, kind): alone[name][1][kind] for name, kind in order}
    assert len(set(images.values())) == len(images)


def test_a_request_without_a_model_has_the_first(worker: Worker, alone: Alone) -> None:
    worker.run("other")

    result = worker.run(None)

    assert result.model == "plain"
    assert drawn(result) == alone["plain"][1]["none"]


def test_facts_of_a_base_change_with_it(worker: Worker) -> None:
    """Native size, previews and the unconditional prompt are those of the base that draws."""
    small, large = worker.run("plain", width=None), worker.run("other", previews=True)

    assert [image.width for image in (*small.images, *large.images)] == [64, 128]
    assert worker.model.pipeline.vae.config.scaling_factor == 0.2
    worker.run("velocity")
    assert worker.model.pipeline.vae.config.scaling_factor == 0.13025
    assert worker.model.base.scheduler.config.prediction_type == "v_prediction"


@contextmanager
def struck_change(line: int) -> Iterator[list[int]]:
    """Raise `TimeLimit` before a line of code of the change of the base in the block.

    Yields a list that has the number of lines that were run in the change afterwards.
    """
    change_to = Pipeline.change_to
    lines = [0]

    def trace(_frame: object, event: str, _argument: object) -> object:
        if event == "line":
            lines[0] += 1
            if lines[0] == line:
                sys.settrace(None)
                raise TimeLimit
        return trace

    def traced(self: Pipeline, base: BaseModel) -> None:
        sys.settrace(trace)  # type: ignore[arg-type]
        try:
            change_to(self, base)
        finally:
            sys.settrace(None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "change_to", traced)
        yield lines


# An exception that a signal raises during garbage collection is lost, and the job goes on.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_changes_with_failures_and_signals_leave_no_wrong_bit(
    worker: Worker,
    alone: Alone,
    place: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Of four jobs one is cancelled, one is struck in its change, one at any time.

    `make changes` makes a hundred changes, `make test` fewer; fewer still of bases on disk, which
    take longer.
    """
    assert worker.bases is not None
    count = CHANGES // {3: 1, 2: 3, 0: 6}[len(worker.bases._copies)]
    chance = random.Random(7)
    for name in NAMES:  # a first change has a longer check
        worker.run(name)
    with struck_change(0) as all_lines:
        worker.run("velocity")
        worker.run("plain")
    struck = 0
    for number in range(count):
        name = chance.choice([other for other in NAMES if other != worker.model.name])
        kind, end = chance.choice(KINDS), ("drawn", "cancelled", "struck", "limit")[number % 4]
        try:
            if end == "struck":
                with struck_change(chance.randrange(1, all_lines[0] // 2)):
                    worker.run(name, kind)
            elif end == "limit":
                with time_limit(chance.uniform(0.0005, 0.02)):
                    worker.run(name, kind)
            elif end == "cancelled":
                worker.run(name, kind, cancel)
            else:
                result = worker.run(name, kind)
                assert (result.model, result.base_sha256) == (name, worker.sha256())
        except TimeLimit:
            struck += end == "struck"
        except Exception:  # noqa: BLE001 - libraries replace `TimeLimit` by errors of their own
            assert end in ("cancelled", "limit")

        assert worker.model.is_ready()
        assert worker.sha256() == alone[worker.model.name][0] == worker.model.base_sha256
    for name in NAMES:
        assert drawn(worker.run(name, "kohya")) == alone[name][1]["kohya"]
    assert struck >= count // 8
    figures.note(
        tmp_path_factory,
        f"{place['ZLORA_PATCH']}, {place['ZLORA_DEVICE']}, {len(worker.bases._copies)} copies: "
        f"{count} changes of the base model, {struck} interrupted in the change, 0 wrong bits",
    )


@pytest.mark.parametrize("times", [1, 5, 8])
def test_a_base_that_is_copied_in_part_never_draws(
    times: int, worker: Worker, alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy that is interrupted so many times is completed at once or before the next job."""
    worker.run("plain")
    worker.run("velocity")
    faults = iter(range(times))
    copy_from = BaseModel.copy_from

    def interrupted(self: BaseModel, other: BaseModel) -> None:
        for target, source in list(zip(self.tensors(), other.tensors(), strict=True))[::2]:
            target.copy_(source)
        if next(faults, None) is not None:
            raise TimeLimit
        copy_from(self, other)

    monkeypatch.setattr(BaseModel, "copy_from", interrupted)
    with pytest.raises(TimeLimit):
        worker.run("plain", "kohya")
    while worker.model.state is not PipelineState.READY:
        try:
            worker.model.is_ready()
        except TimeLimit:
            continue

    assert worker.sha256() == alone[worker.model.name][0]
    for name in ("velocity", "plain"):
        assert drawn(worker.run(name, "kohya")) == alone[name][1]["kohya"]


def test_a_copy_that_differs_from_its_checksum_never_draws(
    bases: dict[str, Path], model_home: Path, tmp_path: Path
) -> None:
    """A bit that flips in host memory ends the child, before anything is drawn."""
    worker = Worker(model_home, tmp_path, of_all(bases))
    assert worker.bases is not None
    copy = worker.bases._copies["velocity"]
    copy.weights.stacks[3].base.view(torch.int32).flatten()[5] ^= 1

    with pytest.raises(BaseNotRestored, match="not what was loaded"):
        worker.run("velocity")

    assert not worker.model.is_ready()


@pytest.mark.parametrize("room", ["0", str(SPACIOUS)])
def test_a_model_that_is_not_listed_is_refused_with_the_list(
    room: str, bases: dict[str, Path], model_home: Path, tmp_path: Path
) -> None:
    worker = Worker(model_home, tmp_path, of_all(bases, ZLORA_MODELS_BYTES=room))

    with pytest.raises(InvalidRequest, match="one of plain, velocity, other") as error:
        worker.run("absent")

    assert error.value.details["path"] == "$.model"
    assert worker.child.queue_info().models == NAMES
    assert worker.child.queue_info().model == "plain"


def test_a_worker_with_one_base_serves_its_name(
    bases: dict[str, Path], model_home: Path, tmp_path: Path
) -> None:
    worker = Worker(model_home, tmp_path, {"ZLORA_MODEL": str(bases["other"])})

    assert worker.child.queue_info().models == ("other",)
    assert worker.run("other").images[0].sha256 == worker.run(None).images[0].sha256
    with pytest.raises(InvalidRequest, match="one of other"):
        worker.run("plain")


@pytest.fixture(params=["layout", "family"])
def misfit(request: pytest.FixtureRequest, model_home: Path, bases: dict[str, Path]) -> Path:
    """Folder of a model that cannot take the place of the others."""
    if request.param == "family":
        return tiny_sd15(model_home)
    return Path(bases["plain"].with_name("thin"))


@pytest.fixture(scope="module", autouse=True)
def thin(bases: dict[str, Path]) -> None:
    """Make a model whose VAE has other widths."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(bases["plain"], local_files_only=True)
    config = dict(pipeline.vae.config) | {"block_out_channels": (4, 16, 16, 16)}
    pipeline.vae = AutoencoderKL.from_config(config)
    pipeline.save_pretrained(bases["plain"].with_name("thin"))


def test_a_misfit_stops_the_start_if_it_is_loaded_there(
    misfit: Path, bases: dict[str, Path], model_home: Path, tmp_path: Path
) -> None:
    listed = {"good": bases["plain"], "misfit": misfit}

    with pytest.raises(ModelUnavailable, match="misfit cannot take the place of good: "):
        Worker(model_home, tmp_path, of_all(listed))


def test_a_misfit_fails_its_job_alone_if_it_is_loaded_later(
    misfit: Path, bases: dict[str, Path], model_home: Path, tmp_path: Path
) -> None:
    listed = {"good": bases["plain"], "misfit": misfit, "gone": tmp_path / "gone"}
    worker = Worker(model_home, tmp_path, of_all(listed, ZLORA_MODELS_BYTES="0"))
    before = worker.run("good").images[0].sha256

    for _ in range(2):
        with pytest.raises(ModelUnavailable, match="misfit cannot take the place of good: "):
            worker.run("misfit")
        with pytest.raises(ModelUnavailable, match="gone"):
            worker.run("gone")

    assert worker.model.state is PipelineState.READY
    assert worker.run("good").images[0].sha256 == before


def test_the_least_recently_used_copy_goes_first(
    bases: dict[str, Path], model_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = load_pipeline(model_home, ZLORA_MODEL=str(bases["plain"])).resident.nbytes
    worker = Worker(model_home, tmp_path, of_all(bases, ZLORA_MODELS_BYTES=str(2 * one)))
    changes: list[str] = []
    monkeypatch.setattr(Meter, "model_changed", lambda _self, tier, _seconds: changes.append(tier))

    for name in ("plain", "velocity", "plain", "other", "plain", "other", "velocity", "velocity"):
        worker.run(name)

    assert changes == ["memory", "memory", "disk", "memory", "memory", "disk"]
    assert worker.bases is not None
    assert list(worker.bases._copies) == ["other", "velocity"]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the bases that are read from now on, which takes long."""
    found: list[str] = []
    load_copy: Callable[..., BaseModel] = loader.load_copy

    def slow(settings: Any, resident: BaseModel) -> BaseModel:
        found.append(settings.models[0].name)
        time.sleep(0.2)
        return load_copy(settings, resident)

    monkeypatch.setattr(loader, "load_copy", slow)
    return found


def stop(phase: Phase, _step: int, _steps: int) -> None:
    if phase is Phase.CHANGE:
        raise Cancelled


@pytest.mark.parametrize("room", [0, 2])
def test_a_base_that_is_read_while_its_job_is_interrupted_serves_the_next_job(
    room: int, bases: dict[str, Path], model_home: Path, tmp_path: Path, loads: list[str]
) -> None:
    """Also if the base is larger than the bound of host memory."""
    one = load_pipeline(model_home, ZLORA_MODEL=str(bases["plain"])).resident.nbytes
    worker = Worker(model_home, tmp_path, of_all(bases, ZLORA_MODELS_BYTES=str(room * one)))

    with pytest.raises(Cancelled):
        worker.run("other", watch=stop)
    assert worker.model.name == "plain"
    result = worker.run("other")

    assert result.model == "other"
    assert loads == [*NAMES[:room], "other"]
    assert {"change"} == result.timings.keys() - worker.run("other").timings.keys()


@pytest.mark.usefixtures("loads")
def test_a_base_that_cannot_be_read_costs_other_jobs_nothing(
    bases: dict[str, Path],
    model_home: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Neither their result, if the job that named it was stopped meanwhile, nor a copy."""
    listed = bases | {"gone": tmp_path / "gone"}
    one = load_pipeline(model_home, ZLORA_MODEL=str(bases["plain"])).resident.nbytes
    worker = Worker(model_home, tmp_path, of_all(listed, ZLORA_MODELS_BYTES=str(3 * one)))

    for name in ("plain", "velocity"):
        caplog.clear()
        with pytest.raises(Cancelled):
            worker.run("gone", watch=stop)
        assert worker.run(name).model == name
        assert "base model gone cannot be loaded: " in caplog.text
    with pytest.raises(ModelUnavailable, match=r"^gone: no such file"):  # of this machine no path
        worker.run("gone")
    assert str(tmp_path / "gone") in caplog.text

    assert worker.bases is not None
    assert list(worker.bases._copies) == ["plain", "other", "velocity"]


def test_a_base_that_memory_does_not_hold_fails_its_job_alone(
    bases: dict[str, Path], model_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Worker(model_home, tmp_path, of_all(bases, ZLORA_MODELS_BYTES="0"))
    before = worker.run("plain").images[0].sha256

    def full(*_: object, **__: object) -> BaseModel:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("zlora_worker.model.loader.BaseModel", full)
    with pytest.raises(ModelUnavailable, match="other cannot be loaded: RuntimeError: out of"):
        worker.run("other")

    assert worker.run("plain").images[0].sha256 == before


def test_the_effect_of_dora_depends_on_the_base(
    bases: dict[str, Path], model_home: Path, tmp_path: Path
) -> None:
    """Magnitudes that are one base's own norms change the other one alone."""
    worker = Worker(model_home, tmp_path, of_all(bases))
    worker.run("plain")
    target = UNET[0]
    weight = weights(worker.model, "unet")[f"{target.module}.weight"]
    tensors = kohya_lora((target,))
    tensors[f"{target.kohya}.lora_up.weight"].zero_()
    tensors[f"{target.kohya}.dora_scale"] = weight.norm(dim=1, keepdim=True).clone()
    spec = worker.lora(tensors)

    for _ in range(2):
        with pytest.raises(LoraMismatch, match="changes nothing"):
            worker.run("plain", loras=(spec,))
        result = worker.run("velocity", loras=(spec,))
        assert result.images[0].sha256 != worker.run("velocity").images[0].sha256


def test_the_manifest_names_the_base_that_drew(
    bases: dict[str, Path], model_home: Path, tmp_path: Path
) -> None:
    worker = Worker(model_home, tmp_path, of_all(bases))

    result = worker.run("velocity", "kohya")
    stored = read_result(worker.child.store, result.job_id)

    assert stored is not None
    assert (stored.model, stored.base_sha256) == ("velocity", worker.sha256())
    assert stored.request is not None
    assert stored.request.model == "velocity"


def test_a_child_opens_with_its_bases(
    bases: dict[str, Path], model_home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says which are in memory, and each change."""
    caplog.set_level("INFO")
    variables = of_all(bases, ZLORA_STORE=(tmp_path / "store").as_uri(), ZLORA_MODEL="")
    loaded = settings(model_home, **variables, **lora_cache(tmp_path / "cache"))

    child = Child.open(loaded, make_spool(tmp_path / "spool"), Meter(), Catalogue())

    assert child.model_names == NAMES
    assert child.bases is not None
    assert child.bases.nbytes == 3 * child.model.resident.nbytes
    assert "base models in host memory: plain, velocity, other" in caplog.text
    run_job(child, "job", a_request(model="other"))
    assert "changed to the base model other in 0." in caplog.text
