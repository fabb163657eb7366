"""In place of `zlora_worker.model.pipeline`: takes its orders from the prompt, and draws a small picture of one colour.

The prompt of such a job is a JSON object: `label` is its name in the journal, `step` the seconds of a step, and `do`
what happens at step `at`: words of `faults.engines.misbehaviour`. `noise` asks for a picture of so many pixels a side
that no encoding makes small.
"""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any

from faults.engines import journal
from faults.engines.misbehaviour import misbehave
from PIL import Image
from zlora.errors import BaseNotRestored
from zlora.schema import GenerateRequest
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.reader import Reader


class EngineState(StrEnum):
    """As the real one's."""

    READY = "ready"
    LENT = "lent"
    DIRTY = "dirty"


class Patch:
    """Changes nothing."""

    @contextmanager
    def applied(self, adapters: Sequence[WeightedLora]) -> Iterator[list[float]]:
        """One norm a LoRA."""
        yield [0.5 for _ in adapters]


class Engine:
    """The face of the real one, with no model behind it."""

    def __init__(self, *, name: str) -> None:
        self.name, self.state = name, EngineState.READY
        self.base_checked, self.tiled = 1.0, False
        self.base_sha256, self.file_sha256 = "0" * 64, None
        self.machine = ("fake", "float32", 1)
        self.patch, self.reader = Patch(), Reader()  # type: ignore[call-arg]  # the fake's, see `sitecustomize`
        self.spoiled = False

    @contextmanager
    def borrowed(self, request: GenerateRequest | None = None) -> Iterator[None]:
        """For one job; raises `BaseNotRestored` where the job has spoiled the base."""
        if not self.is_sound():
            raise BaseNotRestored
        self.state = EngineState.LENT
        try:
            yield
        finally:
            self.state = EngineState.DIRTY
            self.check()

    def is_sound(self) -> bool:
        """Whether the base is the base."""
        if self.state is EngineState.DIRTY and not self.spoiled:
            self.state = EngineState.READY
        return self.state is EngineState.READY

    def check(self, seconds: float | None = None) -> None:
        """READY, or `BaseNotRestored`."""
        self.state = EngineState.DIRTY
        if self.spoiled:
            raise BaseNotRestored("1 tensor of the fake base is not what was loaded")
        self.state = EngineState.READY

    def size(self, request: GenerateRequest) -> tuple[int, int]:
        """Width and height in pixels."""
        return request.width or 64, request.height or 64

    def scheduler_name(self, request: GenerateRequest) -> str:
        """None of diffusers'."""
        return "FakeScheduler"

    def draw(
        self, request: GenerateRequest, seed: int, on_step: Callable[[int], None]
    ) -> Image.Image:
        """One picture whose colour is the seed's, after the time and the accidents that the prompt orders."""
        told = orders(request.prompt)
        label = told.get("label", "")
        journal.write("begin", label=label, seed=seed)
        for step in range(1, request.num_inference_steps + 1):
            time.sleep(told.get("step", 0.01))
            if told.get("do") and step == told.get("at", 1):
                misbehave(self, told)
            on_step(step)
            journal.write("step", label=label, step=step)
        journal.write("end", label=label, seed=seed)
        return picture(seed, told.get("noise", 0))


def picture(seed: int, noise: int) -> Image.Image:
    """A small square of the seed's colour, or a larger one of the seed's noise."""
    if noise:
        pixels = random.Random(seed).randbytes(3 * noise * noise)
        return Image.frombytes("RGB", (noise, noise), pixels)
    red, green, blue, *_ = hashlib.sha256(str(seed).encode()).digest()
    return Image.new("RGB", (64, 64), (red, green, blue))


def orders(prompt: str) -> dict[str, Any]:
    """The JSON object in a prompt, or no orders."""
    try:
        found = json.loads(prompt)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
