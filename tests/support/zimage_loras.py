"""LoRA files of Z-Image in every spelling and kind, and their effect without the worker's code."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from support.fakes import Tensors
from support.tiny_zimage import original_layout
from torch import Tensor

WEIGHT: Final = 0.6  # of the LoRA
_RANK: Final = 2
_ALPHA: Final = 3.0
_STD: Final = 0.3


class Spelling(NamedTuple):
    """How a tool names a module, and the factors of its LoRA."""

    prefix: str
    down: str = "lora_down.weight"
    up: str = "lora_up.weight"
    is_flat: bool = False  # dots are underscores
    is_original: bool = False  # with queries, keys and values in one layer
    has_alpha: bool = True

    def of(self, module: str) -> str:
        """Return a module's name in a file."""
        return self.prefix + (module.replace(".", "_") if self.is_flat else module)


_PEFT: Final = ("lora_A.weight", "lora_B.weight")
SPELLINGS: Final[dict[str, Spelling]] = {
    "diffusers": Spelling("transformer.", *_PEFT, has_alpha=False),
    "diffusers with alpha": Spelling("transformer.", *_PEFT),
    "diffusers, adapter's name": Spelling(
        "transformer.", "lora_A.default.weight", "lora_B.default.weight", has_alpha=False
    ),
    "diffusers, old": Spelling("transformer.", "lora.down.weight", "lora.up.weight"),
    "peft": Spelling("base_model.model.", *_PEFT, has_alpha=False),
    "bare": Spelling("", *_PEFT, has_alpha=False),
    "kohya": Spelling("lora_unet_", is_flat=True),
    "kohya, two underscores": Spelling("lora_unet__", is_flat=True),
    "kohya, transformer": Spelling("lora_transformer_", is_flat=True),
    "LyCORIS": Spelling("lycoris_", is_flat=True),
    "OneTrainer": Spelling("transformer."),
    "ComfyUI": Spelling("diffusion_model."),
    "ai-toolkit": Spelling("diffusion_model.", *_PEFT, has_alpha=False),
    "ComfyUI, fused": Spelling("diffusion_model.", is_original=True),
    "ai-toolkit, fused": Spelling("diffusion_model.", *_PEFT, is_original=True, has_alpha=False),
    "single file, fused": Spelling("model.diffusion_model.", *_PEFT, is_original=True),
    "kohya, fused": Spelling("lora_unet_", is_flat=True, is_original=True),
    "kohya, fused, two underscores": Spelling("lora_unet__", is_flat=True, is_original=True),
    "LyCORIS, fused": Spelling("lycoris_", is_flat=True, is_original=True),
    "bare, fused": Spelling("", *_PEFT, is_original=True, has_alpha=False),
}


@dataclass(frozen=True)
class Change:
    """Tensors of one layer by part, and the delta at weight 1 as a matrix in fp64."""

    parts: Tensors
    delta: Tensor
    magnitude: Tensor | None = None  # of DoRA, [out, 1]
    scales_inner: bool = False  # as peft does


Maker = Callable[[Tensor, float], Change]  # of a weight and the scale of its factors


def _random(*shape: int) -> Tensor:
    return torch.randn(shape) * _STD


def lora(weight: Tensor, scale: float) -> Change:
    """Make a LoRA."""
    down, up = _random(_RANK, weight.shape[1]), _random(len(weight), _RANK)
    return Change({"down": down, "up": up}, scale * up.double() @ down.double())


