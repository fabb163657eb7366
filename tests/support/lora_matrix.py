"""LoRA files of each family in every spelling and kind, and their effect by hand.

The effects are computed from the formulas of the kinds, in fp64, without the worker's code.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Final, Literal, NamedTuple

import torch
from support import lora_files, lora_spellings, tiny_folder
from support.fakes import Tensors
from support.lora_files import State, snapshot
from support.lora_spellings import Spelling
from support.tiny_zimage import original_name
from torch import Tensor
from zlora.lora import base_model
from zlora_worker.model.pipeline import Pipeline

Module = tuple[str, str]  # component, and the module's name in it

WEIGHT: Final = 0.6  # of each LoRA
ALPHA: Final = 3.0
RANK: Final = 2
_STD: Final = 0.3
_SEED: Final = 20260302


# --- kinds


@dataclass(frozen=True)
class Change:
    """Tensors of one layer by part, and their effect at weight 1, in fp64."""

    parts: Tensors
    delta: Tensor  # of the shape of the weight
    magnitude: Tensor | None = None  # of DoRA; its sides of 1 are those of the norms
    scales_inner: bool = False  # the LoRA's weight scales the delta before the norms, as in peft

    def merged(self, base: Tensor, strength: float) -> Tensor:
        """Return the weight of the layer with the LoRA at a strength."""
        inner = strength if self.scales_inner or self.magnitude is None else 1.0
        changed = base + inner * self.delta
        if self.magnitude is None:
            return changed
        sides = [side for side, size in enumerate(self.magnitude.shape) if size == 1]
        norms = torch.linalg.vector_norm(changed, dim=sides, keepdim=True)
        scaled: Tensor = changed * self.magnitude.double() / norms
        return scaled if self.scales_inner else base + strength * (scaled - base)


class Scale(NamedTuple):
    """Rank of the factors of a layer, and what their product is multiplied by."""

    rank: int
    factor: float


Maker = Callable[[Tensor, Scale], Change]  # for a weight


def _random(*shape: int) -> Tensor:
    return torch.randn(shape) * _STD


def lora(weight: Tensor, scale: Scale) -> Change:
    """Make a LoRA; for a convolution the down factor has its kernel."""
    down = _random(scale.rank, *weight.shape[1:])
    up = _random(len(weight), scale.rank, *[1] * (weight.dim() - 2))
    product = up.flatten(1).double() @ down.flatten(1).double()
    return Change({"down": down, "up": up}, scale.factor * product.view(weight.shape))


def lora_with_middle(weight: Tensor, scale: Scale) -> Change:
    """Make a LoRA with the kernel in a tensor between 1x1 factors."""
    (out, inputs, *kernel), rank = weight.shape, scale.rank
    parts = {
        "down": _random(rank, inputs, 1, 1),
        "lora_mid.weight": _random(rank, rank, *kernel),
        "up": _random(out, rank, 1, 1),
    }
    down, middle, up = (part.double() for part in parts.values())
    product = torch.einsum("oa,abkl,bi->oikl", up.flatten(1), middle, down.flatten(1))
    return Change(parts, scale.factor * product)


def loha(weight: Tensor, scale: Scale) -> Change:
    """Make a LoHa, the product by elements of two LoRAs."""
    out, inputs = weight.flatten(1).shape
    parts: Tensors = {}
    product = torch.ones(out, inputs, dtype=torch.float64)
    for half in "12":
        one, other = _random(out, scale.rank), _random(scale.rank, inputs)
        parts |= {f"hada_w{half}_a": one, f"hada_w{half}_b": other}
        product *= one.double() @ other.double()
    return Change(parts, scale.factor * product.view(weight.shape))


def loha_with_middles(weight: Tensor, scale: Scale) -> Change:
    """Make a LoHa of two LoRAs with middles."""
    (out, inputs, *kernel), rank = weight.shape, scale.rank
    parts: Tensors = {}
    product = torch.ones(weight.shape, dtype=torch.float64)
    for half in "12":
        middle, one, other = (
            _random(rank, rank, *kernel),
            _random(rank, out),
            _random(rank, inputs),
        )
        parts |= {f"hada_t{half}": middle, f"hada_w{half}_a": one, f"hada_w{half}_b": other}
        factors = one.double(), middle.double(), other.double()
        product *= torch.einsum("ao,abkl,bi->oikl", *factors)
    return Change(parts, scale.factor * product)


def lokr(weight: Tensor, scale: Scale) -> Change:
    """Make a LoKr with a factored large matrix, whose height does not divide a fused layer."""
    (out, inputs, *kernel), small = weight.shape, 2
    one = _random(small, small)
    factors = _random(out // small, scale.rank), _random(scale.rank, inputs // small, *kernel)
    large = _product(*factors)
    parts = {"lokr_w1": one, "lokr_w2_a": factors[0], "lokr_w2_b": factors[1].flatten(1)}
    return Change(parts, scale.factor * _kronecker(one.double(), large))


def lokr_of_factors(weight: Tensor, scale: Scale) -> Change:
    """Make a LoKr with both matrices factored."""
    (out, inputs, *kernel), small, rank = weight.shape, 4, scale.rank
    one = _random(small, rank), _random(rank, small)
    other = _random(out // small, rank), _random(rank, inputs // small, *kernel)
    parts = {"lokr_w1_a": one[0], "lokr_w1_b": one[1]}
    parts |= {"lokr_w2_a": other[0], "lokr_w2_b": other[1].flatten(1)}
    return Change(parts, scale.factor * _kronecker(_product(*one), _product(*other)))


def lokr_of_wholes(weight: Tensor, _scale: Scale) -> Change:
    """Make a LoKr of two whole matrices, which has no rank and no alpha."""
    (out, inputs, *kernel), small = weight.shape, 4
    parts = {
        "lokr_w1": _random(small, small),
        "lokr_w2": _random(out // small, inputs // small, *kernel),
    }
    return Change(parts, _kronecker(*(part.double() for part in parts.values())))


def lokr_with_middle(weight: Tensor, scale: Scale) -> Change:
    """Make a LoKr whose large matrix has the kernel in a tensor between its factors."""
    (out, inputs, *kernel), small, rank = weight.shape, 2, scale.rank
    parts = {
        "lokr_w1": _random(small, small),
        "lokr_w2_a": _random(rank, out // small),
        "lokr_w2_b": _random(rank, inputs // small),
        "lokr_t2": _random(rank, rank, *kernel),
    }
    one, up, down, middle = (part.double() for part in parts.values())
    large = torch.einsum("ao,abkl,bi->oikl", up, middle, down)
    return Change(parts, scale.factor * _kronecker(one, large))


def _product(up: Tensor, down: Tensor) -> Tensor:
    return torch.einsum("or,r...->o...", up.double(), down.double())


def _kronecker(small: Tensor, large: Tensor) -> Tensor:
    small = small.reshape(*small.shape, *[1] * (large.dim() - 2))
    return torch.kron(small, large.contiguous())


def full(weight: Tensor, _scale: Scale) -> Change:
    """Make a difference of the whole weight."""
    difference = _random(*weight.shape)
    return Change({"diff": difference}, difference.double())


def norm(weight: Tensor, _scale: Scale) -> Change:
    """Make a difference of a norm's weight, as LyCORIS names it."""
    difference = _random(*weight.shape)
    return Change({"w_norm": difference}, difference.double())


