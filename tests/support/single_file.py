"""Factory of one checkpoint in the original key layout, made from a diffusers folder.

Models are often distributed as one `.safetensors` file with the module names of Stability's code. A
real one has up to 6.9 GB; this module converts the tests' tiny pipelines into the same layout, so
that a test can load it and compare every tensor with its origin.

The layout, by prefix:

```
model.diffusion_model.             the UNet, its blocks counted through all levels
conditioner.embedders.0.           SDXL's text_encoder, in the names of transformers
conditioner.embedders.1.model.     SDXL's text_encoder_2, in the names of open_clip
cond_stage_model.transformer.      the text encoder of SD 1.x, in the names of transformers
cond_stage_model.model.            the text encoder of SD 2.x, in the names of open_clip
first_stage_model.                 the VAE, its decoder's levels counted from the finest
```
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from safetensors.torch import load_file, save_file

__all__ = ["original_layout", "write_single_file"]

State: TypeAlias = dict[str, torch.Tensor]

# Module names in a block: those of diffusers or transformers, then the original ones.
UNET_INNER: Final = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_INNER: Final = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP_INNER: Final = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def write_single_file(folder: Path, target: Path) -> Path:
    """Write the diffusers `folder` to `target` as one original checkpoint; return `target`."""
    known = ("unet", "vae", "text_encoder", "text_encoder_2")
    parts = [part for part in known if (folder / part).is_dir()]
    configs = {part: json.loads((folder / part / "config.json").read_text()) for part in parts}
    states: dict[str, State] = {}
    for part in parts:
        states[part] = {}
        for shard in sorted((folder / part).glob("*.safetensors")):
            states[part] |= load_file(shard)
    tensors = original_layout(configs, states)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target)
    return target


def original_layout(configs: Mapping[str, Mapping[str, Any]], states: Mapping[str, State]) -> State:
    """Return the tensors of all models under their original names.

    The keys of both mappings are the names of the component folders.
    """
    models = {
        "model.diffusion_model.": _moved(states["unet"], _unet_places(configs["unet"]), UNET_INNER),
        "first_stage_model.": _vae(configs["vae"], states["vae"]),
    }
    first = configs["text_encoder"]
    if "text_encoder_2" in configs:
        if first["hidden_size"] == configs["text_encoder_2"]["hidden_size"]:
            # diffusers distinguishes the two text encoders by their width only.
            raise ValueError("the text encoders must differ in hidden_size")
        models |= {
            "conditioner.embedders.0.transformer.text_model.": _clip(states["text_encoder"]),
            "conditioner.embedders.1.model.": _open_clip(
                configs["text_encoder_2"], states["text_encoder_2"]
            ),
        }
    elif first["hidden_act"] == "quick_gelu":  # OpenAI's CLIP
        models["cond_stage_model.transformer.text_model."] = _clip(states["text_encoder"])
    else:
        models["cond_stage_model.model."] = _open_clip(first, states["text_encoder"])
    return {
        prefix + key: tensor for prefix, model in models.items() for key, tensor in model.items()
    }


def _moved(state: State, places: Mapping[str, str], inner: Mapping[str, str]) -> State:
    """Rename the longest start of each key by `places`, and the rest of the module by `inner`.

    Raises `KeyError` if a key has no place.
    """
    moved: State = {}
    for key, tensor in state.items():
        module, _, leaf = key.rpartition(".")
        start = module
        while start not in places:
            if "." not in start:
                raise KeyError(f"no original place for {key}")
            start = start.rpartition(".")[0]
        rest = module[len(start) + 1 :]
        names = (places[start], inner.get(rest, rest), leaf)
        moved[".".join(name for name in names if name)] = tensor
    return moved


def _unet_places(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the original name of each block of the UNet.

    The original numbers its blocks through all levels. `input_blocks` contains `conv_in`, then each
    layer and each downsampler as a block. `output_blocks` has one layer more in each level, and the
    upsampler is in the block of the level's last layer. In a block the resnet is 0 and the
    attention is 1.
    """
    layers: int = config["layers_per_block"]
    places = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    block = 1
    for level, kind in enumerate(config["down_block_types"]):
        for layer in range(layers):
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{block}.0"
            if "CrossAttn" in kind:
                places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{block}.1"
            block += 1
        places[f"down_blocks.{level}.downsamplers.0.conv"] = (
            f"input_blocks.{block}.0.op"  # unused in the last level
        )
        block += 1
    block = 0
    for level, kind in enumerate(config["up_block_types"]):
        for layer in range(layers + 1):
            places[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{block}.0"
            if "CrossAttn" in kind:
                places[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{block}.1"
            block += 1
        slot = 2 if "CrossAttn" in kind else 1
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{block - 1}.{slot}.conv"
    return places


def _vae(config: Mapping[str, Any], state: State) -> State:
    """Rename the VAE's tensors; the original attention has 1x1 convolutions, not linear layers."""
    levels = len(config["block_out_channels"])
    layers: int = config["layers_per_block"]
    places = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        places |= {
            f"{side}.conv_in": f"{side}.conv_in",
            f"{side}.mid_block.resnets.0": f"{side}.mid.block_1",
            f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1",
            f"{side}.mid_block.resnets.1": f"{side}.mid.block_2",
            f"{side}.conv_norm_out": f"{side}.norm_out",
            f"{side}.conv_out": f"{side}.conv_out",
        }
    for level in range(levels):
        down, up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        places[f"encoder.down_blocks.{level}.downsamplers.0.conv"] = f"{down}.downsample.conv"
        places[f"decoder.up_blocks.{level}.upsamplers.0.conv"] = f"{up}.upsample.conv"
        for layer in range(layers + 1):  # the encoder has one layer less
            places[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"{down}.block.{layer}"
            places[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"{up}.block.{layer}"
    moved = _moved(state, places, VAE_INNER)
    return {
        key: tensor[:, :, None, None] if ".attn_1." in key and tensor.ndim == 2 else tensor
        for key, tensor in moved.items()
    }


def _clip(state: State) -> State:
    """Rename a text encoder's tensors, and add the `position_ids` of published checkpoints.

    Only some releases of transformers have the prefix `text_model.` here.
    """
    bare = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    positions = len(bare["embeddings.position_embedding.weight"])
    return {**bare, "embeddings.position_ids": torch.arange(positions)[None]}


def _open_clip(config: Mapping[str, Any], state: State) -> State:
    """Rename a text encoder's tensors; stack q, k and v, transpose the projection.

    Published checkpoints contain `logit_scale` from CLIP's training; no text encoder reads it.
    """
    bare = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    stacked: State = {
        "positional_embedding": bare.pop("embeddings.position_embedding.weight"),
        "logit_scale": torch.tensor(math.log(100.0)),
    }
    if "text_projection.weight" in bare:
        stacked["text_projection"] = bare.pop("text_projection.weight").T
    places = {"embeddings.token_embedding": "token_embedding", "final_layer_norm": "ln_final"}
    for layer in range(config["num_hidden_layers"]):
        old, new = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        places[old] = new
        for leaf in ("weight", "bias"):
            parts = [bare.pop(f"{old}.self_attn.{name}_proj.{leaf}") for name in "qkv"]
            stacked[f"{new}.attn.in_proj_{leaf}"] = torch.cat(parts)
    return stacked | _moved(bare, places, OPEN_CLIP_INNER)