def _norms(weight: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(weight, dim=1, keepdim=True)
    return norms * (torch.rand(len(weight), 1) + 0.5)


def dora(weight: Tensor, scale: float) -> Change:
    """Make a DoRA as kohya and LyCORIS do."""
    inner, magnitude = lora(weight, scale), _norms(weight)
    return Change(inner.parts | {"dora_scale": magnitude}, inner.delta, magnitude)


def dora_of_peft(weight: Tensor, scale: float) -> Change:
    """Make a DoRA as peft does."""
    inner, magnitude = lora(weight, scale), _norms(weight)
    parts = inner.parts | {"lora_magnitude_vector": magnitude.flatten()}
    return Change(parts, inner.delta, magnitude, scales_inner=True)


def loha(weight: Tensor, scale: float) -> Change:
    """Make a LoHa."""
    out, inputs = weight.shape
    parts = {
        f"hada_w{half}_{side}": _random(*shape)
        for half in "12"
        for side, shape in (("a", (out, _RANK)), ("b", (_RANK, inputs)))
    }
    one, two = (
        parts[f"hada_w{half}_a"].double() @ parts[f"hada_w{half}_b"].double() for half in "12"
    )
    return Change(parts, scale * one * two)


def dora_of_loha(weight: Tensor, scale: float) -> Change:
    """Make a LoHa with magnitudes."""
    inner, magnitude = loha(weight, scale), _norms(weight)
    return Change(inner.parts | {"dora_scale": magnitude}, inner.delta, magnitude)


def lokr(weight: Tensor, scale: float) -> Change:
    """Make a LoKr with a factored large matrix, whose height does not divide a fused layer."""
    (out, inputs), small = weight.shape, 2
    parts = {
        "lokr_w1": _random(small, small),
        "lokr_w2_a": _random(out // small, _RANK),
        "lokr_w2_b": _random(_RANK, inputs // small),
    }
    large = parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double()
    return Change(parts, scale * torch.kron(parts["lokr_w1"].double(), large))


def lokr_of_wholes(weight: Tensor, _scale: float) -> Change:
    """Make a LoKr of two whole matrices, which has no rank and no alpha."""
    (out, inputs), small = weight.shape, 4
    parts = {
        "lokr_w1": _random(small, small),
        "lokr_w2": _random(out // small, inputs // small),
    }
    return Change(parts, torch.kron(parts["lokr_w1"].double(), parts["lokr_w2"].double()))


def dora_of_lokr(weight: Tensor, scale: float) -> Change:
    """Make a LoKr with magnitudes."""
    inner, magnitude = lokr(weight, scale), _norms(weight)
    return Change(inner.parts | {"dora_scale": magnitude}, inner.delta, magnitude)


def full(weight: Tensor, _scale: float) -> Change:
    """Make a difference of the whole weight."""
    difference = _random(*weight.shape)
    return Change({"diff": difference}, difference.double())


KINDS: Final[dict[str, tuple[str, Maker]]] = {  # each with its name in receipts
    "LoRA": ("lora", lora),
    "DoRA": ("dora-lora", dora),
    "DoRA of peft": ("dora-lora", dora_of_peft),
    "LoHa": ("loha", loha),
    "LoHa with magnitudes": ("dora-loha", dora_of_loha),
    "LoKr": ("lokr", lokr),
    "LoKr of whole matrices": ("lokr", lokr_of_wholes),
    "LoKr with magnitudes": ("dora-lokr", dora_of_lokr),
    "full": ("full", full),
}
# One of each kind of layer; their names in the original layout are derived.
SOME: Final = (
    *(f"layers.0.attention.to_{part}" for part in ("q", "k", "v", "out.0")),
    "layers.1.feed_forward.w2",
    "noise_refiner.0.adaLN_modulation.0",
    "context_refiner.0.feed_forward.w1",
    "all_final_layer.2-1.linear",
    "all_x_embedder.2-1",
    "cap_embedder.1",
    "t_embedder.mlp.0",
)


def written(
    weights: Tensors, spelling: Spelling, make: Maker, modules: Sequence[str] | None = None
) -> tuple[Tensors, Tensors]:
    """Make a file, and the weights that it gives at `WEIGHT`, by diffusers' names, in fp64.

    `modules` are diffusers' names, by default those of all matrices.
    """
    torch.manual_seed(20260302)
    matrices = {name: weight for name, weight in weights.items() if weight.dim() == 2}
    if modules is None:
        modules = [name.removesuffix(".weight") for name in matrices if name.endswith(".weight")]
    own = {f"{module}.weight": matrices[f"{module}.weight"] for module in modules}
    layers = original_layout(own) if spelling.is_original else own
    file: Tensors = {}
    merged: Tensors = {}
    for name, weight in layers.items():
        scale = _ALPHA / _RANK if spelling.has_alpha else 1.0
        change = make(weight, scale)
        file |= _tensors(spelling, name.removesuffix(".weight"), change.parts)
        merged[name] = _merged(weight.double(), change)
    return file, _split(merged, own) if spelling.is_original else merged


def _tensors(spelling: Spelling, module: str, parts: Tensors) -> Tensors:
    names = {"down": spelling.down, "up": spelling.up}
    module = spelling.of(module)
    found = {f"{module}.{names.get(part, part)}": tensor for part, tensor in parts.items()}
    if spelling.has_alpha:
        found[f"{module}.alpha"] = torch.tensor(_ALPHA)
    return found


def _merged(weight: Tensor, change: Change) -> Tensor:
    inner = WEIGHT if change.scales_inner or change.magnitude is None else 1.0
    merged = weight + inner * change.delta
    if change.magnitude is None:
        return merged
    norms = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
    scaled: Tensor = merged * (change.magnitude.double() / norms)
    return scaled if change.scales_inner else weight + WEIGHT * (scaled - weight)


def _split(merged: Tensors, own: Tensors) -> Tensors:
    """Return the weights of the original layout by diffusers' names."""
    found = {}
    for name in own:
        if ".attention.to_" in name and ".to_out." not in name:
            block, _, leaf = name.partition(".to_")
            rows = merged[f"{block}.qkv.weight"].chunk(3)["qkv".index(leaf[0])]
            found[name] = rows
        else:
            (original,) = original_layout({name: own[name]})
            found[name] = merged[original]
    return found