def with_magnitudes(make: Maker, *, by_inputs: bool = False) -> Maker:
    """Make a DoRA of another kind as kohya and LyCORIS do."""

    def made(weight: Tensor, scale: Scale) -> Change:
        change, magnitude = make(weight, scale), _norms(weight, by_inputs=by_inputs)
        parts = change.parts | {"dora_scale": magnitude}
        return replace(change, parts=parts, magnitude=magnitude)

    return made


def dora_of_peft(weight: Tensor, scale: Scale) -> Change:
    """Make a DoRA as peft does, whose magnitudes of a convolution lie along the second side."""
    change, magnitude = lora(weight, scale), _norms(weight)
    shape = (-1,) if weight.dim() == 2 else (1, -1, 1, 1)
    parts = change.parts | {"lora_magnitude_vector": magnitude.reshape(shape)}
    return replace(change, parts=parts, magnitude=magnitude, scales_inner=True)


def _norms(weight: Tensor, *, by_inputs: bool = False) -> Tensor:
    sides = [side for side in range(weight.dim()) if side != int(by_inputs)]
    norms: Tensor = torch.linalg.vector_norm(weight, dim=sides, keepdim=True)
    return norms * (torch.rand(norms.shape) + 0.5)


def _unserved(shapes: Callable[[int, int], dict[str, tuple[int, ...]]]) -> Maker:
    """Make tensors of a kind without a result by hand, from the height and width of a layer."""

    def made(weight: Tensor, _scale: Scale) -> Change:
        parts = {name: _random(*shape) for name, shape in shapes(*weight.shape).items()}
        return Change(parts, torch.zeros_like(weight, dtype=torch.float64))

    return made


