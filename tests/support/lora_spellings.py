"""Names of modules and tensors in LoRA files, by the tool that writes them."""

from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from support.fakes import Tensors
from torch import Tensor

_OLD_ATTENTION: Final = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


class Spelling(NamedTuple):
    """How a tool names the modules of each component, and the factors of their LoRAs."""

    format: str  # in receipts
    prefixes: Mapping[str, str]  # by component; a component without one is not in the file
    down: str = ".lora_down.weight"
    up: str = ".lora_up.weight"
    is_flat: bool = False  # dots are underscores
    is_original: bool = False  # with the names, and the fused layers, of the model's own code
    is_processor: bool = False  # for attention alone, whose projections belong to a processor
    has_alpha: bool = True

    def has(self, component: str, module: str) -> bool:
        """Return whether a file may have a module."""
        is_attention = "self_attn." in module or (".attn" in module and ".to_" in module)
        return component in self.prefixes and (is_attention or not self.is_processor)

    def tensors(
        self, component: str, module: str, parts: Mapping[str, Tensor], alpha: float
    ) -> Tensors:
        """Name the tensors of a module, and alpha if this tool writes one."""
        # Only some releases of transformers have this prefix; in files it is one of `prefixes`.
        module = module.removeprefix("text_model.")
        if self.is_processor:
            block, _, leaf = module.removesuffix(".0").rpartition(".")
            processor = ".processor" if component == "unet" else ""
            module = f"{block}{processor}.{_OLD_ATTENTION.get(leaf, leaf)}"
        if self.is_flat:
            module = module.replace(".", "_")
        name = self.prefixes[component] + module
        suffixes = {"down": self.down, "up": self.up}
        if component.startswith("text_encoder") and self.down == ".lora.down.weight":
            suffixes = {part: f".lora_linear_layer.{part}.weight" for part in suffixes}
        found = {name + suffixes.get(part, f".{part}"): tensor for part, tensor in parts.items()}
        return found | ({f"{name}.alpha": torch.tensor(alpha)} if self.has_alpha else {})


_PEFT: Final = (".lora_A.weight", ".lora_B.weight")
_PEFT_NAMED: Final = (".lora_A.default.weight", ".lora_B.default.weight")


def _unet(prefix: str, text: str = "") -> dict[str, str]:
    """Return the prefixes of a UNet and its text encoders; `text` has fields for their names."""
    found = {"unet": prefix}
    if text:
        fields = ("text_encoder", "1", "l"), ("text_encoder_2", "2", "g")
        for name, number, letter in fields:
            found[name] = text.format(name=name, number=number, letter=letter)
    return found


_DIFFUSERS: Final = _unet("unet.", "{name}.text_model.")
_NUMBERED: Final = "lora_te{number}_text_model_"
_UNNUMBERED: Final = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}
_COMFYUI: Final = "text_encoders.clip_{letter}.transformer.text_model."

SDXL: Final[dict[str, Spelling]] = {
    "diffusers": Spelling("peft", _DIFFUSERS, *_PEFT, has_alpha=False),
    "diffusers with transformers 5": Spelling(
        "peft", _DIFFUSERS | {"text_encoder": "text_encoder."}, *_PEFT, has_alpha=False
    ),
    "diffusers, with alpha": Spelling("peft", _DIFFUSERS, *_PEFT),
    "diffusers, adapter's name": Spelling("peft", _DIFFUSERS, *_PEFT_NAMED, has_alpha=False),
    "diffusers, older": Spelling(
        "diffusers", _DIFFUSERS, ".lora.down.weight", ".lora.up.weight", has_alpha=False
    ),
    "diffusers, attention processors": Spelling(
        "diffusers",
        _DIFFUSERS,
        "_lora.down.weight",
        "_lora.up.weight",
        is_processor=True,
        has_alpha=False,
    ),
    "peft": Spelling("peft", _unet("base_model.model."), *_PEFT, has_alpha=False),
    "bare": Spelling("peft", _unet(""), *_PEFT, has_alpha=False),
    "bare, Stability's names": Spelling("unknown", _unet(""), is_original=True),
    "kohya": Spelling("kohya", _unet("lora_unet_", _NUMBERED), is_flat=True, is_original=True),
    "kohya, diffusers' names": Spelling("kohya", _unet("lora_unet_", _NUMBERED), is_flat=True),
    "LyCORIS": Spelling(
        "lycoris", _unet("lycoris_", "lycoris_te{number}_text_model_"), is_flat=True
    ),
    "OneTrainer": Spelling("onetrainer", _unet("lora_unet.", "lora_te{number}.text_model.")),
    "OneTrainer by component": Spelling("onetrainer", _unet("unet.", "clip_{letter}.text_model.")),
    "ComfyUI": Spelling("comfyui", _unet("diffusion_model.", _COMFYUI), is_original=True),
    "ComfyUI, factors of peft": Spelling(
        "comfyui", _unet("model.diffusion_model.", _COMFYUI), *_PEFT, is_original=True
    ),
}
SD15: Final[dict[str, Spelling]] = SDXL | {
    "kohya": Spelling("kohya", _UNNUMBERED, is_flat=True, is_original=True),
    "kohya, diffusers' names": Spelling("kohya", _UNNUMBERED, is_flat=True),
    "kohya with numbers": SDXL["kohya"],
    "OneTrainer": Spelling(
        "onetrainer", {"unet": "lora_unet.", "text_encoder": "lora_te.text_model."}
    ),
}


def _transformer(prefix: str) -> dict[str, str]:
    return {"transformer": prefix}


_OF_DIFFUSERS: Final[dict[str, Spelling]] = {
    "diffusers": Spelling("peft", _transformer("transformer."), *_PEFT, has_alpha=False),
    "diffusers, with alpha": Spelling("peft", _transformer("transformer."), *_PEFT),
    "diffusers, adapter's name": Spelling(
        "peft", _transformer("transformer."), *_PEFT_NAMED, has_alpha=False
    ),
    "diffusers, older": Spelling(
        "diffusers", _transformer("transformer."), ".lora.down.weight", ".lora.up.weight"
    ),
    "peft": Spelling("peft", _transformer("base_model.model."), *_PEFT, has_alpha=False),
    "bare": Spelling("peft", _transformer(""), *_PEFT, has_alpha=False),
    "kohya": Spelling("kohya", _transformer("lora_unet_"), is_flat=True),
    "kohya, two underscores": Spelling("kohya", _transformer("lora_unet__"), is_flat=True),
    "kohya, transformer": Spelling("kohya", _transformer("lora_transformer_"), is_flat=True),
    "LyCORIS": Spelling("lycoris", _transformer("lycoris_"), is_flat=True),
    "OneTrainer": Spelling("onetrainer", _transformer("transformer.")),
    "ComfyUI": Spelling("comfyui", _transformer("diffusion_model.")),
    "ai-toolkit": Spelling("comfyui", _transformer("diffusion_model."), *_PEFT, has_alpha=False),
}
_FUSED: Final = ("bare", "kohya", "kohya, two underscores", "LyCORIS", "ComfyUI", "ai-toolkit")
Z_IMAGE: Final[dict[str, Spelling]] = {
    **_OF_DIFFUSERS,
    **{f"{name}, fused": _OF_DIFFUSERS[name]._replace(is_original=True) for name in _FUSED},
    "single file, fused": Spelling(
        "comfyui", _transformer("model.diffusion_model."), *_PEFT, is_original=True
    ),
}
