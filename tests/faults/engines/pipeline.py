"""Replaces `zlora_worker.model.pipeline`: takes orders from the prompt, and draws one colour.

The prompt of such a job is a JSON object: `label` is the name of the job in the journal, `step` the
seconds of a step, and `do` is what happens at step `at`, in words of `faults.engines.misbehaviour`.
`noise` orders an image of noise with that many pixels a side, which no encoder makes small. If
`FAKE_IMAGES` names a folder, the images in it are drawn instead.
"""

import functools
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

from faults.engines import journal
from faults.engines.misbehaviour import misbehave
from PIL import Image
from zlora.base_limits import BaseLimits
from zlora.errors import BaseNotRestored
from zlora.schema import GenerateRequest
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.reader import Reader


class PipelineState(StrEnum):
    """States of the real pipeline."""

    READY = "ready"
    BUSY = "busy"
    DIRTY = "dirty"


class Machine(NamedTuple):
    """Conditions of the real pipeline."""

    device: str
    dtype: str
    threads: int | None
    compile: str = "off"


class EncodedText(NamedTuple):
    """What is known of prompts that no tokenizer has read."""

    prompt_receipt: None = None
    negative_receipt: None = None
    uses: tuple[int, ...] = ()


class MergedModel:
    """The fake pipeline during one job."""

    def __init__(self, pipeline: "Pipeline", relative_norms: list[float]) -> None:
        self.draw = pipeline.draw
        self.relative_norms, self.tiled = relative_norms, False

    def preview(self) -> str:
        """Return a picture without bytes."""
        return "data:image/jpeg;base64,"

    def encode(self, request: GenerateRequest, embeddings: Sequence[Any] = ()) -> EncodedText:
        """Do nothing: the fake reads orders from the prompt."""
        return EncodedText()


class Pipeline:
    """The interface of the real pipeline without a model."""

    def __init__(self, *, name: str, reader: Reader | None = None) -> None:
        self.name, self.state = name, PipelineState.READY
        self.base_checked, self.tiled = 1.0, False
        self.base_sha256, self.file_sha256 = "0" * 64, None
        self.machine = Machine("fake", "float32", 1)
        self.reader = reader or Reader()  # type: ignore[call-arg]  # the fake, see sitecustomize
        self.corrupted = False
        self.family = "SDXL"

    def warm_up(self) -> None:
        """Do nothing: there are no kernels."""

    @contextmanager
    def with_loras(
        self, loras: Sequence[WeightedLora], request: GenerateRequest
    ) -> Iterator[MergedModel]:
        """Lend the pipeline to one job; raise `BaseNotRestored` if the base model is changed."""
        if not self.is_ready():
            raise BaseNotRestored
        self.state = PipelineState.BUSY
        try:
            yield MergedModel(self, [0.5 for _ in loras])
        finally:
            self.state = PipelineState.DIRTY
            self.check()

    def is_ready(self) -> bool:
        """Return whether the base model is unchanged."""
        if self.state is PipelineState.DIRTY and not self.corrupted:
            self.state = PipelineState.READY
        return self.state is PipelineState.READY

    def check(self, seconds: float | None = None) -> None:
        """Become READY, or raise `BaseNotRestored` if a job changed the base model."""
        self.state = PipelineState.DIRTY
        if self.corrupted:
            raise BaseNotRestored("1 tensor of the fake base model is not what was loaded")
        self.state = PipelineState.READY

    def size(self, request: GenerateRequest) -> tuple[int, int]:
        """Return width and height in pixels."""
        return request.width or 64, request.height or 64

    def scheduler_name(self, request: GenerateRequest) -> str:
        """Return a name that diffusers does not have."""
        return "FakeScheduler"

    def require_text(self, request: GenerateRequest, embeddings: Sequence[Any] = ()) -> None:
        """Do nothing: there is no tokenizer."""

    def require_honoured(self, request: GenerateRequest) -> None:
        """Do nothing: all fields are ignored."""

    def with_defaults(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request with the defaults of SDXL."""
        return request.with_defaults()

    def is_guided(self, request: GenerateRequest) -> bool:
        """Return whether SDXL has guidance."""
        return request.guidance > 1

    @property
    def limits(self) -> BaseLimits:
        """Limits of SDXL."""
        return BaseLimits()

    def draw(
        self,
        request: GenerateRequest,
        seeds: Sequence[int],
        on_step: Callable[[int], None],
        *,
        text: EncodedText | None = None,
        start: object = None,
    ) -> list[Image.Image]:
        """Draw an image of each seed, after the steps and the faults that the prompt orders."""
        orders = orders_in(request.prompt)
        label = orders.get("label", "")
        for seed in seeds:
            journal.write("begin", label=label, seed=seed)
        for step in range(1, request.all_steps + 1):
            time.sleep(orders.get("step", 0.01))
            if orders.get("do") and step == orders.get("at", 1):
                misbehave(self, orders)
            on_step(step)
            journal.write("step", label=label, step=step)
        for seed in seeds:
            journal.write("end", label=label, seed=seed)
        if folder := os.environ.get("FAKE_IMAGES"):
            images = images_in(Path(folder))
            return [images[seed % len(images)].copy() for seed in seeds]
        return [image_of(seed, orders.get("noise", 0)) for seed in seeds]


@functools.cache
def images_in(folder: Path) -> list[Image.Image]:
    """Return all images of a folder, by name."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]


def image_of(seed: int, noise: int) -> Image.Image:
    """Return a small square in the colour of the seed, or noise with `noise` pixels a side."""
    if noise:
        pixels = random.Random(seed).randbytes(3 * noise * noise)
        return Image.frombytes("RGB", (noise, noise), pixels)
    red, green, blue, *_ = hashlib.sha256(str(seed).encode()).digest()
    return Image.new("RGB", (64, 64), (red, green, blue))


def orders_in(prompt: str) -> dict[str, Any]:
    """Return the JSON object in a prompt, or no orders."""
    try:
        found = json.loads(prompt)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
