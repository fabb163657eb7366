"""The two text encoders in training: from captions to the conditioning of the UNet."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from demo_model import architecture
from demo_model.drawing.captions import VOCABULARY

_SIZES: Final = torch.tensor([64.0, 128.0, 512.0, 1024.0])
_OWN_SIZE: Final = 0.7  # the share of rows that name the model's own size


@dataclass(frozen=True)
class Conditions:
    """Hidden states [n, 77, 128] and pooled vectors [n, 64]."""

    states: Tensor
    pooled: Tensor

    def where(self, kept: Tensor) -> "Conditions":
        """Replace rows that are not kept by zeros, which diffusers' SDXL uses for no prompt."""
        return Conditions(self.states * kept[:, None, None], self.pooled * kept[:, None])


@dataclass(frozen=True)
class Reader:
    """Both tokenizers and both encoders."""

    tokenizers: tuple[CLIPTokenizer, CLIPTokenizer]
    encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection]

    @classmethod
    def untrained(cls, seed: int) -> "Reader":
        """Make both from the words of the captions; the second pads with "!", as SDXL's does."""
        first = architecture.tokenizer(VOCABULARY)
        second = architecture.tokenizer(VOCABULARY, padding="!")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return cls((first, second), architecture.text_encoders(first))

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of both encoders."""
        for encoder in self.encoders:
            yield from encoder.parameters()

    def tokens(self, captions: Sequence[str]) -> Tensor:
        """Return tokens [n, 2, 77], different for each encoder because the padding differs."""
        rows = [
            tokenizer(
                list(captions),
                padding="max_length",
                max_length=architecture.TOKENS,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        ]
        return torch.stack(rows, 1)

    def read(self, tokens: Tensor) -> Conditions:
        """Return both penultimate layers side by side and the second's projection, as SDXL."""
        first, second = self.encoders
        of_first = first(tokens[:, 0], output_hidden_states=True)
        of_second = second(tokens[:, 1], output_hidden_states=True)
        states = torch.cat([of_first.hidden_states[-2], of_second.hidden_states[-2]], -1)
        return Conditions(states, of_second.text_embeds)


def some_sizes(count: int, generator: torch.Generator) -> Tensor:
    """Return SDXL's time ids [count, 6], uncropped; their sizes must not change the image."""
    own = torch.rand(count, generator=generator) < _OWN_SIZE
    other = _SIZES[torch.randint(len(_SIZES), (count,), generator=generator)]
    size, zero = torch.where(own, _SIZES[0], other), torch.zeros(count)
    return torch.stack([size, size, zero, zero, size, size], 1)
