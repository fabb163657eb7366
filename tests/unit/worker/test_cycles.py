"""Jobs of every kind in any order: none changes the base model, nor the image of a later job.

`make cycles` runs a thousand jobs for each family, half of them in each mode of the patch, and
`make test` two dozen.
"""

import dataclasses
import os
import random
import traceback
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from support import figures
from support.fakes import PLACES, MemoryStore, Tensors, a_request, load_pipeline, settings
from support.interruption import Cancelled, cancel, time_limit
from support.jobs import lora_cache, make_child, put_in_cache, run_job
from support.lora_matrix import files_of_all_kinds
from support.tiny_folder import tiny_of
from zlora.errors import LoraMismatch, OutOfMemory, StoreFailed
from zlora.lora.base_model import SD1, SDXL, Z_IMAGE
from zlora.schema import LoraSpec
from zlora_worker.model.pipeline import Pipeline

CYCLES: Final = int(os.environ.get("ZLORA_CYCLES", "12"))  # of each family and mode
LONGEST: Final = 0.1  # seconds of CPU time after which a signal comes: a job takes about as much
FAILURES: Final[dict[str, type[Exception]]] = {
    "mismatched": LoraMismatch,  # before the merge
    "endless": LoraMismatch,  # in the merge
    "full": OutOfMemory,  # in the first step
    "cancelled": Cancelled,  # after the first step
    "unstored": StoreFailed,  # after the restore
}
ENDS: Final = ("struck", "drawn", "struck", *FAILURES)


class Jobs:
    """Child of a worker without a broker, which runs jobs with LoRAs of all kinds."""

    def __init__(self, home: Path, folder: Path, variables: dict[str, str]) -> None:
        self.model: Pipeline = load_pipeline(home, **variables)
        # About a file: some LoRAs are read again.
        self._child = make_child(
            self.model,
            MemoryStore(10**9),
            settings(home, **lora_cache(folder / "cache")),
            lora_memory=200_000,
        )
        files = files_of_all_kinds(self.model)
        self.loras = {kind: self._lora(tensors) for kind, tensors in files.items()}
        full = files["full"]
        nowhere = {"lycoris_nowhere.diff": torch.ones(2, 2)}
        endless = {name: torch.full_like(tensor, torch.inf) for name, tensor in full.items()}
        self._bad = {
            "mismatched": self._lora(full | nowhere),
            "endless": self._lora(endless),
        }
        self._pristine = [_bytes(tensor).copy() for tensor in self._tensors()]
        self._count = 0

    def _lora(self, tensors: Tensors) -> LoraSpec:
        return LoraSpec(file=put_in_cache(self._child, tensors), weight=0.5)

    def _tensors(self) -> list[torch.Tensor]:
        pipeline = self.model.pipeline
        parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        return [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]

    def changed_bits(self) -> int:
        """Count the bits of the base model that are not what they were at the start."""
        pairs = zip(map(_bytes, self._tensors()), self._pristine, strict=True)
        return sum(
            int(np.bitwise_count(now ^ before).sum())
            for now, before in pairs
            if not np.array_equal(now, before)
        )

    def run(self, loras: tuple[LoraSpec, ...], end: str = "drawn") -> str | None:
        """Run one job that ends in this way; return the SHA-256 of its pixels."""
        self._count += 1
        child, watch = self._child, cancel if end == "cancelled" else _ignore
        if end == "unstored":
            child = dataclasses.replace(child, store=MemoryStore(0))
        if end in self._bad:
            loras = (*loras, self._bad[end])
        steps = 2 if any(spec.has_schedule for spec in loras) else 1
        request = a_request(
            seed=3, width=64, height=64, guidance_scale=0, num_inference_steps=steps, loras=loras
        )
        with ExitStack() as stack:
            if end == "full":
                denoiser = self.model.weights.components[0]
                hook = getattr(self.model.pipeline, denoiser).register_forward_pre_hook(_is_full)
                stack.callback(hook.remove)
            return run_job(child, f"job-{self._count}", request, watch).images[0].pixels_sha256


def _ignore(*_: object) -> None:
    """Do nothing, as the watch of a job that nobody cancels."""


def _is_full(*_: object) -> None:
    raise MemoryError


def _bytes(tensor: torch.Tensor) -> Any:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()


def some_loras(jobs: Jobs, chance: random.Random) -> tuple[LoraSpec, ...]:
    """Choose up to three LoRAs of any kinds, one of which may change over the steps."""
    specs = chance.sample([*jobs.loras.values()], chance.randrange(4))
    specs = [replace(spec, weight=chance.choice((0.5, -1.0))) for spec in specs]
    if specs and chance.random() < 0.3:
        specs[0] = replace(specs[0], end=0.5, text_encoder_weight=0.0)
    return tuple(specs)


def is_struck(jobs: Jobs, loras: tuple[LoraSpec, ...], seconds: float) -> bool:
    """Run a job that a signal may interrupt; libraries replace `TimeLimit` by other errors."""
    raised = None
    try:
        with time_limit(seconds):
            jobs.run(loras)
    except Exception as error:  # noqa: BLE001 - any error of any library
        raised = error
    assert raised is None or "TimeLimit" in "".join(traceback.format_exception(raised))
    return raised is not None


# An exception that a signal raises during garbage collection is lost, and the job goes on. A time
# limit of a worker can be lost in the same way.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", [SDXL, SD1, Z_IMAGE])
def test_no_job_changes_a_bit_of_the_base_model(
    family: str,
    place: dict[str, str],
    model_home: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Of eight jobs five fail, two are struck by a signal at any moment, and one is drawn."""
    folder = str(tiny_of(model_home, family))
    jobs = Jobs(model_home, tmp_path, {"ZLORA_MODEL": folder} | place)
    chance, failures, signals = random.Random(7), 0, 0
    first: tuple[tuple[LoraSpec, ...], ...] = ((), (jobs.loras["LoRA"],))
    images = {loras: jobs.run(loras) for loras in first}

    for cycle in range(CYCLES):
        loras, end = some_loras(jobs, chance), ENDS[cycle % len(ENDS)]
        if end in FAILURES:
            with pytest.raises(FAILURES[end]):
                jobs.run(loras, end)
            failures += 1
        elif end == "struck":
            signals += is_struck(jobs, loras, chance.uniform(0.0005, LONGEST))
        else:
            image = jobs.run(loras)
            assert images.setdefault(loras, image) == image

        assert jobs.model.is_ready()
        jobs.model.check()
        assert jobs.changed_bits() == 0

    for loras, image in images.items():
        assert jobs.run(loras) == image
    assert signals >= CYCLES // 50
    figures.note(
        tmp_path_factory,
        f"{family}, {place['ZLORA_PATCH']}, {place['ZLORA_DEVICE']}: {CYCLES} cycles, "
        f"{failures} failures, {signals} interrupted by signals, 0 bits changed",
    )