@dataclass(frozen=True)
class Kind:
    """A kind of LoRA: its name in receipts, how its tensors are made, and for which layers."""

    shown: str
    make: Maker
    # "blocks" is all but residual blocks; "attention" is the projections of attention alone.
    layers: Literal["all", "blocks", "attention", "norms"] = "all"
    for_kernels: Maker | None = None  # of more than one element
    has_biases: bool = False
    rank: int = RANK
    refusal: str = ""  # words of the message if the kind is not served

    def has(self, module: str, weight: Tensor) -> bool:
        """Return whether files of this kind have a layer."""
        is_residual = "resnets" in module or "samplers" in module
        match self.layers:
            case "norms":
                return weight.dim() == 1
            case "attention":
                return weight.dim() == 2 and re.search(r"\.to_|_attn", module) is not None
            case "blocks":
                return weight.dim() >= 2 and not is_residual
        return weight.dim() >= 2


_UNSERVED: Final = {
    "OFT": _unserved(lambda _, inputs: {"oft_blocks": (inputs // 4, 4, 4)}),
    "OFT of peft": _unserved(lambda _, inputs: {"oft_R.weight": (inputs // 4, 6)}),
    "BOFT": _unserved(lambda out, inputs: {"boft_R": (1, inputs // 4, 4, 4), "boft_s": (out, 1)}),
    "IA3": _unserved(lambda out, _: {"ia3_l": (out, 1)}),
    "GLoRA": _unserved(
        lambda out, inputs: {
            "a1.weight": (RANK, inputs),
            "a2.weight": (inputs, RANK),
            "b1.weight": (RANK, inputs),
            "b2.weight": (out, RANK),
        }
    ),
    "VeRA": _unserved(lambda out, _: {"vera_lambda_b": (out,), "vera_lambda_d": (RANK,)}),
    "AdaLoRA": _unserved(
        lambda out, inputs: {"lora_A": (RANK, inputs), "lora_B": (out, RANK), "lora_E": (RANK, 1)}
    ),
}
KINDS: Final[dict[str, Kind]] = {
    "LoRA": Kind("lora", lora, "blocks"),
    "LoCon": Kind("lora", lora),
    "LoCon with a middle": Kind("lora", lora, for_kernels=lora_with_middle),
    "DoRA": Kind("dora-lora", with_magnitudes(lora)),
    "DoRA by inputs": Kind("dora-lora", with_magnitudes(lora, by_inputs=True)),
    "DoRA of peft": Kind("dora-lora", dora_of_peft),
    "LoHa": Kind("loha", loha),
    "LoHa with middles": Kind("loha", loha, for_kernels=loha_with_middles),
    "LoHa with magnitudes": Kind("dora-loha", with_magnitudes(loha)),
    "LoKr": Kind("lokr", lokr),
    "LoKr of factors": Kind("lokr", lokr_of_factors, rank=1),
    "LoKr of whole matrices": Kind("lokr", lokr_of_wholes),
    "LoKr with a middle": Kind("lokr", lokr, for_kernels=lokr_with_middle),
    "LoKr with magnitudes": Kind("dora-lokr", with_magnitudes(lokr)),
    "full": Kind("full", full, has_biases=True),
    "norms": Kind("full", norm, "norms", has_biases=True),
    **{
        name: Kind("", make, "attention", refusal=f"of the kind {name.split()[0]}")
        for name, make in _UNSERVED.items()
    },
}
_OF_KERNELS: Final = {"LoCon"} | {name for name, kind in KINDS.items() if kind.for_kernels}


# --- families


@dataclass(frozen=True)
class Family:
    """A family of base models: its name, tiny model, some modules of each sort, and spellings."""

    base: str
    folder: Callable[[Path], Path]
    modules: Sequence[Module]
    spellings: Mapping[str, Spelling]

    @property
    def kinds(self) -> dict[str, Kind]:
        """Kinds of LoRA for layers that this family has."""
        has_kernels = any("conv" in module for _, module in self.modules)
        return {
            name: kind for name, kind in KINDS.items() if has_kernels or name not in _OF_KERNELS
        }

    def refusal(self, spelling: str, kind: str) -> str:
        """Return words of the message that refuses a file, empty if it is applied."""
        if kind == "DoRA by inputs" and spelling.endswith("fused"):
            return "a DoRA with a magnitude for each input"
        return self.kinds[kind].refusal

    def cells(self) -> list[tuple[str, str]]:
        """Return the spellings with their kinds."""
        return [
            (name, kind)
            for name, spelling in self.spellings.items()
            for kind in self.kinds
            if not (spelling.is_processor and kind == "norms")
        ]


_ATTENTION: Final = "down_blocks.1.attentions.0"
_UNET: Final = [
    ("unet", module)
    for module in (
        f"{_ATTENTION}.proj_in",
        f"{_ATTENTION}.transformer_blocks.0.attn1.to_q",
        f"{_ATTENTION}.transformer_blocks.0.attn1.to_out.0",
        f"{_ATTENTION}.transformer_blocks.0.attn2.to_k",
        f"{_ATTENTION}.transformer_blocks.0.ff.net.0.proj",
        "down_blocks.1.resnets.0.conv1",
        "down_blocks.1.resnets.0.conv_shortcut",
        "up_blocks.2.resnets.0.time_emb_proj",
        "down_blocks.0.downsamplers.0.conv",
        "mid_block.attentions.0.norm",
        f"{_ATTENTION}.transformer_blocks.0.norm2",
    )
]
_TEXT: Final = (
    "encoder.layers.0.self_attn.q_proj",
    "encoder.layers.1.self_attn.out_proj",  # by its name diffusers knows its older spelling
    "encoder.layers.0.mlp.fc1",
    "encoder.layers.0.layer_norm1",
)
_TRANSFORMER: Final = (
    *(f"layers.0.attention.to_{part}" for part in ("q", "k", "v", "out.0")),
    "layers.1.feed_forward.w2",
    "noise_refiner.0.adaLN_modulation.0",
    "all_final_layer.2-1.linear",
    "all_x_embedder.2-1",
    "cap_embedder.1",
    "layers.0.attention.norm_q",
    "layers.1.ffn_norm1",
)
FAMILIES: Final[dict[str, Family]] = {
    "SDXL": Family(
        base_model.SDXL,
        tiny_folder.tiny_model,
        [
            *_UNET,
            *(("text_encoder", module) for module in _TEXT),
            *(("text_encoder_2", f"text_model.{module}") for module in _TEXT),
        ],
        lora_spellings.SDXL,
    ),
    "SD 1.5": Family(
        base_model.SD1,
        tiny_folder.tiny_sd15,
        [*_UNET, *(("text_encoder", module) for module in _TEXT)],
        lora_spellings.SD15,
    ),
    "Z-Image": Family(
        base_model.Z_IMAGE,
        tiny_folder.tiny_zimage,
        [("transformer", module) for module in _TRANSFORMER],
        lora_spellings.Z_IMAGE,
    ),
}


# --- files


class LoraWriter:
    """Maker of LoRA files for one model, which remembers the changes of layers between files."""

    def __init__(self, model: Pipeline) -> None:
        """Copy the weights of a model in fp32."""
        self.base = {name: tensor.float() for name, tensor in snapshot(model).items()}
        self._original_names = _original_names(model)
        self._changes: dict[tuple[Hashable, ...], tuple[Tensors, State]] = {}
        torch.manual_seed(_SEED)

    def modules(
        self, spelling: Spelling, kind: Kind, modules: Iterable[Module] | None = None
    ) -> list[Module]:
        """Return the modules of a file in a spelling, by default those of all modules."""
        if modules is None:
            names = [(owner, *name.rpartition(".")) for owner, name in self.base]
            modules = [
                (owner, module)
                for owner, module, _, leaf in names
                if leaf == "weight" and not module.endswith("_embedding")
            ]
        return [
            (component, module)
            for component, module in modules
            if spelling.has(component, module)
            and kind.has(module, self.base[component, f"{module}.weight"])
        ]

    def write(
        self,
        spelling: Spelling,
        kind: Kind,
        modules: Iterable[Module] | None = None,
        *,
        ranks: Sequence[int] = (),
        alphas: Sequence[float] = (ALPHA,),
        text_weight: float = WEIGHT,
    ) -> tuple[Tensors, State]:
        """Return the tensors of a file for some modules, and the weights that it gives, in fp64.

        The LoRA's weight is `WEIGHT`, and `text_weight` in text encoders. Modules that are one
        layer in the file follow each other. `ranks` and `alphas` rotate; without `ranks` the kind
        has one. No weights are returned for a kind that is not served.
        """
        layers: dict[Module, list[str]] = {}  # modules of each layer in the file
        for component, module in self.modules(spelling, kind, modules):
            layer = module
            if spelling.is_original:
                layer = self._original_names.get((component, module), module)
            layers.setdefault((component, layer), []).append(module)
        file: Tensors = {}
        merged: State = {}
        for (component, layer), own, rank, alpha in zip(
            layers, layers.values(), cycle(ranks or [kind.rank]), cycle(alphas), strict=False
        ):
            scale = Scale(rank, alpha / rank if spelling.has_alpha else 1.0)
            strength = text_weight if component.startswith("text_encoder") else WEIGHT
            key = (kind, component, *own, scale, strength)
            if key not in self._changes:
                self._changes[key] = self._changed(kind, component, own, scale, strength)
            parts, weights = self._changes[key]
            file |= spelling.tensors(component, layer, parts, alpha)
            merged |= weights
        return file, {} if kind.refusal else merged

    def _changed(
        self, kind: Kind, component: str, modules: Sequence[str], scale: Scale, strength: float
    ) -> tuple[Tensors, State]:
        """Return the tensors of one layer by part, and the weights and biases of its modules."""
        weights = [self.base[component, f"{module}.weight"] for module in modules]
        weight = torch.cat(weights)
        make = kind.make
        if kind.for_kernels and weight[0, 0].numel() > 1:
            make = kind.for_kernels
        change = make(weight, scale)
        parts = dict(change.parts)
        rows = torch.split(change.merged(weight.double(), strength), list(map(len, weights)))
        names = [(component, f"{module}.weight") for module in modules]
        merged = dict(zip(names, rows, strict=True))
        bias = self.base.get((component, f"{modules[0]}.bias"))
        if kind.has_biases and bias is not None:
            difference = _random(*bias.shape)
            parts["b_norm" if "w_norm" in parts else "diff_b"] = difference
            merged[component, f"{modules[0]}.bias"] = bias.double() + strength * difference
        return parts, merged


def files_of_all_kinds(model: Pipeline) -> dict[str, Tensors]:
    """Return a file of each served kind for a tiny model, and a LoRA of all its modules.

    Layers are named as LyCORIS does.
    """
    (family,) = [row for row in FAMILIES.values() if row.base == model.family]
    spelling, writer = family.spellings["LyCORIS"], LoraWriter(model)
    files = {
        name: writer.write(spelling, kind, family.modules)[0]
        for name, kind in family.kinds.items()
        if not kind.refusal
    }
    return files | {"LoRA of all modules": writer.write(spelling, KINDS["LoRA"])[0]}


def _original_names(model: Pipeline) -> dict[Module, str]:
    """Return the names that a model's own code has for its modules, by those of diffusers."""
    if "unet" in model.weights.components:
        names = lora_files.stability_names(model.pipeline.unet)
        return {("unet", module): name for module, name in names.items()}
    modules = model.pipeline.transformer.named_modules()
    return {("transformer", module): original_name(module) for module, _ in modules}
