"""The first stage: training of the VAE, then of its decoder alone."""

import functools
from typing import Final

import torch
from diffusers import AutoencoderKL
from torch import Generator, Tensor

from demo_model import architecture
from demo_model.drawing.canvas import plain
from demo_model.training.loop import Loop, Plan
from demo_model.training.pictures import lots, some_weights

PLAN: Final = Plan("vae", seed=1, steps=9000, rate=1.5e-3, betas=(0.9, 0.98), decay=1e-4, ema=0.995)
POLISH: Final = Plan(
    "vae-decoder", seed=2, steps=1500, rate=1.2e-3, betas=(0.9, 0.98), decay=1e-4, ema=0.995
)

_BATCH: Final = 10
_FRESH: Final = 150  # steps on the same drawings
_LOT: Final = 64  # plain and styled drawings of each kind among them
_KL: Final = 1e-4  # against the squared error, a latent element
_NOISE: Final = 0.15  # at most, on the latents that the decoder is polished with


def train(loop: Loop) -> AutoencoderKL:
    """Train the VAE, and whiten its latents: mean 0 and deviation 1 over the drawings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(PLAN.seed)
        vae = architecture.vae()

    def loss(step: int, generator: Generator) -> Tensor:
        pictures = _some(step, PLAN.seed, generator)
        latents = vae.encode(pictures).latent_dist
        kl: Tensor = 0.5 * (latents.mean.pow(2) + latents.var - 1 - latents.logvar).mean()
        drawn: Tensor = vae.decode(latents.sample(generator)).sample
        return _difference(drawn, pictures) + _KL * kl

    loop.run(PLAN, vae.parameters(), loss)
    _whiten(vae)
    return vae


def polish(loop: Loop, vae: AutoencoderKL) -> None:
    """Train the decoder with noise on the latents, because a UNet's latents are not exact."""
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]

    def loss(step: int, generator: Generator) -> Tensor:
        pictures = _some(step, POLISH.seed, generator)
        with torch.no_grad():
            latents = vae.encode(pictures).latent_dist.mean
        strength = _NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        drawn: Tensor = vae.decode(latents + strength * noise).sample
        return _difference(drawn, pictures)

    loop.run(POLISH, parameters, loss)


def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Return the latents [n, 4, 16, 16] of images in 0..1."""
    with torch.no_grad():
        return torch.cat(
            [vae.encode(part * 2 - 1).latent_dist.mean for part in torch.split(pictures, 64)]
        )


def _some(step: int, seed: int, generator: Generator) -> Tensor:
    pictures = _drawings(seed * 10_007 + step // _FRESH)
    return pictures[torch.randint(len(pictures), (_BATCH,), generator=generator)]


@functools.lru_cache(maxsize=1)
def _drawings(seed: int) -> Tensor:
    """Draw images in -1..1 of every kind, as many plain as styled."""
    drawn = []
    for lot in lots(1, _LOT, seed=seed):
        drawn += [lot.scene.paint(plain(_LOT)), lot.scene.paint(some_weights(_LOT, lot.seed))]
    return torch.cat(drawn) * 2 - 1


def _difference(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Return squared differences plus absolute ones of edges and colours, which blur less."""
    wrong = drawn.float() - wanted
    across, down = wrong[..., 1:] - wrong[..., :-1], wrong[..., 1:, :] - wrong[..., :-1, :]
    return wrong.pow(2).mean() + 0.3 * (
        wrong.abs().mean() + across.abs().mean() + down.abs().mean()
    )


@torch.no_grad()
def _whiten(vae: AutoencoderKL) -> None:
    """Fold each channel's mean and deviation into the two 1 x 1 convolutions about the latents."""
    latents = encode(vae, (_drawings(PLAN.seed * 10_007 - 1) + 1) / 2)
    mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    channels = len(mean)
    into, back = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] /= deviation[:, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - mean) / deviation
    into.bias[channels:] -= 2 * deviation.log()  # the logarithms of variances
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= deviation[None, :, None, None]
