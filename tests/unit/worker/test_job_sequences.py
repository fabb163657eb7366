"""Jobs of every kind in any order: the base is the same to the last bit after each, and a good job draws the same."""

import hashlib
import shutil
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.fakes import (
    PARTS,
    PLACES,
    TEXT,
    UNET,
    MemoryStore,
    Tensors,
    a_request,
    kohya_lora,
    load_engine,
    peft_lora,
    settings,
    weights,
    write,
)
from support.jobs import Watch, lora_cache, make_child, run_job
from zlora.errors import LoraMismatch, StoreFailed
from zlora.schema import Asset, LoraSpec, Phase
from zlora_worker.fetch.cache import Cache
from zlora_worker.lora.memory_cache import LoraMemoryCache
from zlora_worker.model.pipeline import Pipeline

GOOD = ("first", "second", "both", "none")
BAD = ("unfit", "cancelled", "unstored")
TIMES = (
    0.002,
    0.01,
    0.03,
    0.08,
)  # seconds until a time limit strikes: in the merge, while drawing, or never


class Cancelled(Exception):
    """What a watcher raises."""


class TimeLimit(Exception):
    """What a signal raises, between any two instructions, as Celery's soft time limit does."""


class Jobs:
    """A worker's child without its broker."""

    def __init__(self, home: Path, folder: Path, place: dict[str, str]) -> None:
        self.model: Pipeline = load_engine(home, **place)
        self._folder = folder
        self._settings = settings(home, **lora_cache(folder / "cache"))
        self._cache = Cache.open(self._settings)
        self._parsed = LoraMemoryCache(max_bytes=200_000)  # about one file: some are read again
        first, second = (
            self._put("first", kohya_lora((*UNET, *TEXT))),
            self._put("second", peft_lora((*UNET, *TEXT))),
        )
        unfit = self._put(
            "unfit", peft_lora() | {"unet.nowhere.lora_A.weight": next(iter(peft_lora().values()))}
        )
        self._loras = {
            "none": (),
            "first": (first,),
            "second": (second,),
            "both": (first, second),
            "unfit": (second, unfit),
        }
        self.base = self.digest()
        self.pictures = {kind: self.run(kind) for kind in GOOD}

    def _put(self, name: str, tensors: Tensors) -> LoraSpec:
        file = write(self._folder / name, tensors)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, self._folder / "cache" / "files" / f"{digest}.safetensors")
        return LoraSpec(file=Asset(url=f"https://loras.invalid/{name}", sha256=digest), weight=0.5)

    def digest(self) -> str:
        """Of every tensor as it would be drawn with."""
        found = hashlib.sha256()
        for part in PARTS:
            for tensor in weights(self.model, part).values():
                found.update(tensor.cpu().numpy().tobytes())
        return found.hexdigest()

    def run(self, kind: str) -> str:
        """One job; the digest of its picture."""
        store = MemoryStore(0 if kind == "unstored" else 100)
        child = make_child(
            self.model, store, self._settings, lora_files=self._cache, loras=self._parsed
        )
        request = a_request(seed=3, loras=self._loras.get(kind, self._loras["both"]))
        watch: Watch = _cancel if kind == "cancelled" else lambda *_: None
        return run_job(child, "job", request, watch).images[0].sha256


def _cancel(phase: Phase, _step: int, _steps: int) -> None:
    if phase is Phase.DENOISE:
        raise Cancelled


_armed: list[bool] = []


def _strike(*_: object) -> None:
    if _armed:
        _armed.clear()
        raise TimeLimit


@contextmanager
def striking(seconds: float) -> Iterator[None]:
    """A signal after so many seconds of work raises `TimeLimit` here; not the one that pytest's own time limit has."""
    signal.signal(signal.SIGVTALRM, _strike)
    _armed.append(True)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        _armed.clear()
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@pytest.fixture(scope="module", params=PLACES)
def jobs(
    request: pytest.FixtureRequest, model_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Jobs:
    return Jobs(model_home, tmp_path_factory.mktemp("jobs"), request.param)


KINDS = st.sampled_from([*GOOD, *BAD, *TIMES])


# What strikes while Python collects garbage is lost there, and the job goes on: so it is with a worker's time limit.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@hypothesis_settings(max_examples=12, deadline=None, derandomize=True)
@given(order=st.lists(KINDS, min_size=2, max_size=8))
def test_jobs_in_any_order_leave_the_base(jobs: Jobs, order: list[str | float]) -> None:
    errors: dict[str, type[Exception]] = {
        "unfit": LoraMismatch,
        "cancelled": Cancelled,
        "unstored": StoreFailed,
    }
    for kind in order:
        if isinstance(kind, float):
            run: Callable[[], object] = lambda: jobs.run("both")  # noqa: E731 - as a job is run below
            timed_out(run, kind)
        elif kind in errors:
            with pytest.raises(errors[kind]):
                jobs.run(kind)
        else:
            assert jobs.run(kind) == jobs.pictures[kind]

        assert jobs.model.is_ready()
        assert jobs.digest() == jobs.base
    assert jobs.run("both") == jobs.pictures["both"]


def timed_out(run: Callable[[], object], seconds: float) -> None:
    """A job that a time limit may strike; libraries turn what is raised inside of them into errors of their own."""
    raised = None
    try:
        with striking(seconds):
            run()
    except Exception as error:  # noqa: BLE001 - whatever a library makes of it
        raised = error
    assert raised is None or "TimeLimit" in "".join(traceback.format_exception(raised))
