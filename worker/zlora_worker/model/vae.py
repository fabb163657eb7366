"""The VAE: one image at a time, and in tiles if memory does not suffice for whole images."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from zlora_worker.model.out_of_memory import free_tensors, is_out_of_memory


class Vae:
    """diffusers' VAE, with `decode` and `encode` of this class in place of its own."""

    def __init__(self, pipeline: Any, *, native_side: int) -> None:
        """Take the VAE of diffusers' pipeline; `native_side` is that of its images in pixels."""
        self.tiled = False  # True if the last images were decoded in tiles, which differs slightly
        self._vae, self._factor = pipeline.vae, pipeline.vae_scale_factor
        self._dtype = self._vae.dtype
        self._decode_whole, self._vae.decode = self._vae.decode, self._decode
        self._encode_whole, self._vae.encode = self._vae.encode, self._encode
        self.set_tiles(native_side)

    def set_tiles(self, native_side: int) -> None:
        """Set half of the native size: a VAE's default tile is an image of native size."""
        self._vae.tile_latent_min_size = native_side // self._factor // 2
        self._vae.tile_sample_min_size = self._vae.tile_latent_min_size * self._factor

    def restore(self) -> None:
        """Restore what a job can leave changed if a signal interrupts it."""
        self._vae.disable_tiling()
        # A decode that fails leaves the VAE in fp32.
        if self._vae.dtype is not self._dtype:
            self._vae.to(self._dtype)

    @contextmanager
    def untiled(self) -> Iterator[None]:
        """Encode and decode whole images inside, also if `zlora replay` has turned on tiles."""
        tiles, self._vae.use_tiling = self._vae.use_tiling, False
        try:
            yield
        finally:
            self._vae.use_tiling = tiles

    def _encode(self, image: Tensor, **options: Any) -> Any:
        """Encode whole: an image that was decoded in tiles has a start that was encoded whole."""
        with self.untiled():
            return self._encode_whole(image, **options)

    def _decode(self, latents: Tensor, **options: Any) -> Any:
        """Decode in tiles if whole images run out of memory.

        Both ways start from the same latents: no step is denoised again.
        """
        try:
            return self._decode_each(latents, **options)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            free_tensors(error)
        self.tiled = True
        try:
            self._vae.enable_tiling()
            return self._decode_each(latents, **options)
        finally:
            self._vae.disable_tiling()

    def _decode_each(self, latents: Tensor, **options: Any) -> Any:
        """Decode one image at a time: decoding takes far more memory than a step of denoising."""
        if len(latents) == 1:
            return self._decode_whole(latents, **options)
        # Copies, because the alignment in memory changes the last bits of an image.
        rows = [latents[row : row + 1].clone() for row in range(len(latents))]
        return (torch.cat([self._decode_whole(row, **options)[0] for row in rows]),)


def to_images(images: Any) -> list[Image.Image]:
    """Return the images of decoded tensors; others are images already."""
    if not isinstance(images, Tensor):
        return list(images)
    return [Image.fromarray(rgb(image).cpu().numpy()) for image in images]


def rgb(image: Tensor) -> Tensor:
    """Convert [3, height, width] in 0..1 to RGB bytes [height, width, 3], on the image's device.

    The bits are those of diffusers' own conversion, which copies fp32 to the host first.
    """
    return (image.float() * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
