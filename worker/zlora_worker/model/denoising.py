"""From a request and its encoded prompts to pixels, by diffusers' pipelines."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from zlora.errors import GenerationFailed
from zlora.schema import GenerateRequest

from zlora_worker.lora.patch import Patch
from zlora_worker.model.family import Family
from zlora_worker.model.out_of_memory import free_tensors, is_out_of_memory, out_of_memory
from zlora_worker.model.preview import Previews
from zlora_worker.model.schedulers import scheduler_for
from zlora_worker.model.starting_image import StartingImage
from zlora_worker.model.text_encoding import EncodedText
from zlora_worker.model.vae import Vae, to_images


class Denoising:
    """Draws with the weights that the components of one pipeline have at the time."""

    def __init__(
        self, pipeline: Any, family: Family, *, patch: Patch, previews: Previews, vae: Vae
    ) -> None:
        """Take diffusers' pipeline with the scheduler that the base model came with."""
        self.base_scheduler = pipeline.scheduler  # each request has its own, made from this one
        self._pipeline, self._family = pipeline, family
        self._patch, self._previews, self._vae = patch, previews, vae
        denoiser = getattr(pipeline, family.denoiser)
        self._channels: int = denoiser.config.in_channels
        # Looked up once: diffusers walks all modules for each of them.
        self._device, self.dtype = denoiser.device, denoiser.dtype

    def draw(
        self,
        request: GenerateRequest,
        seeds: Sequence[int],
        on_step: Callable[[int], None],
        *,
        text: EncodedText,
        start: StartingImage | None,
    ) -> list[Image.Image]:
        """Draw an image of each seed, see `Pipeline.draw`, of a request with all defaults."""
        second, upscale = request.second_pass, request.upscale
        if second is None or upscale is None:
            return to_images(self._pass(request, seeds, on_step, text=text, start=start))
        width, height = upscale.size(*self.size(request), step=self._family.limits.side_step)
        enlarged: Any
        if upscale.mode == "latent":
            latents = self._pass(
                request, seeds, on_step, text=text, start=start, output_type="latent"
            )
            factor = self._pipeline.vae_scale_factor
            size = (height // factor, width // factor)
            enlarged = interpolate(latents.float(), size, mode="bilinear").to(latents.dtype)
        else:
            with self._vae.untiled():  # `zlora replay` turns on tiles for the last decode
                made = to_images(self._pass(request, seeds, on_step, text=text, start=start))
            enlarged = [image.resize((width, height), Image.Resampling.LANCZOS) for image in made]
        first_steps = request.drawn_steps
        return to_images(
            self._pass(
                second,
                seeds,
                lambda step: on_step(first_steps + step),
                text=text,
                enlarged=enlarged,
            )
        )

    def size(self, request: GenerateRequest) -> tuple[int, int]:
        """Width and height in pixels; the default is the model's native size."""
        side = self._family.side_of(self._pipeline)
        return request.width or side, request.height or side

    def _pass(
        self,
        request: GenerateRequest,
        seeds: Sequence[int],
        on_step: Callable[[int], None],
        *,
        text: EncodedText,
        start: StartingImage | None = None,
        enlarged: Any = None,
        output_type: str = "pt",
    ) -> Any:
        """Draw the images of one pass, or with the output type `latent` their latents.

        `enlarged` has the images or the latents that the second pass starts from.
        """
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        seed = seeds[0] if len(seeds) == 1 else list(seeds)
        family = self._family
        self._pipeline.scheduler = scheduler_for(
            self.base_scheduler, request, seed=seed, only=family.schedulers, noising=family.noising
        )
        drawing, options = self._pipeline_for(request, start, generators, enlarged)
        options |= _text_options(text, is_list=family.chat_tokens is not None)
        # Not all of diffusers' pipelines have these arguments; a scheduler that takes none of them
        # has refused the request.
        if request.timesteps:
            options["timesteps"] = list(request.timesteps)
        if request.sigmas:
            options["sigmas"] = list(request.noise_levels)
        if request.eta:
            options["eta"] = request.eta

        def step_end(
            pipeline: Any, call: int, _timestep: object, tensors: dict[str, Tensor]
        ) -> dict[str, Tensor]:
            # A second-order scheduler calls the model about twice for each step.
            calls, steps = pipeline.num_timesteps, request.drawn_steps
            on_step(math.ceil((call + 1) * steps / calls))
            if call + 1 < calls:  # the calls of one step have the same weights
                self._patch.move_to((call + 1) * steps // calls / steps)
            return tensors

        hooks = [self._previews.watch(drawing)] if request.previews else []
        # Test what the VAE decodes, whole or tile by tile, before a clamp turns Inf into white. A
        # hook, because the pipeline casts the VAE back after it has decoded.
        finite: list[Tensor] = []
        hooks.append(
            self._pipeline.vae.decoder.register_forward_hook(
                lambda *call: finite.append(torch.isfinite(call[-1]).all())
            )
        )
        try:
            self._patch.move_to(0.0)
            output = drawing(
                num_inference_steps=request.steps,
                guidance_scale=request.guidance,
                num_images_per_prompt=len(seeds),
                generator=generators,
                callback_on_step_end=step_end,
                output_type=output_type,
                **options,
            )
        except (RuntimeError, MemoryError) as error:
            if len(seeds) == 1 or not is_out_of_memory(error):
                raise
            free_tensors(error)
            raise out_of_memory(error, self.size(request)) from error
        finally:
            for hook in hooks:
                hook.remove()
            self._previews.forget()
        if not all(map(bool, finite)):
            raise GenerationFailed(
                "an image has NaN or Inf values: "
                "the weight of a LoRA is too high, or the VAE overflows"
            )
        if start is not None and start.keeps:
            lay = drawing.image_processor.apply_overlay
            return [lay(start.mask, start.image, image) for image in to_images(output.images)]
        return output.images

    def _pipeline_for(
        self,
        request: GenerateRequest,
        start: StartingImage | None,
        generators: Sequence[torch.Generator],
        enlarged: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """Return diffusers' pipeline for text alone, an image, or an image with a mask.

        Each has the components of the resident one, and no weight of its own. Also return what is
        an argument of this pipeline only.
        """
        if start is None and enlarged is None:
            width, height = self.size(request)
            latents = self._noise(width, height, generators)
            return self._pipeline, {"width": width, "height": height, "latents": latents}
        rows = len(generators)
        strength = request.image_strength
        if self._family.rounds_steps_up:
            strength = _strength_of_whole_steps(request)
        options: dict[str, Any] = {"image": enlarged, "strength": strength}
        if start is not None:
            options["image"] = [start.image] * rows
        cls = self._family.image_to_image
        if start is not None and start.mask is not None:
            cls = self._family.inpainting
            width, height = start.image.size
            options |= {"mask_image": [start.mask] * rows, "width": width, "height": height}
        drawing = cls(**self._pipeline.components | self._family.pipeline_options)
        drawing.set_progress_bar_config(disable=True)
        return drawing, options

    def _noise(self, width: int, height: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Draw the initial latents, in fp32 on the CPU: a seed is the same noise on any device."""
        factor = self._pipeline.vae_scale_factor
        shape = (1, self._channels, height // factor, width // factor)
        rows = [torch.randn(shape, generator=each, dtype=torch.float32) for each in generators]
        dtype = torch.float32 if self._family.has_fp32_latents else self.dtype
        return torch.cat(rows).to(self._device, dtype)


def _strength_of_whole_steps(request: GenerateRequest) -> float:
    """Return the strength of which diffusers draws exactly `drawn_steps`, rounded up or not."""
    drawn, steps = request.drawn_steps, request.steps
    return 1.0 if drawn == steps else math.nextafter(drawn / steps, 0)


def _text_options(text: EncodedText, *, is_list: bool) -> dict[str, Any]:
    """Return the prompts as arguments of diffusers' pipelines: tensors, or lists of matrices."""
    if is_list:
        negative = None if text.negative is None else list(text.negative)
        return {"prompt_embeds": list(text.prompt), "negative_prompt_embeds": negative}
    options = {"prompt_embeds": text.prompt, "negative_prompt_embeds": text.negative}
    if text.pooled is not None:
        options["pooled_prompt_embeds"] = text.pooled
        options["negative_pooled_prompt_embeds"] = text.negative_pooled
    return options
