"""Small network that classifies images of the demo model, trained on drawings alone.

Its heads are the facts of a scene and the weights of the styles. Facts other than the kind are
trained on plain drawings only, so that in a style only the kind and the weights are valid.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from diffusers import AutoencoderKL
from torch import Generator, Tensor, nn

from demo_model.drawing.canvas import STYLES, plain
from demo_model.drawing.distances import SIZE
from demo_model.drawing.facts import COLOURS, EYES, HAIRS, OBJECTS, SHAPES, TIMES
from demo_model.drawing.scenes import KINDS
from demo_model.training.autoencoder import encode
from demo_model.training.loop import Loop, Plan
from demo_model.training.pictures import Lot, lots, some_weights

PLAN: Final = Plan("judge", seed=6, steps=900, rate=2e-3, hold=0.3, ema=0.99)
HEADS: Final = {  # by the names of the scenes' fields, the kind apart
    "kind": len(KINDS),
    "time": len(TIMES),
    "background": len(COLOURS),
    "colour": len(COLOURS),
    "thing": len(OBJECTS),
    "shape": len(SHAPES),
    "hair": len(HAIRS),
    "eyes": len(EYES),
}
NOT_SAID: Final = -1

_FEATURES: Final = 192
_BATCH: Final = 128
_FRESH: Final = 40  # steps on the same drawings
_LOT: Final = 48  # plain and styled drawings of each kind among them
_NOISE: Final = 0.15  # at most; on the latents, whose deviation is 1


class Judge(nn.Module):
    """Five convolutions and a layer that all heads share."""

    def __init__(self) -> None:
        """Create an untrained judge."""
        super().__init__()
        self._body = nn.Sequential(
            *_block(3, 24, 2),
            *_block(24, 48, 2),
            *_block(48, 64, 1),
            *_block(64, 96, 2),
            *_block(96, 128, 2),
            nn.Flatten(),
            nn.Linear(128 * (SIZE // 16) ** 2, _FEATURES),
            nn.ReLU(),
        )
        self._heads = nn.ModuleDict(
            {head: nn.Linear(_FEATURES, count) for head, count in HEADS.items()}
        )
        self._styles = nn.Linear(_FEATURES, len(STYLES))

    def forward(self, pictures: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return each head's logits [n, choices] and the styles' weights [n, 4].

        Images are [n, 3, 64, 64] in 0..1.
        """
        features = self._body(pictures * 2 - 1)
        return {name: head(features) for name, head in self._heads.items()}, self._styles(features)

    @torch.no_grad()
    def tell(self, pictures: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return each head's choice [n] and the styles' weights [n, 4].

        Raises `ValueError` for images of another size.
        """
        if pictures.shape[1:] != (3, SIZE, SIZE):
            raise ValueError(f"images must be 3 x {SIZE} x {SIZE}, not {tuple(pictures.shape[1:])}")
        parts = [self(part) for part in torch.split(pictures, _BATCH)]
        choices = {
            head: torch.cat([logits[head].argmax(1) for logits, _ in parts]) for head in HEADS
        }
        return choices, torch.cat([weights for _, weights in parts])


def _block(channels: int, wider: int, stride: int) -> tuple[nn.Module, ...]:
    # No batch norm: its running means would not be of the averaged weights that `Loop` leaves.
    return nn.Conv2d(channels, wider, 3, stride, 1), nn.GroupNorm(4, wider), nn.ReLU()


def train(loop: Loop, vae: AutoencoderKL | None) -> Judge:
    """Train the judge, or load it from the loop's folder.

    With a VAE, half of the images are decoded by it, with noise on the latents as from a UNet.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(PLAN.seed)
        judge = Judge()

    def loss(step: int, generator: Generator) -> Tensor:
        lesson = _lesson(step // _FRESH, vae)
        rows = torch.randint(len(lesson.pictures), (_BATCH,), generator=generator)
        logits, weights = judge(_worn(lesson.pictures[rows], generator))
        wrong = [_wrong(logits[head], facts[rows]) for head, facts in lesson.facts.items()]
        return torch.stack([*wrong, 4 * F.mse_loss(weights, lesson.weights[rows])]).sum()

    loop.run(PLAN, judge.parameters(), loss)
    _lesson.cache_clear()
    return judge


def facts_of(some: Sequence[Lot]) -> dict[str, Tensor]:
    """Return the facts [n] of the lots' scenes by head; `NOT_SAID` if a kind lacks the fact."""

    def fact(lot: Lot, head: str) -> Tensor:
        own: dict[str, Tensor] = vars(lot.scene)
        count = len(next(iter(own.values())))
        said = list(KINDS).index(lot.kind) if head == "kind" else NOT_SAID
        return own.get(head, torch.full((count,), said))

    return {head: torch.cat([fact(lot, head) for lot in some]) for head in HEADS}


def shares(choices: Mapping[str, Tensor], facts: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the share of the known facts that the judge recognised, by head."""
    return {
        head: (choices[head] == wanted)[said].float().mean().item()
        for head, wanted in facts.items()
        for said in (wanted != NOT_SAID,)
        if said.any()
    }


@torch.no_grad()
def through_vae(vae: AutoencoderKL, pictures: Tensor, generator: Generator | None = None) -> Tensor:
    """Encode and decode images in 0..1; a generator adds noise of up to .15 to the latents."""
    latents = encode(vae, pictures)
    if generator:
        strength = _NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator)
        latents = latents + strength * torch.randn(latents.shape, generator=generator)
    decoded = torch.cat([vae.decode(part).sample for part in torch.split(latents, 64)])
    return ((decoded + 1) / 2).clamp(0, 1)


class _Lesson(NamedTuple):
    pictures: Tensor
    facts: dict[str, Tensor]
    weights: Tensor


@functools.lru_cache(maxsize=1)
def _lesson(number: int, vae: AutoencoderKL | None) -> _Lesson:
    """Draw images of every kind, as many plain as styled; the VAE decodes every other one."""
    drawn = lots(1, _LOT, seed=PLAN.seed * 10_007 + number)
    looks = [(plain(_LOT), some_weights(_LOT, lot.seed)) for lot in drawn]
    of_plain = torch.cat(
        [lot.scene.paint(look) for lot, (look, _) in zip(drawn, looks, strict=True)]
    )
    of_styled = torch.cat(
        [lot.scene.paint(look) for lot, (_, look) in zip(drawn, looks, strict=True)]
    )
    pictures = torch.cat([of_plain, of_styled])
    if vae:
        pictures[::2] = through_vae(vae, pictures[::2], torch.Generator().manual_seed(number))
    said = facts_of(drawn)
    unsaid = {
        head: facts if head == "kind" else torch.full_like(facts, NOT_SAID)
        for head, facts in said.items()
    }
    weights = torch.cat([look for looks_of in zip(*looks, strict=True) for look in looks_of])
    return _Lesson(
        pictures, {head: torch.cat([said[head], unsaid[head]]) for head in HEADS}, weights
    )


def _worn(pictures: Tensor, generator: Generator) -> Tensor:
    """Add a little blur, colour cast and noise, each of random strength."""
    strengths = torch.rand(3, len(pictures), 1, 1, 1, generator=generator)
    cast = torch.randn(len(pictures), 3, 1, 1, generator=generator)
    noise = torch.randn(pictures.shape, generator=generator)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    softened = pictures + (strengths[0] * 2 - 1).clamp(min=0) * (blurred - pictures)
    return softened + 0.03 * strengths[1] * cast + 0.04 * strengths[2] * noise


def _wrong(logits: Tensor, facts: Tensor) -> Tensor:
    """Return the mean cross entropy of the known facts; 0 if none is known."""
    total = F.cross_entropy(logits, facts, ignore_index=NOT_SAID, reduction="sum")
    return total / (facts != NOT_SAID).sum().clamp(min=1)
