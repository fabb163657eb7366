"""Replaces `zlora_worker.model.pipeline`: sleeps instead of denoising, and does all else.

LoRA files are parsed into memory as for a real model, since SDXL's weights have their true names
and shapes. They are on PyTorch's meta device, so that a merge has all its steps and no arithmetic,
as on a GPU that does not have to be awaited. The check of the base model is left out. A product
takes the time of a launch: on the meta device it is 0.1 ms of torch's Python code.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from benchmarks import models
from faults.engines import journal, pipeline
from faults.engines.pipeline import EncodedText, Machine, MergedModel, PipelineState, orders_in
from PIL import Image
from zlora.schema import GenerateRequest
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.patch import Patch
from zlora_worker.lora.reader import Reader
from zlora_worker.lora.weights import Weights

__all__ = ["Machine", "MergedModel", "Pipeline", "PipelineState"]
ADAPTED: Final = ("unet", "text_encoder", "text_encoder_2")


class Pipeline(pipeline.Pipeline):
    """The fake pipeline with the real reader and the real patch."""

    def __init__(self, *, name: str) -> None:
        components = models.without_numbers(thin=False)
        weights = Weights({name: components[name] for name in ADAPTED})
        for stack in weights.stacks:  # weights without numbers have no norms
            stack.squared_norms.update(dict.fromkeys(range(len(stack.names)), 1.0))
        super().__init__(name=name, reader=Reader(weights))
        self.patch = Patch(weights, mode="shadow")
        one = torch.ones(1, 1, 1)

        def launched(total: torch.Tensor, *_: torch.Tensor, alpha: float) -> torch.Tensor:
            torch.baddbmm(one, one, one, alpha=alpha)
            return total

        torch.Tensor.baddbmm_ = launched  # type: ignore[method-assign, assignment]

    @contextmanager
    def with_loras(
        self, loras: Sequence[WeightedLora], request: GenerateRequest
    ) -> Iterator[MergedModel]:
        """Merge the LoRAs, lend the pipeline, and restore the base model."""
        label = orders_in(request.prompt).get("label", "")
        journal.write("merge", label=label)
        with super().with_loras(loras, request) as model, self.patch.applied(loras) as norms:
            journal.write("merged", label=label)
            model.relative_norms = norms
            yield model
        journal.write("restored", label=label)

    def draw(
        self,
        request: GenerateRequest,
        seeds: Sequence[int],
        on_step: Callable[[int], None],
        *,
        text: EncodedText | None = None,
        start: object = None,
    ) -> list[Image.Image]:
        """Sleep until each step would be done, and return given images if their size is right.

        A GPU goes on while `on_step` runs, so the time of `on_step` is not added to the steps.
        """
        orders: dict[str, Any] = orders_in(request.prompt)
        label = orders.get("label", "")
        for seed in seeds:
            journal.write("begin", label=label, seed=seed)
        began = time.monotonic()
        for step in range(1, request.steps + 1):
            time.sleep(max(0.0, began + step * orders["step"] - time.monotonic()))
            on_step(step)
        for seed in seeds:
            journal.write("end", label=label, seed=seed)
        images = pipeline.images_in(Path(os.environ["FAKE_IMAGES"]))
        found = [(seed, images[seed % len(images)]) for seed in seeds]
        size = self.size(request)
        return [
            image if image.size == size else pipeline.image_of(seed, 0) for seed, image in found
        ]
