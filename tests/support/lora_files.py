"""LoRA files in every spelling, and their effect on the tiny model without the worker's code."""

import math
from collections.abc import Mapping, Sequence
from hashlib import sha256
from itertools import cycle
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from support import single_file
from support.fakes import Tensors
from support.lora_spellings import SDXL, Spelling
from support.tiny_folder import tiny_model
from torch import Tensor, nn
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.reader import Lora, require_whole
from zlora_worker.model.families import sdxl
from zlora_worker.model.pipeline import Pipeline

Weight: TypeAlias = tuple[str, str]  # component, and the parameter's name in it
State: TypeAlias = dict[Weight, Tensor]
SOURCE: Final = "https://example.com/a.safetensors"
TOLERANCE: Final = 1e-5  # of the greatest weight, in fp32


PEFTS_TARGETS: Final = [
    "to_q",
    "to_out.0",
    "ff.net.2",
    "q_proj",
    "fc1",
    "conv1",
    "conv_shortcut",
]  # modules


class Layer(NamedTuple):
    """A LoRA of one module; its change at weight 1 is `alpha / rank * up @ down`."""

    component: str
    module: str
    down: Tensor
    up: Tensor
    alpha: float

    def change(self, *, with_alpha: bool) -> Tensor:
        """Compute the delta as a matrix in fp64."""
        scale = self.alpha / len(self.down) if with_alpha else 1.0
        return scale * self.up.double().flatten(1) @ self.down.double().flatten(1)


def read_whole(model: Pipeline, path: Path) -> Lora:
    """Read a file as a strict job does."""
    lora = model.reader.read(path, digest=sha256(path.read_bytes()).hexdigest(), source=SOURCE)
    require_whole(lora, source=SOURCE)
    return lora


def merged(model: Pipeline, lora: Lora, *, unet: float = 1.0, text: float = 1.0) -> State:
    """Return the weights while a LoRA is merged."""
    with model.patch.applied([WeightedLora(lora=lora, unet_weight=unet, text_encoder_weight=text)]):
        return snapshot(model)


def snapshot(model: Pipeline) -> State:
    """Copy every weight that a LoRA can change."""
    return {
        (component, name): parameter.detach().clone()
        for component in model.weights.components
        for name, parameter in getattr(model.pipeline, component).named_parameters()
    }


def require_unchanged(model: Pipeline, before: State) -> None:
    """Raise `AssertionError` if any weight differs from its copy in a single bit."""
    assert [
        f"{component}.{name}"
        for component in model.weights.components
        for name, parameter in getattr(model.pipeline, component).named_parameters()
        if not torch.equal(parameter, before[component, name])
    ] == []


def require_equal(merged: State, base: State, expected: Mapping[Weight, Tensor]) -> None:
    """Require each expected weight within the tolerance, and the base's bits in all others."""
    assert expected
    for weight, tensor in expected.items():
        assert not torch.equal(merged[weight], base[weight]), f"{weight} is unchanged"
        off = (merged[weight].double() - tensor.double().view_as(merged[weight])).abs().max()
        assert float(off) <= TOLERANCE * float(tensor.abs().max()), (
            f"{weight} is off by {float(off)}"
        )
    assert [
        weight
        for weight in base.keys() - expected.keys()
        if not torch.equal(merged[weight], base[weight])
    ] == []


def stability_names(unet: Any) -> dict[str, str]:
    """Return Stability's names of a UNet's modules by diffusers' names.

    They come from the tests' own writer of checkpoints, whose files diffusers reads.
    """
    state = {key: tensor for key, tensor in unet.state_dict().items() if key.endswith(".weight")}
    moved = single_file._moved(state, single_file._unet_places(unet.config), single_file.UNET_INNER)
    by_tensor = {id(tensor): key for key, tensor in moved.items()}
    return {_module(key): _module(by_tensor[id(tensor)]) for key, tensor in state.items()}


def layers_for(
    weights: Mapping[Weight, Tensor], *, ranks: Sequence[int] = (2, 3, 1)
) -> list[Layer]:
    """Make a random layer for each matrix or kernel but embeddings; ranks and alphas rotate."""
    generator = torch.Generator().manual_seed(20260102)
    layers, rank_of, alpha_of = [], cycle(ranks), cycle((1.0, 0.5, 4.0, 2.5))
    for (component, name), weight in weights.items():
        if weight.dim() < 2 or "_embedding.weight" in name:
            continue
        rank, ones = next(rank_of), [1] * (weight.dim() - 2)
        down = torch.randn(rank, *weight.shape[1:], generator=generator)
        up = torch.randn(len(weight), rank, *ones, generator=generator)
        layers.append(Layer(component, _module(name), down, up, next(alpha_of)))
    return layers


