"""The second stage: the UNet and the text encoders, on plain drawings and their captions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from rich.progress import track
from torch import Generator, Tensor, nn

from demo_model import architecture
from demo_model.drawing.canvas import plain
from demo_model.drawing.captions import caption, with_idle_words
from demo_model.training.autoencoder import encode
from demo_model.training.loop import Loop, Plan, save
from demo_model.training.pictures import lots, random_of
from demo_model.training.text import Conditions, Reader, some_sizes

WARM_UP: Final = Plan("text-encoders", seed=3, steps=300, rate=2e-3, ema=0.98)
PLAN: Final = Plan("unet", seed=4, steps=5000, rate=2e-3, warmup=80, hold=0.4)

_LOTS, _LOT = 40, 125  # 5000 scenes of each kind
_WORDINGS: Final = 3  # captions a scene
_WORDLESS: Final = 0.07  # the share of rows without a prompt
_IDLE: Final = (
    "",
    "blurry",
    "low quality",
    "blurry, low quality",
)  # negative prompts: they mean any picture
_IDLE_SHARE: Final = 0.03
_BATCH: Final = 64
_WARM_BATCH: Final = 256
_THUMBNAIL: Final = 8  # a side


@dataclass(frozen=True)
class Drawings:
    """Latents [n, 4, 16, 16] and the tokens of their captions [wordings, n, 2, 77]."""

    latents: Tensor
    tokens: Tensor

    def some(self, count: int, generator: Generator) -> tuple[Tensor, Tensor]:
        """Return latents, and the tokens of one caption of each."""
        rows = torch.randint(len(self.latents), (count,), generator=generator)
        wordings = torch.randint(len(self.tokens), (count,), generator=generator)
        return self.latents[rows], self.tokens[wordings, rows].long()


def draw(vae: AutoencoderKL, reader: Reader, path: Path) -> Drawings:
    """Draw the training data of the stage, or load it from `path`."""
    if not path.exists():
        latents, rng = [], random_of(PLAN.seed)
        captions: list[list[str]] = [[] for _ in range(_WORDINGS)]
        for lot in track(lots(_LOTS, _LOT, seed=PLAN.seed), "drawing and encoding"):
            latents.append(encode(vae, lot.scene.paint(plain(_LOT))))
            for wordings in captions:
                texts = [
                    with_idle_words(caption(lot.kind, lot.scene, index, rng), rng)
                    for index in range(_LOT)
                ]
                wordings += [
                    rng.choice(_IDLE) if rng.random() < _IDLE_SHARE else text for text in texts
                ]
        tokens = torch.stack([reader.tokens(wordings) for wordings in captions])
        save((torch.cat(latents), tokens.short()), path)
    return Drawings(*torch.load(path))


def warm_up(loop: Loop, reader: Reader, drawings: Drawings) -> None:
    """Train the encoders on positions: regress a thumbnail of the latents from their outputs.

    Without it the UNet learns for a long time from words that it cannot tell apart.
    """
    wanted = F.adaptive_avg_pool2d(drawings.latents, _THUMBNAIL).flatten(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(WARM_UP.seed)
        from_pooled, from_states = nn.LazyLinear(wanted.shape[1]), nn.LazyLinear(wanted.shape[1])
        first = reader.read(drawings.tokens[0, :1].long())
        from_pooled(first.pooled), from_states(first.states.mean(1))

    def loss(_: int, generator: Generator) -> Tensor:
        rows = torch.randint(len(wanted), (_WARM_BATCH,), generator=generator)
        wording = torch.randint(len(drawings.tokens), (_WARM_BATCH,), generator=generator)
        words = reader.read(drawings.tokens[wording, rows].long())
        guesses = (from_pooled(words.pooled), from_states(words.states.mean(1)))
        return sum((F.mse_loss(guess.float(), wanted[rows]) for guess in guesses), torch.zeros(()))

    loop.run(
        WARM_UP, [*reader.parameters(), *from_pooled.parameters(), *from_states.parameters()], loss
    )


def train(loop: Loop, reader: Reader, drawings: Drawings) -> UNet2DConditionModel:
    """Train the UNet and the encoders together to predict v, with uniformly sampled times."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(PLAN.seed)
        unet = architecture.unet()
    noising = Noising()

    def loss(_: int, generator: Generator) -> Tensor:
        latents, tokens = drawings.some(_BATCH, generator)
        words = reader.read(tokens).where(torch.rand(_BATCH, generator=generator) >= _WORDLESS)
        return noising.loss(unet, latents, words, generator)

    loop.run(PLAN, [*unet.parameters(), *reader.parameters()], loss)
    return unet


class Noising:
    """Loss of a UNet that predicts v (Salimans and Ho, arXiv:2202.00512)."""

    def __init__(self) -> None:
        """Take the betas of the model's own scheduler."""
        self._noising = DDPMScheduler.from_config(architecture.scheduler().config)

    def loss(
        self, unet: nn.Module, latents: Tensor, words: Conditions, generator: Generator
    ) -> Tensor:
        """Return the mean square over one time and one noise for each of the latents."""
        count = len(latents)
        noise = torch.randn(latents.shape, generator=generator)
        times = torch.randint(
            0, self._noising.config.num_train_timesteps, (count,), generator=generator
        )
        added = {"text_embeds": words.pooled, "time_ids": some_sizes(count, generator)}
        noisy = self._noising.add_noise(latents, noise, times)
        drawn = unet(
            noisy, times, encoder_hidden_states=words.states, added_cond_kwargs=added
        ).sample
        return F.mse_loss(drawn.float(), self._noising.get_velocity(latents, noise, times))
