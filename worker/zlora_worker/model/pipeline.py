"""Lend the base model to one job at a time: merge its LoRAs, draw, restore and check."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import StrEnum
from typing import Any, Final, NamedTuple
from weakref import WeakSet

import torch
from PIL import Image
from torch._dynamo.exc import TorchDynamoException
from zlora.base_limits import BaseLimits, require_honoured
from zlora.errors import BaseNotRestored, GenerationFailed, ModelUnavailable, OutOfMemory
from zlora.schema import GenerateRequest, invalid

from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.patch import Patch, choose_mode
from zlora_worker.lora.reader import Reader
from zlora_worker.model.base import BaseModel
from zlora_worker.model.chat_prompt import encode_chat, read_chat
from zlora_worker.model.compiled_blocks import compile_blocks
from zlora_worker.model.denoising import Denoising
from zlora_worker.model.digests import BaseDigest
from zlora_worker.model.embedding_file import EmbeddingReader
from zlora_worker.model.family import Family
from zlora_worker.model.out_of_memory import free_tensors, is_out_of_memory, out_of_memory
from zlora_worker.model.preview import Previews
from zlora_worker.model.schedulers import scheduler_name
from zlora_worker.model.starting_image import StartingImage
from zlora_worker.model.text_encoding import Embedding, EncodedText, encode, read_prompts
from zlora_worker.model.vae import Vae
from zlora_worker.monitoring.logs import said_by
from zlora_worker.signals import run_to_completion

_LONG_PROMPT: Final = "a " * 64
_CHECK_SHARE: Final = 0.01  # of a job's time, for the check of the base after it


class PipelineState(StrEnum):
    """READY: the base was compared. BUSY: lent to a job. DIRTY: to be compared after a job."""

    READY = "ready"
    BUSY = "busy"
    DIRTY = "dirty"


class Machine(NamedTuple):
    """Conditions that change the last bits of an image; `threads` is None on a GPU."""

    device: str
    dtype: str
    threads: int | None
    compile: str


class Pipeline:
    """One pipeline on one device, with the weights, the patch and the checksum of its base."""

    def __init__(
        self,
        pipeline: Any,
        *,
        family: Family,
        name: str,
        device: torch.device,
        patch_mode: str = "auto",
        compile_mode: str = "off",
        check_all: bool = False,
        known: BaseDigest | None = None,
    ) -> None:
        """Move diffusers' pipeline to the device.

        With `check_all` the whole base is compared after each job. `known` is the digest of a base
        that was loaded before: if this one has the same checksum, it is not computed again. What
        `compile_mode` names is compiled when it first runs, see `warm_up`.
        """
        self.device, self.state = device, PipelineState.READY
        self._family = family
        # `resident` owns the modules; `base` is the model whose weights are in them now.
        self.resident = BaseModel(pipeline, family=family, name=name, device=device, known=known)
        self.base = self.resident
        self._next_base: BaseModel | None = None  # while its bytes are copied
        self._compared: WeakSet[BaseModel] = WeakSet([self.resident])  # in full, after a copy
        self.weights = self.resident.weights
        self.pipeline = pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self._denoiser = getattr(pipeline, family.denoiser)
        self.reader = Reader(self.weights, family=family.name)
        self.embedding_reader = EmbeddingReader(pipeline, family)
        if compile_mode == "graphs":
            patch_mode = "inplace"
        self.patch = Patch(self.weights, mode=choose_mode(self.weights, patch_mode))
        self._compile_mode = compile_mode
        if compile_mode != "off":
            compile_blocks(self._denoiser, with_graphs=compile_mode == "graphs")
        self.previews = Previews(pipeline, family)
        self.base_checked = 1.0  # share of the base's bytes that the last check compared
        self._check_all = check_all
        self._checksum = self.resident.checksum
        self.vae = Vae(pipeline, native_side=family.side_of(pipeline))
        self.denoising = Denoising(
            pipeline, family, patch=self.patch, previews=self.previews, vae=self.vae
        )

    def warm_up(self) -> None:
        """Do now what would make the first job slower than the next ones.

        A GPU loads and chooses its kernels when they are first used, by the size of the image. On a
        CPU the first use costs milliseconds, and an image seconds. What is compiled is compiled at
        its first use, with guidance and without, for all sizes. Raises `ModelUnavailable` if that
        fails.
        """
        self.patch.warm_up()
        family, drawn = self._family, list[tuple[str, float]]()  # prompts and guidance scales
        if self._compile_mode != "off":
            drawn += [("a", family.no_guidance + 1), ("a", family.no_guidance)]
            if family.chat_tokens is not None:  # of another length than the negative one: masked
                drawn.append((_LONG_PROMPT, family.no_guidance + 1))
        elif self.device.type == "cuda":
            drawn.append(("a", family.guidance_scale))
        # A CUDA graph is run, recorded and replayed.
        steps = 3 if self._compile_mode == "graphs" else 1
        for prompt, scale in drawn:
            request = GenerateRequest(
                prompt=prompt, num_inference_steps=steps, guidance_scale=scale
            )
            # What fails here fails in a job, too, which then says so.
            with suppress(GenerationFailed, OutOfMemory), self.with_loras([], request) as model:
                try:
                    model.draw(request, [0], lambda _step: None)
                except TorchDynamoException as error:
                    raise ModelUnavailable(
                        f"ZLORA_COMPILE={self._compile_mode}: PyTorch cannot compile the "
                        f"{self._family.denoiser}: {said_by(error)}"
                    ) from error

    @contextmanager
    def with_loras(
        self, loras: Sequence[WeightedLora], request: GenerateRequest | None = None
    ) -> Iterator["MergedModel"]:
        """Lend the pipeline to one job with its LoRAs merged; restore and check the base after it.

        Raises `LoraMismatch` if a LoRA changes nothing or is not finite, `OutOfMemory` if anything
        inside the block runs out of memory, with the size of `request` in its details, and
        `BaseNotRestored` if the base is not what was loaded, before the job or after it.
        """
        with self.exclusive(request), self.patch.applied(loras) as norms:
            yield MergedModel(self, norms)

    @contextmanager
    def exclusive(self, request: GenerateRequest | None = None) -> Iterator[Any]:
        """Lend diffusers' pipeline to one job; the errors are those of `with_loras`."""
        if not self.is_ready():
            raise BaseNotRestored
        start = time.monotonic()
        try:
            self.state = PipelineState.BUSY
            yield self.pipeline
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            free_tensors(error)  # first: the check below needs memory too
            raise out_of_memory(error, self.size(request) if request else None) from error
        finally:
            self.state = PipelineState.DIRTY
            self._restore()
            self.check(None if self._check_all else _CHECK_SHARE * (time.monotonic() - start))

    def is_ready(self) -> bool:
        """Return True if the pipeline can be lent.

        Repeats restore and check if a signal interrupted them after the last job, and the copy of
        another base if a signal interrupted that.
        """
        if self.state is PipelineState.DIRTY:
            with suppress(BaseNotRestored):
                self._restore()
                self._copy_next()
                self.check()
        return self.state is PipelineState.READY

    def change_to(self, base: BaseModel) -> None:
        """Copy another base of the same layout over the resident one, and draw with it from now on.

        `base` is in host memory. It is compared with its own checksum before it draws for the first
        time, and like any base after each job. Raises `BaseNotRestored` if the bytes are not those
        of `base`. If a signal interrupts this method, the copy is completed first, or by
        `is_ready`: a base of which a part is copied never draws.
        """
        if not self.is_ready():
            raise BaseNotRestored
        self.state = PipelineState.DIRTY
        self._next_base = base
        self._copy_next()
        if self._check_all or base not in self._compared:
            self.check()
            self._compared.add(base)
        self.state = PipelineState.READY

    def _copy_next(self) -> None:
        """Copy the bytes of `_next_base`, if it is set, and take over its facts."""
        try:
            run_to_completion(self._copy_and_take_over)
        except RuntimeError as error:  # of the device
            raise BaseNotRestored(f"the base cannot be changed: {said_by(error)}") from error

    def _copy_and_take_over(self) -> None:
        if (base := self._next_base) is None:
            return
        self.patch.change_base(base.weights)
        self.resident.copy_from(base)
        self.resident.set_attributes(self.base, base)
        self._checksum.expect(base.checksum)
        for stack, other in zip(self.weights.stacks, base.weights.stacks, strict=True):
            stack.squared_norms = other.squared_norms
        if base.options != self.base.options:
            self.pipeline.register_to_config(**base.options)
        self.denoising.base_scheduler = base.scheduler
        # Past diffusers' own setter, which looks up the library of each class again.
        vars(self.pipeline).update(base.tokenizers, scheduler=base.scheduler)
        self.embedding_reader = EmbeddingReader(self.pipeline, self._family)
        self.previews.change_base()
        self.vae.set_tiles(self._family.side_of(self.pipeline))
        self.base = base
        self._next_base = None  # last: until then all of this is repeated

    def _restore(self) -> None:
        """Restore everything that a job can leave changed if a signal interrupts it."""
        self.patch.restore()
        self.vae.restore()

    def check(self, seconds: float | None = None) -> None:
        """Compare the base with its checksum: all of it, or as much as `seconds` allow.

        The state is READY afterwards. Raises `BaseNotRestored`, with the state DIRTY, if a tensor
        differs or cannot be compared.
        """
        self.state = PipelineState.DIRTY
        try:
            changed, self.base_checked = self._checksum.check(seconds)
        except (RuntimeError, MemoryError) as error:  # of the device
            raise BaseNotRestored(f"the base cannot be compared: {said_by(error)}") from error
        if changed:
            raise BaseNotRestored(
                f"{len(changed)} tensors of the base are not what was loaded, such as {changed[0]}"
            )
        self.state = PipelineState.READY

    def with_defaults(self, request: GenerateRequest) -> GenerateRequest:
        """Return the request with the steps and the guidance scale of this family written out."""
        return request.with_defaults(
            steps=self._family.steps, guidance_scale=self._family.guidance_scale
        )

    def is_guided(self, request: GenerateRequest) -> bool:
        """Return whether the guidance scale of a request has an effect, so far as it is known."""
        return self._family.is_guided(self.with_defaults(request))

    def require_honoured(self, request: GenerateRequest) -> None:
        """Raise `InvalidRequest` for a field that this base model cannot honour.

        A name in `blocks` that the UNet lacks is refused too; `scheduler_name` checks schedulers.
        """
        require_honoured(self.with_defaults(request), self._family.limits, base=self.family)
        for index, spec in enumerate(request.loras):
            if unknown := self.weights.unet_blocks.unknown(spec.blocks or ()):
                expected = f"Expected blocks of the base model, not {', '.join(unknown)}"
                raise invalid(f"$.loras[{index}].blocks", spec.blocks, expected)

    def size(self, request: GenerateRequest) -> tuple[int, int]:
        """Width and height in pixels; the default is the model's native size."""
        return self.denoising.size(request)

    @property
    def tiled(self) -> bool:
        """True if the last images were decoded in tiles, which differ slightly."""
        return self.vae.tiled

    @property
    def limits(self) -> BaseLimits:
        """What requests cannot have with this base model."""
        return self._family.limits

    @property
    def name(self) -> str:
        """Name of the base model, as results have it."""
        return self.base.name

    @property
    def base_sha256(self) -> str:
        """Sha256 of the weights in memory."""
        return self.base.base_sha256

    @property
    def file_sha256(self) -> str | None:
        """Sha256 of the single file that the base was loaded from, if any, without a VAE beside."""
        return self.base.file_sha256

    @property
    def family(self) -> str:
        """Name of the base model's family, such as `SDXL`."""
        return self._family.name

    @property
    def machine(self) -> Machine:
        """Conditions under which this pipeline draws at present."""
        dtype = str(self.denoising.dtype).removeprefix("torch.")
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
            return Machine(name, dtype, None, self._compile_mode)
        name = f"cpu {torch.backends.cpu.get_cpu_capability()}"
        return Machine(name, dtype, torch.get_num_threads(), self._compile_mode)

    def scheduler_name(self, request: GenerateRequest) -> str:
        """Name of the request's scheduler, as results have it.

        Raises `InvalidRequest` if this model cannot draw with it.
        """
        family = self._family
        return scheduler_name(
            self.base.scheduler, request, only=family.schedulers, noising=family.noising
        )

    def require_text(self, request: GenerateRequest, embeddings: Sequence[Embedding] = ()) -> None:
        """Raise `InvalidRequest` if the prompts of a request cannot be encoded."""
        request = self.with_defaults(request)
        if self._family.chat_tokens is not None:
            read_chat(self.pipeline, self._family, request)
        else:
            read_prompts(self.pipeline, self._family, request, embeddings)

    def encode(self, request: GenerateRequest, embeddings: Sequence[Embedding] = ()) -> EncodedText:
        """Encode the prompts of a request; see `text_encoding.encode` and `chat_prompt`."""
        request = self.with_defaults(request)
        if self._family.chat_tokens is not None:
            return encode_chat(self.pipeline, self._family, request)
        return encode(self.pipeline, self._family, request, embeddings)

    def draw(
        self,
        request: GenerateRequest,
        seeds: Sequence[int],
        on_step: Callable[[int], None],
        *,
        text: EncodedText | None = None,
        start: StartingImage | None = None,
    ) -> list[Image.Image]:
        """Draw an RGB image of each seed, all in the same forward passes.

        `on_step` receives the number of each finished step, from 1. The last bits of the pixels
        depend on the number of seeds.

        With `start` the images are drawn from that one, by as many steps as `strength` leaves. With
        `upscale` in the request a second pass starts from each enlarged image.

        `text` is what `encode` returned for this request, by default the prompts without
        embeddings. `tiled` says afterwards how the images were decoded. Raises `GenerationFailed`
        if an image contains NaN or Inf, `InvalidRequest` if the model cannot draw with the
        scheduler or honour another field, and `OutOfMemory` if memory does not suffice for several
        images at once.
        """
        self.require_honoured(request)
        request = self.with_defaults(request)
        self.vae.tiled = False
        text = text or self.encode(request)
        return self.denoising.draw(request, seeds, on_step, text=text, start=start)


class MergedModel:
    """Methods of a pipeline with LoRAs merged, inside a block of `Pipeline.with_loras`."""

    def __init__(self, pipeline: Pipeline, relative_norms: list[float]) -> None:
        self.relative_norms: Final = relative_norms  # |delta| / |W| of each LoRA, in their order
        self.encode, self.draw = pipeline.encode, pipeline.draw
        self.preview = pipeline.previews.latest
        self._pipeline = pipeline

    @property
    def tiled(self) -> bool:
        """True if the last images were decoded in tiles."""
        return self._pipeline.tiled
