"""Module names of the base model in every spelling that a LoRA file may use."""

import re
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from zlora.lora.key_names import DENOISERS, PREFIXES, SINGLE_TEXT_ENCODER, normalized

Module = tuple[str, str]  # component, and the module's name in it

_LDM_RESNET: Final = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_LDM_STEM: Final = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
# Names of Z-Image's original code for those of diffusers' classes.
_ORIGINAL_NAMES: Final = (
    ("all_final_layer.2-1.", "final_layer."),
    ("all_x_embedder.2-1", "x_embedder"),
    (".attention.to_out.0", ".attention.out"),
    (".attention.norm_q", ".attention.q_norm"),
    (".attention.norm_k", ".attention.k_norm"),
)
_OLD_ATTENTION: Final = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


class Layer(NamedTuple):
    """A layer that a file names: a module of the base model, or several that are one layer there.

    The outputs of such a fused layer are those of its modules, in their order.
    """

    component: str
    name: str  # as messages have it: that of the module, or of the fused layer
    modules: tuple[str, ...]


class KeyMap:
    """Modules of one base model by every spelling of their names.

    Numbers of blocks are counted in the model, so that another depth needs no table.
    """

    def __init__(self, modules: Iterable[Module]) -> None:
        """Derive the spellings; raise `ValueError` if two modules would share a spelling."""
        modules = list(modules)
        components = {component for component, _ in modules}
        ldm = LdmNames(name for component, name in modules if component == "unet")
        self._layers: dict[str, Layer] = {}
        layers = [Layer(component, name, (name,)) for component, name in modules]
        for component, name, own in [*layers, *_fused(modules)]:
            prefixes = PREFIXES.get(component, (component,))
            if component == "text_encoder" and "text_encoder_2" not in components:
                prefixes += (SINGLE_TEXT_ENCODER,)
            for alias in _aliases(component, name, ldm):
                for prefix in prefixes:
                    spelling = normalized(f"{prefix}.{alias}" if prefix else alias)
                    layer = Layer(component, name, own)
                    if (known := self._layers.setdefault(spelling, layer)) != layer:
                        raise ValueError(
                            f"two modules are spelt {spelling}: {name} and {known.name}"
                        )

    def find(self, spelling: str) -> Layer | None:
        """Return the layer with this spelling, or None if the model has no such layer."""
        return self._layers.get(normalized(spelling))


class LdmNames:
    """Names of a UNet's modules in Stability's code, which numbers blocks through all levels."""

    def __init__(self, modules: Iterable[str]) -> None:
        """Count levels and layers from diffusers' names of the modules."""
        self._blocks: dict[str, str] = {}
        parts = {".".join(name.split(".")[:4]) for name in modules}
        self._number_down(parts)
        self._number_up(parts)
        middle = [
            name
            for name in ("resnets.0", "attentions.0", "resnets.1")
            if _has(parts, f"mid_block.{name}")
        ]
        self._blocks |= {
            f"mid_block.{name}": f"middle_block.{index}" for index, name in enumerate(middle)
        }

    def of(self, module: str) -> str | None:
        """Return Stability's name of a module, or None if it has none."""
        if module in _LDM_STEM:
            return _LDM_STEM[module]
        for depth in (5, 4, 3):
            head = ".".join(module.split(".")[:depth])
            if head in self._blocks:
                inner = module[len(head) + 1 :]
                if "resnets" in head:
                    inner = _LDM_RESNET.get(inner, inner)
                return f"{self._blocks[head]}.{inner}".removesuffix(".")
        return None

    def _number_down(self, parts: set[str]) -> None:
        number = 1  # 0 is the first convolution
        for level in _counted(parts, "down_blocks.{}"):
            for layer in _counted(parts, f"{level}.resnets.{{}}"):
                self._blocks[layer] = f"input_blocks.{number}.0"
                self._blocks[layer.replace("resnets", "attentions")] = f"input_blocks.{number}.1"
                number += 1
            if _has(parts, f"{level}.downsamplers.0"):
                self._blocks[f"{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
                number += 1

    def _number_up(self, parts: set[str]) -> None:
        number = 0
        for level in _counted(parts, "up_blocks.{}"):
            for layer in _counted(parts, f"{level}.resnets.{{}}"):
                self._blocks[layer] = f"output_blocks.{number}.0"
                self._blocks[layer.replace("resnets", "attentions")] = f"output_blocks.{number}.1"
                number += 1
            # The upsampler comes last in the block of the level's last layer.
            after = 2 if _has(parts, f"{level}.attentions.0") else 1
            self._blocks[f"{level}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{after}.conv"


def _fused(modules: Iterable[Module]) -> Iterator[Layer]:
    """Yield the layers of Z-Image's original code that have queries, keys and values in one."""
    for component, name in modules:
        if component == "transformer" and name.endswith(".attention.to_q"):
            block = name.removesuffix("to_q")
            yield Layer(component, f"{block}qkv", tuple(f"{block}to_{part}" for part in "qkv"))


def _aliases(component: str, name: str, ldm: LdmNames) -> Iterator[str]:
    """Yield the module's own name and its names in older code and other tools."""
    yield name
    if component == "unet" and (other := ldm.of(name)):
        yield other
    if component == "transformer":
        original = name
        for own, other in _ORIGINAL_NAMES:
            original = original.replace(own, other)
        if original != name:
            yield original
    if component in DENOISERS and name.endswith(".to_out.0"):
        yield f"{name.removesuffix('.to_out.0')}.processor.to_out"
    elif ".attn" in name and (found := re.fullmatch(r"(.+)\.(to_[qkv])", name)):
        yield f"{found[1]}.processor.{found[2]}"
    if component.startswith("text_encoder"):
        bare = name.removeprefix("text_model.")  # only some releases of transformers have it
        for spelt in (bare, f"text_model.{bare}"):
            if spelt != name:
                yield spelt
            block, _, leaf = spelt.rpartition(".")
            if leaf in _OLD_ATTENTION:
                yield f"{block}.{_OLD_ATTENTION[leaf]}"


def _has(parts: set[str], block: str) -> bool:
    return any(part == block or part.startswith(f"{block}.") for part in parts)


def _counted(parts: set[str], block: str) -> Iterator[str]:
    """Yield the names of the existing blocks, counted from 0."""
    number = 0
    while _has(parts, block.format(number)):
        yield block.format(number)
        number += 1
