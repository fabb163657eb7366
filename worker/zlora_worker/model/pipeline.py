"""SDXL, resident: loaded once, lent to one job at a time, and shown to be the same afterwards."""

import math
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import Any, Final, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor
from zlora.errors import BaseNotRestored, GenerationFailed, OutOfMemory
from zlora.schema import GenerateRequest

from zlora_worker.lora.patch import Patch, mode_for
from zlora_worker.lora.reader import Reader
from zlora_worker.lora.weights import Weights
from zlora_worker.model.checksum import WeightChecksum, weights_sha256
from zlora_worker.monitoring.logs import said_by

COMPONENTS: Final = ("unet", "text_encoder", "text_encoder_2", "vae")
ADAPTED: Final = COMPONENTS[:3]  # that LoRAs are made for
_SCHEDULERS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "ddim": ("DDIMScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}

_LCM_STEPS: Final = 50  # that latent consistency models are distilled from
_CHECK_SHARE: Final = 0.01  # of a job's time, that it may cost to show that the base is back
# How torch says it where it has no class for it: the allocator of a CPU, pinned memory, cuBLAS.
_RAN_OUT: Final = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


class PipelineState(StrEnum):
    """READY is shown, by a comparison of the weights; DIRTY is what a model is after a job, until they are compared."""

    READY = "ready"
    LENT = "lent"
    DIRTY = "dirty"


class Machine(NamedTuple):
    """What a picture's last bits depend on beside its request and the weights. `threads` is a CPU's."""

    device: str
    dtype: str
    threads: int | None


class Pipeline:
    """One pipeline on one device: its weights, what changes them, and what shows that they are the same afterwards."""

    def __init__(
        self,
        pipeline: StableDiffusionXLPipeline,
        *,
        name: str,
        device: torch.device,
        patch_mode: str = "auto",
        check_all: bool = False,
        file_sha256: str | None = None,
    ) -> None:
        """Move the pipeline to the device, for good. `check_all` checks the whole base after each job.

        `file_sha256` is of the single file that the weights are from, where they are.
        """
        self.name, self.device, self.state = name, device, PipelineState.READY
        components = {component: getattr(pipeline, component) for component in COMPONENTS}
        self.base_sha256, self.file_sha256 = weights_sha256(components), file_sha256
        self.pipeline = pipeline.to(device)
        self.pipeline.set_progress_bar_config(disable=True)
        for module in components.values():
            module.requires_grad_(False)  # once: it changes the last bit of a picture
        self.weights = weights = Weights(
            {component: components[component] for component in ADAPTED}
        )
        if device.type == "cpu":
            _take_from_files(components.values(), weights)
        self.reader = Reader(weights)
        self.patch = Patch(weights, mode=mode_for(weights, patch_mode))
        self.base_checked = 1.0  # share of the base that was read after the last job
        self.tiled = False  # whether the last picture was decoded in tiles, which is not quite what it is as a whole
        self._check_all = check_all
        self._scheduler = pipeline.scheduler
        self._vae_dtype = pipeline.vae.dtype
        self._fingerprint = WeightChecksum(components, weights)
        self._decode_whole = pipeline.vae.decode
        pipeline.vae.decode = self._decode
        # Half of the native size: with tiles of its own size, which a VAE has, a native picture is one tile.
        pipeline.vae.tile_latent_min_size = tile = pipeline.default_sample_size // 2
        pipeline.vae.tile_sample_min_size = tile * pipeline.vae_scale_factor

    @contextmanager
    def borrowed(
        self, request: GenerateRequest | None = None
    ) -> Iterator[StableDiffusionXLPipeline]:
        """The pipeline for one job; raises `BaseNotRestored` where a weight or a module differs before it or after.

        Whatever of the job runs out of memory is raised as `OutOfMemory`, with the size that `request` has.
        """
        if not self.is_sound():
            raise BaseNotRestored
        start = time.monotonic()
        try:
            self.state = PipelineState.LENT
            yield self.pipeline
        except (RuntimeError, MemoryError) as error:
            if not _ran_out(error):
                raise
            self._free(error)  # first: the comparison below needs memory too
            raise self._out_of_memory(request, error) from error
        finally:
            self.state = PipelineState.DIRTY
            self._put_back()
            self.check(None if self._check_all else _CHECK_SHARE * (time.monotonic() - start))

    def is_sound(self) -> bool:
        """Whether it is READY, or can be shown to be: a signal may have cut short what follows a job."""
        if self.state is PipelineState.DIRTY:
            with suppress(BaseNotRestored):
                self._put_back()
                self.check()
        return self.state is PipelineState.READY

    def _put_back(self) -> None:
        """What a signal can have left between a merge or a picture and the block that undoes it."""
        self.patch.restore()
        self.pipeline.vae.disable_tiling()
        if (
            self.pipeline.vae.dtype is not self._vae_dtype
        ):  # a picture that fails in mid-decode leaves it in fp32
            self.pipeline.vae.to(self._vae_dtype)

    def check(self, seconds: float | None = None) -> None:
        """Compare the base with what was loaded, all of it or as much as so many seconds allow.

        READY where nothing differs; raises `BaseNotRestored`, and is DIRTY, where anything does or cannot be compared.
        """
        self.state = PipelineState.DIRTY
        try:
            changed, self.base_checked = self._fingerprint.check(seconds)
        except (RuntimeError, MemoryError) as error:  # of the device
            raise BaseNotRestored(f"the base cannot be compared: {said_by(error)}") from error
        if changed:
            raise BaseNotRestored(
                f"{len(changed)} tensors of the base are not what was loaded, such as {changed[0]}"
            )
        self.state = PipelineState.READY

    def size(self, request: GenerateRequest) -> tuple[int, int]:
        """Width and height in pixels: what is absent is the model's native size."""
        native = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return request.width or native, request.height or native

    @property
    def machine(self) -> Machine:
        """Where this engine draws now."""
        dtype = str(self.pipeline.unet.dtype).removeprefix("torch.")
        if self.device.type == "cuda":
            return Machine(torch.cuda.get_device_name(self.device), dtype, None)
        return Machine(
            f"cpu {torch.backends.cpu.get_cpu_capability()}", dtype, torch.get_num_threads()
        )

    def scheduler_name(self, request: GenerateRequest) -> str:
        """The scheduler that draws a request: diffusers' name, and whether its noise levels are Karras'."""
        scheduler = self._fresh_scheduler(request)
        return f"{type(scheduler).__name__}{' karras' if scheduler.config.get('use_karras_sigmas') else ''}"

    def draw(
        self, request: GenerateRequest, seed: int, on_step: Callable[[int], None]
    ) -> Image.Image:
        """One RGB image; `on_step` hears each finished denoising step, from 1.

        Raises `GenerationFailed` where the picture has NaN or Inf. `tiled` tells how it was decoded.
        """
        self.tiled = False
        width, height = self.size(request)
        generator = torch.Generator("cpu").manual_seed(seed)
        self.pipeline.scheduler = self._fresh_scheduler(request)

        def step_end(
            pipeline: Any, call: int, _timestep: object, tensors: dict[str, Tensor]
        ) -> dict[str, Tensor]:
            # A second-order scheduler calls the model about twice a step.
            on_step(math.ceil((call + 1) * request.num_inference_steps / pipeline.num_timesteps))
            return tensors

        with self._decoded_finite() as all_finite:
            output = self.pipeline(
                prompt=request.prompt,
                negative_prompt=request.negative_prompt
                or None,  # none is zeros to SDXL, an empty one is not
                num_inference_steps=request.num_inference_steps,
                guidance_scale=request.guidance_scale,
                width=width,
                height=height,
                latents=self._noise(width, height, generator),
                generator=generator,
                callback_on_step_end=step_end,
                output_type="pt",
            )
        if not all_finite():
            raise GenerationFailed(
                "the picture has NaN or Inf values: a LoRA's weight is too strong, or the VAE overflows"
            )
        return _to_image(output.images[0])

    def _decode(self, latents: Tensor, **options: Any) -> Any:
        """The VAE's `decode`, as the pipeline calls it: whole, and in tiles where that runs out of memory.

        From the same latents: nothing is denoised again, and the pipeline's own casts hold for both ways.
        """
        try:
            return self._decode_whole(latents, **options)
        except (RuntimeError, MemoryError) as error:
            if not _ran_out(error):
                raise
            self._free(error)
        self.tiled = True
        try:
            self.pipeline.vae.enable_tiling()
            return self._decode_whole(latents, **options)
        finally:
            self.pipeline.vae.disable_tiling()

    def _free(self, error: BaseException) -> None:
        """Let go of what ran out of memory: an error's traceback keeps its frames, and they their tensors."""
        traceback.clear_frames(error.__traceback__)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _out_of_memory(self, request: GenerateRequest | None, error: BaseException) -> OutOfMemory:
        width, height = self.size(request) if request else (None, None)
        size = f" at {width} x {height} pixels" if request else ""
        text = f"the job needs more memory than this worker has{size}: {type(error).__name__}: {said_by(error)}"
        return OutOfMemory(text, {"width": width, "height": height})

    @contextmanager
    def _decoded_finite(self) -> Iterator[Callable[[], bool]]:
        """Yields whether what the VAE decodes inside, whole or each tile, is finite: a clamp would turn Inf into white.

        Only looks, since the pipeline casts the VAE back after it has decoded.
        """
        seen: list[Tensor] = []
        hook = self.pipeline.vae.decoder.register_forward_hook(
            lambda *call: seen.append(torch.isfinite(call[-1]).all())
        )
        try:
            yield lambda: all(map(bool, seen))
        finally:
            hook.remove()

    def _noise(self, width: int, height: int, generator: torch.Generator) -> Tensor:
        """Initial latents, drawn in fp32 on the CPU whatever the device: a seed means the same noise anywhere."""
        factor = self.pipeline.vae_scale_factor
        shape = (1, self.pipeline.unet.config.in_channels, height // factor, width // factor)
        noise = torch.randn(shape, generator=generator, dtype=torch.float32)
        return noise.to(self.device, self.pipeline.unet.dtype)

    def _fresh_scheduler(self, request: GenerateRequest) -> Any:
        """A scheduler that no other job has stepped."""
        config = self._scheduler.config
        if request.scheduler is None:
            return type(self._scheduler).from_config(config)
        kind, options = _SCHEDULERS[request.scheduler]
        if request.scheduler == "lcm":  # it picks its steps among so many
            options = {"original_inference_steps": max(_LCM_STEPS, request.num_inference_steps)}
        return getattr(diffusers, kind).from_config(config, **options)


def _ran_out(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        words in str(error) for words in _RAN_OUT
    )


def _take_from_files(components: Iterable[torch.nn.Module], weights: Weights) -> None:
    """Copy tensors that lie in a mapped file, and that no stack holds.

    The file may change under a worker; and where in it a weight lies changes the last bit of a picture, since kernels
    differ by alignment.
    """
    stacked = {id(parameter) for stack in weights.stacks for parameter in stack.parameters}
    for module in components:
        for tensor in (*module.parameters(), *module.buffers()):
            if id(tensor) not in stacked:
                tensor.data = tensor.data.clone()


def _to_image(pixels: Tensor) -> Image.Image:
    """From [3, height, width] in 0..1."""
    array = (pixels.float().permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)
    return Image.fromarray(array)
