"""Random LoRAs for the tests' tiny SDXL in common spellings."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

_RANK = 4


class _Factors(NamedTuple):
    component: str
    module: str
    down: Tensor
    up: Tensor


def build(pipeline: StableDiffusionXLPipeline, folder: Path) -> None:
    """Write one file for each style to `folder`, less than 0.5 MB each."""
    folder.mkdir(parents=True, exist_ok=True)
    attention = re.compile(r"attn[12]\.to_(q|k|v|out\.0)$|self_attn\.(q|k|v|out)_proj$")
    convolutions = re.compile(r"resnets\.\d\.conv[12]$|attn[12]\.to_(q|k|v|out\.0)$")
    texts = ("text_encoder", "text_encoder_2")
    _write(
        folder / "anime-style.safetensors",
        _kohya,
        _factors(pipeline, ("unet", *texts), attention, 0.8),
    )
    _write(
        folder / "cyberpunk-style.safetensors", _peft, _factors(pipeline, ("unet",), attention, 2.0)
    )
    _write(
        folder / "neon-lights.safetensors", _kohya, _factors(pipeline, ("unet",), convolutions, 1.6)
    )
    _write(
        folder / "product-photography-v1.safetensors",
        _peft,
        _factors(pipeline, ("unet", *texts), attention, 1.0),
    )


def _factors(
    pipeline: StableDiffusionXLPipeline,
    components: tuple[str, ...],
    targets: re.Pattern[str],
    strength: float,
) -> Iterator[_Factors]:
    generator = torch.Generator().manual_seed(round(100 * strength) + len(components))
    for component in components:
        for name, module in getattr(pipeline, component).named_modules():
            if targets.search(name) and isinstance(module, nn.Linear | nn.Conv2d):
                yield _Factors(
                    component,
                    _as_in_files(component, name),
                    *_random_change(module, strength, generator),
                )


def _as_in_files(component: str, module: str) -> str:
    """Add the prefix that files have and transformers has dropped."""
    return module if component == "unet" else f"text_model.{module.removeprefix('text_model.')}"


def _random_change(
    module: nn.Linear | nn.Conv2d, strength: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return factors whose product has `strength` times the norm of the module's weight."""
    weight = module.weight
    down = torch.randn(_RANK, *weight.shape[1:], generator=generator)
    up = torch.randn(weight.shape[0], _RANK, *[1] * (weight.dim() - 2), generator=generator)
    change = up.flatten(1) @ down.flatten(1)
    return down, up * (strength * weight.norm() / change.norm())


def _write(
    path: Path, spell: Callable[[_Factors], dict[str, Tensor]], all_factors: Iterator[_Factors]
) -> None:
    tensors: dict[str, Tensor] = {}
    for factors in all_factors:
        tensors |= spell(factors)
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()},
        path,
        metadata={"format": "pt"},
    )


def _peft(factors: _Factors) -> dict[str, Tensor]:
    key = f"{factors.component}.{factors.module}"
    return {f"{key}.lora_A.weight": factors.down, f"{key}.lora_B.weight": factors.up}


def _kohya(factors: _Factors) -> dict[str, Tensor]:
    """Spell as kohya's `sd-scripts`; alpha is half the rank, so the up factor is doubled."""
    prefix = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}[
        factors.component
    ]
    module = _sgm_name(factors.module) if factors.component == "unet" else factors.module
    key = f"{prefix}_{module.replace('.', '_')}"
    return {
        f"{key}.lora_down.weight": factors.down,
        f"{key}.lora_up.weight": factors.up * 2,
        f"{key}.alpha": torch.tensor(_RANK / 2),
    }


_SGM_PARTS = {"resnets": 0, "attentions": 1}
_SGM_LAYERS = {"conv1": "in_layers.2", "conv2": "out_layers.3"}


def _sgm_name(module: str) -> str:
    """Return the name of a UNet module in Stability's code, for levels of two layers."""
    if found := re.match(r"(down|up)_blocks\.(\d)\.(resnets|attentions)\.(\d)\.(.*)", module):
        way, level, kind, layer, rest = found.groups()
        block = (
            f"input_blocks.{3 * int(level) + int(layer) + 1}"
            if way == "down"
            else f"output_blocks.{3 * int(level) + int(layer)}"
        )
        return f"{block}.{_SGM_PARTS[kind]}.{_SGM_LAYERS.get(rest, rest)}"
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", module):
        kind, layer, rest = found.groups()
        index = 1 if kind == "attentions" else 2 * int(layer)
        return f"middle_block.{index}.{_SGM_LAYERS.get(rest, rest)}"
    raise ValueError(f"no name for {module}")
