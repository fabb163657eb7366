"""Jobs of every kind in any order: none changes the base model, nor the image of a later job."""

import hashlib
import shutil
import signal
import traceback
from collections.abc import Iterator
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
    load_pipeline,
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
TIME_LIMITS = (0.002, 0.01, 0.03, 0.08)  # seconds: in the merge, while drawing, or after the end


class Cancelled(Exception):
    """Raised by the progress callback of a job."""


class TimeLimit(Exception):
    """Raised by a signal between any two instructions, as Celery's soft time limit is."""


BAD: dict[str, type[Exception]] = {
    "mismatched": LoraMismatch,
    "cancelled": Cancelled,
    "unstored": StoreFailed,
}


class Jobs:
    """Child of a worker without a broker, which runs jobs of each kind."""

    def __init__(self, home: Path, folder: Path, place: dict[str, str]) -> None:
        self.model: Pipeline = load_pipeline(home, **place)
        self._folder = folder
        self._settings = settings(home, **lora_cache(folder / "cache"))
        self._cache = Cache.open(self._settings)
        self._parsed = LoraMemoryCache(max_bytes=200_000)  # about one file: some are read again
        first = self._put("first", kohya_lora((*UNET, *TEXT)))
        second = self._put("second", peft_lora((*UNET, *TEXT)))
        unmatched = {"unet.nowhere.lora_A.weight": next(iter(peft_lora().values()))}
        mismatched = self._put("mismatched", peft_lora() | unmatched)
        self._loras = {
            "none": (),
            "first": (first,),
            "second": (second,),
            "both": (first, second),
            "mismatched": (second, mismatched),
        }
        self.base = self.digest()
        self.images = {kind: self.run(kind) for kind in GOOD}

    def _put(self, name: str, tensors: Tensors) -> LoraSpec:
        file = write(self._folder / name, tensors)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, self._folder / "cache" / "files" / f"{digest}.safetensors")
        return LoraSpec(file=Asset(url=f"https://loras.invalid/{name}", sha256=digest), weight=0.5)

    def digest(self) -> str:
        """Return the SHA-256 of all tensors of the model."""
        found = hashlib.sha256()
        for part in PARTS:
            for tensor in weights(self.model, part).values():
                found.update(tensor.cpu().numpy().tobytes())
        return found.hexdigest()

    def run(self, kind: str) -> str:
        """Run one job, and return the SHA-256 of its image."""
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
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `TimeLimit` in the block after some seconds of CPU time.

    The signal is not that of pytest's own time limit.
    """
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


# An exception that a signal raises during garbage collection is lost, and the job goes on. A time
# limit of a worker can be lost in the same way.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@hypothesis_settings(max_examples=3, deadline=None, derandomize=True)
@given(order=st.permutations([*GOOD, *BAD, *TIME_LIMITS]))
def test_jobs_in_any_order_leave_the_base_model_unchanged(
    jobs: Jobs, order: list[str | float]
) -> None:
    for kind in order:
        if isinstance(kind, float):
            run_with_time_limit(jobs, kind)
        elif kind in BAD:
            with pytest.raises(BAD[kind]):
                jobs.run(kind)
        else:
            assert jobs.run(kind) == jobs.images[kind]

        assert jobs.model.is_ready()
        assert jobs.digest() == jobs.base
    assert jobs.run("both") == jobs.images["both"]


def run_with_time_limit(jobs: Jobs, seconds: float) -> None:
    """Run a job that a time limit may interrupt; libraries replace `TimeLimit` by other errors."""
    raised = None
    try:
        with time_limit(seconds):
            jobs.run("both")
    except Exception as error:  # noqa: BLE001 - any error of any library
        raised = error
    assert raised is None or "TimeLimit" in "".join(traceback.format_exception(raised))