def merged_by_hand(
    base: Mapping[Weight, Tensor],
    layers: Sequence[Layer],
    strengths: Mapping[str, float],
    *,
    with_alpha: bool,
) -> State:
    """Compute the weights that change, in fp64."""
    merged = {}
    for layer in layers:
        weight = layer.component, f"{layer.module}.weight"
        change = strengths[layer.component] * layer.change(with_alpha=with_alpha)
        merged[weight] = base[weight].double() + change.view_as(base[weight])
    return merged


def spelt(
    layers: Sequence[Layer],
    spelling: Spelling = SDXL["kohya, diffusers' names"],
    names: Mapping[str, str] = MappingProxyType({}),
) -> Tensors:
    """Write all layers into the tensors of one file; `names` are those of the UNet's modules."""
    tensors: Tensors = {}
    for layer in layers:
        module = names.get(layer.module, layer.module)
        parts = {"down": layer.down, "up": layer.up}
        tensors |= spelling.tensors(layer.component, module, parts, layer.alpha)
    return tensors


def lycoris_tensors(module: nn.Module, prefix: str) -> Tensors:
    """Return the tensors of a LyCORIS module under the names in its files."""
    state = module.custom_state_dict()  # type: ignore[operator] # its modules
    return {f"{prefix}.{name}": tensor.detach().clone() for name, tensor in state.items()}


def effect(layer: nn.Module, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the weight and the bias of a linear layer or an odd convolution from its outputs."""
    _, *sides = shape
    inputs = math.prod(sides)
    impulses = torch.eye(inputs).view(inputs, *sides)
    middle = tuple(side // 2 for side in sides[1:])
    with torch.no_grad():
        bias = layer(torch.zeros_like(impulses[:1]))[(0, slice(None), *middle)]
        answers = layer(impulses)[(slice(None), slice(None), *middle)]
    return (answers - bias).T.reshape(tuple(shape)), bias


def decomposed(base: Tensor, change: Tensor, scale: Tensor, weight: float) -> Tensor:
    """Apply `dora_scale` as ComfyUI and A1111 do: the weight scales the whole difference."""
    changed = base.double() + change.double()
    sides = [side for side in range(changed.dim()) if scale.shape[side] == 1]
    normed: Tensor = (
        changed / torch.linalg.vector_norm(changed, dim=sides, keepdim=True) * scale.double()
    )
    return base.double() + weight * (normed - base.double())


def merged_by_peft(home: Path, folder: Path, weight: float, options: dict[str, Any]) -> State:
    """Write a random LoRA of all components as diffusers does; return the weights peft merges."""
    from diffusers import StableDiffusionXLPipeline
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    assert LORA_ADAPTER_METADATA_KEY == "lora_adapter_metadata"
    torch.manual_seed(20260104)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_model(home), local_files_only=True)
    saved, changed = {}, {}
    for component in sdxl.SDXL.adapted:
        model = getattr(pipeline, component)
        inject_adapter_in_model(LoraConfig(**{"target_modules": PEFTS_TARGETS} | options), model)
        for name, parameter in model.named_parameters():
            if ".lora_magnitude_vector." in name:
                parameter.data.mul_(torch.rand_like(parameter) + 0.5)
            elif ".lora_" in name:
                parameter.data.normal_(std=0.5)
        saved[f"{component}_lora_layers"] = get_peft_model_state_dict(model)
        saved[f"{component}_lora_adapter_metadata"] = model.peft_config["default"].to_dict()
    pipeline.save_lora_weights(folder, weight_name="a.safetensors", **saved)
    for component in sdxl.SDXL.adapted:
        for name, layer in getattr(pipeline, component).named_modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(weight)
                layer.merge()
                base = layer.get_base_layer()
                changed[component, f"{name}.weight"] = base.weight.detach()
                if options.get("lora_bias"):
                    changed[component, f"{name}.bias"] = base.bias.detach()
    return changed


def saved_by_peft(home: Path, folder: Path, kind: str, options: dict[str, Any]) -> State:
    """Save a random adapter of the UNet as peft does; return the weights that peft merges."""
    import peft
    from diffusers import UNet2DConditionModel

    torch.manual_seed(20260106)
    unet = UNet2DConditionModel.from_pretrained(tiny_model(home) / "unet", local_files_only=True)
    targets = ["to_q", "to_k", "ff.net.2", "conv1", "conv_shortcut"]
    adapted = peft.get_peft_model(unet, getattr(peft, kind)(target_modules=targets, **options))
    for name, parameter in adapted.named_parameters():
        if ".lora_magnitude_vector." in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
        elif any(part in name for part in (".lora_", ".hada_", ".lokr_")):
            parameter.data.normal_(std=0.3)
    adapted.save_pretrained(folder)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    merged = adapted.merge_and_unload().state_dict()
    changed = {}
    for name, tensor in merged.items():
        old = before.get(name, before.get(f"{_module(name)}.base_layer.weight"))
        if old is not None and not torch.equal(tensor, old):
            changed["unet", name] = tensor
    return changed


def _module(name: str) -> str:
    return name.removesuffix(".weight")
