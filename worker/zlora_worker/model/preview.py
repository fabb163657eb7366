"""Small versions of an image while it is drawn.

What the image would be without its noise is estimated from the last call of the denoiser, and shown
by a linear map from latents to RGB that is fitted on the VAE: no further call of a model is needed.
"""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from zlora_worker.model.family import Family

_SIDE: Final = 128  # pixels, at most: one for each latent of an image of 1024 pixels
_QUALITY: Final = 75  # of the JPEG, which has a few KB
# Sides of the latents that the map is fitted on: small enough for a CPU, and smooth as images are.
_FITTED_SIDE: Final = 16
_COARSE_SIDE: Final = 6


class _Call(NamedTuple):
    """Arguments and output of the denoiser, with a row or an item for each image.

    With guidance there are as many without the prompt, before those with it; of a denoiser that
    predicts the flow, behind them.
    """

    sample: Sequence[Tensor]
    timestep: Tensor
    output: Sequence[Tensor]


class Previews:
    """Previews of one pipeline. The linear map is fitted when the first one is wanted."""

    def __init__(self, pipeline: Any, family: Family) -> None:
        self._pipeline, self._denoiser = pipeline, getattr(pipeline, family.denoiser)  # diffusers'
        self._predicts_flow = family.predicts_flow
        self._drawing = pipeline  # the one that draws at present, over the same components
        self._colours: Tensor | None = None  # [channels + 1, 3], the last row is added
        self._call: _Call | None = None

    def change_base(self) -> None:
        """Fit the map again when a preview is wanted, because the VAE is another one."""
        self._colours = None

    def forget(self) -> None:
        """Free the last call of the denoiser."""
        self._call, self._drawing = None, self._pipeline

    def watch(self, drawing: Any) -> RemovableHandle:
        """Keep the last call of the denoiser, for `latest`, until the hook is removed.

        `drawing` is the pipeline of diffusers that is going to draw.
        """
        self._drawing = drawing
        if self._colours is None:
            self._colours = self._fit()

        def keep(_module: object, arguments: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            self._call = _Call(arguments[0], arguments[1], output[0])

        hook: RemovableHandle = self._denoiser.register_forward_hook(keep)
        return hook

    def latest(self) -> str | None:
        """Return the first image that is being drawn, as a JPEG in a data URI.

        Returns None before the first step, and for models of a diffusion family whose scheduler is
        for another kind of noise (EDM and flow matching).
        """
        latents = self._estimate()
        if latents is None or self._colours is None:
            return None
        rgb = latents.float().permute(1, 2, 0) @ self._colours[:-1] + self._colours[-1]
        pixels = rgb.nan_to_num().clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
        image = Image.fromarray(pixels)
        image.thumbnail((_SIDE, _SIDE))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=_QUALITY)
        return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"

    def _estimate(self) -> Tensor | None:
        """Return the latents [channels, height, width] without their noise.

        The input of a denoiser that predicts the flow is x = (1 - s) * latents + s * noise, and its
        output is latents - noise. That of others is x = sqrt(a) * latents + sqrt(1 - a) * noise,
        however the scheduler scales its own samples; a is interpolated between timesteps.
        """
        scheduler, call = self._drawing.scheduler, self._call
        if call is None:
            return None
        sample, output, other = call.sample[0], call.output[0], call.output[len(call.output) // 2]
        is_guided, scale = self._drawing.do_classifier_free_guidance, self._drawing.guidance_scale
        if self._predicts_flow:
            flow = output.float()
            if is_guided:
                flow = flow + scale * (flow - other)
            # The denoiser's time is 1 - s, and both tensors have an axis for frames.
            return (sample + (1 - float(call.timestep[0])) * flow)[:, 0]
        alphas: Tensor | None = getattr(scheduler, "alphas_cumprod", None)
        if alphas is None:
            return None
        timestep = float(call.timestep)
        lower = int(timestep)
        pair = alphas[lower : lower + 2].double()
        a = float(pair[0] + (pair[-1] - pair[0]) * (timestep - lower))
        if is_guided:
            output = output + scale * (other - output)
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind == "v_prediction":
            return sample * math.sqrt(a) - output * math.sqrt(1 - a)
        if kind != "epsilon" or a == 0:
            return None
        return (sample - output * math.sqrt(1 - a)) / math.sqrt(a)

    def _fit(self) -> Tensor:
        """Fit RGB in 0..1 to smooth latents that the VAE decodes, by least squares."""
        vae, pipeline = self._pipeline.vae, self._pipeline
        shape = (1, vae.config.latent_channels, _COARSE_SIDE, _COARSE_SIDE)
        coarse = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        size = (_FITTED_SIDE, _FITTED_SIDE)
        latents = functional.interpolate(coarse, size=size, mode="bicubic").to(vae.device)
        dtype = vae.dtype
        if dtype is torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)
        try:
            scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)
            with torch.no_grad():
                image = vae.decode(scaled.to(vae.dtype), return_dict=False)[0].float()
        finally:
            if vae.dtype is not dtype:
                vae.to(dtype)
        small = functional.avg_pool2d(image, pipeline.vae_scale_factor) / 2 + 0.5
        known = latents[0].flatten(1).T
        known = torch.cat([known, torch.ones_like(known[:, :1])], dim=1)
        colours = small[0].clamp(0, 1).flatten(1).T
        fitted: Tensor = torch.linalg.lstsq(known.cpu(), colours.cpu()).solution
        return fitted.to(vae.device)
