"""The third stage: four LoRAs, trained together on the same scenes in styles at all weights.

Every row of a batch has its own weights and is compared with the drawing at these weights. So each
LoRA learns low weights and combinations; a LoRA trained alone at weight 1 does not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from diffusers import AutoencoderKL, UNet2DConditionModel
from rich.progress import track
from torch import Generator, Tensor, nn

from demo_model.drawing.canvas import STYLES
from demo_model.drawing.captions import caption, with_style_word
from demo_model.training.autoencoder import encode
from demo_model.training.base import Noising
from demo_model.training.loop import Loop, Plan, save
from demo_model.training.pictures import lots, random_of, some_weights
from demo_model.training.text import Reader

PLAN: Final = Plan("loras", seed=5, steps=2600, rate=2e-3, warmup=40, hold=0.5, ema=0.995)

_LOTS, _LOT = 32, 125  # 4000 scenes of each kind
_WORDINGS: Final = 2
_NAMED: Final = 0.7  # the share of captions with the word of a style that they are drawn in
_WORDLESS: Final = 0.07
_BATCH: Final = 32

# Rank in attention and in convolutions by style: outlines and tubes need convolutions most.
RANKS: Final[Mapping[str, tuple[int, int]]] = {
    "anime": (8, 10),
    "cyberpunk": (8, 8),
    "neon": (4, 12),
    "product": (8, 8),
}
Factors = dict[str, tuple[Tensor, Tensor]]  # by module: down and up


@dataclass
class Mix:
    """Weights of the styles [n, 4] for the rows of the current batch."""

    weights: Tensor


class Styled(nn.Module):
    """Layer with the factors of all LoRAs side by side, weighted for each row by the mix."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, mix: Mix, generator: Generator) -> None:
        """Initialize down factors as peft does, and up factors with 0."""
        super().__init__()
        self.layer = layer
        self._mix = mix
        place = isinstance(layer, nn.Conv2d)
        self._ranks = torch.tensor([RANKS[style][place] for style in STYLES])
        total = int(self._ranks.sum())
        shape = (total, *layer.weight.shape[1:])
        reach = layer.weight[0].numel() ** -0.5
        self.down = nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * reach)
        self.up = nn.Parameter(torch.zeros(layer.weight.shape[0], total, *[1] * (len(shape) - 2)))

    def forward(self, values: Tensor) -> Tensor:
        """Return the output of the layer and the LoRAs."""
        weights = self._mix.weights.repeat_interleave(self._ranks, 1)
        if isinstance(self.layer, nn.Conv2d):
            inner = F.conv2d(values, self.down, None, self.layer.stride, self.layer.padding)
            added = F.conv2d(inner * weights[:, :, None, None], self.up)
        else:
            inner = F.linear(values, self.down)
            added = F.linear(
                inner * weights.view(len(weights), *[1] * (values.dim() - 2), -1), self.up
            )
        base: Tensor = self.layer(values)
        return base + added

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Return the down and up factors of each style."""
        ranks = self._ranks.tolist()
        yield from zip(
            STYLES,
            torch.split(self.down.detach(), ranks),
            torch.split(self.up.detach(), ranks, 1),
            strict=True,
        )


@dataclass(frozen=True)
class StyledDrawings:
    """Latents [n, 4, 16, 16], tokens [wordings, n, 2, 77] and weights of styles [n, 4]."""

    latents: Tensor
    tokens: Tensor
    weights: Tensor


def draw(vae: AutoencoderKL, reader: Reader, path: Path) -> StyledDrawings:
    """Draw the training data of the stage, or load it from `path`."""
    if not path.exists():
        latents, all_weights = [], []
        captions: list[list[str]] = [[] for _ in range(_WORDINGS)]
        rng = random_of(PLAN.seed)
        for lot in track(lots(_LOTS, _LOT, seed=PLAN.seed), "drawing and encoding in style"):
            weights = some_weights(_LOT, lot.seed)
            latents.append(encode(vae, lot.scene.paint(weights)))
            all_weights.append(weights)
            for wordings in captions:
                for index, row in enumerate(weights):
                    text = caption(lot.kind, lot.scene, index, rng)
                    style = rng.choices(STYLES, row.tolist())[0]
                    wordings.append(
                        with_style_word(text, style, rng) if rng.random() < _NAMED else text
                    )
        tokens = torch.stack([reader.tokens(wordings) for wordings in captions])
        save((torch.cat(latents), tokens.short(), torch.cat(all_weights)), path)
    return StyledDrawings(*torch.load(path))


def train(
    loop: Loop, unet: UNet2DConditionModel, reader: Reader, drawings: StyledDrawings
) -> dict[str, Factors]:
    """Train the four together, and return the factors of each module by style."""
    mix = Mix(drawings.weights[:0])
    unet.requires_grad_(requires_grad=False)
    layers = _put_on(unet, mix)
    noising = Noising()

    def loss(_: int, generator: Generator) -> Tensor:
        rows = torch.randint(len(drawings.latents), (_BATCH,), generator=generator)
        wordings = torch.randint(_WORDINGS, (_BATCH,), generator=generator)
        with torch.no_grad():
            words = reader.read(drawings.tokens[wordings, rows].long())
        words = words.where(torch.rand(_BATCH, generator=generator) >= _WORDLESS)
        mix.weights = drawings.weights[rows]
        return noising.loss(unet, drawings.latents[rows], words, generator)

    loop.run(PLAN, [factor for layer in layers.values() for factor in (layer.down, layer.up)], loss)
    _take_off(unet, layers)
    found: dict[str, Factors] = {style: {} for style in STYLES}
    for name, layer in layers.items():
        for style, down, up in layer.factors():
            found[style][name] = (down, up)
    return found


def _put_on(unet: UNet2DConditionModel, mix: Mix) -> dict[str, Styled]:
    """Add factors to attention and to the convolutions of residual blocks and samplers."""
    generator = torch.Generator().manual_seed(PLAN.seed)
    layers = {
        name: Styled(module, mix, generator)
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and _is_wanted(name)
    }
    for name, layer in layers.items():
        _put(unet, name, layer)
    return layers


def _take_off(unet: UNet2DConditionModel, layers: Mapping[str, Styled]) -> None:
    for name, layer in layers.items():
        _put(unet, name, layer.layer)


def _put(unet: UNet2DConditionModel, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(unet.get_submodule(parent), leaf, layer)


def _is_wanted(name: str) -> bool:
    return ".attentions." in name or (
        (".resnets." in name or "samplers." in name) and "time_emb" not in name
    )
