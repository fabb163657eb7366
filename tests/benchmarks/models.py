"""SDXL with random weights: in its true shape (REAL), and with few numbers (THIN).

Both have SDXL's own configuration from the package, so that kohya's names and the number of modules
are the real ones: 722 linear layers of the UNet and 264 of the text encoders are what trainers
adapt.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from zlora_worker import model

SDXL_CONFIG: Final = Path(model.__path__[0], "sdxl")  # the loader may be replaced in this process
UNET_TARGETS: Final = re.compile(
    r"attn[12]\.to_(q|k|v|out\.0)$|ff\.net\.(0\.proj|2)$|proj_(in|out)$"
)
TEXT_TARGETS: Final = re.compile(r"self_attn\.(q|k|v|out)_proj$|mlp\.fc[12]$")
_THIN_UNET: Final = {
    "block_out_channels": (32, 64, 128),
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 192,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 128 + 6 * 8,
}
_THIN_TEXT: Final = (
    {"hidden_size": 64, "intermediate_size": 256, "projection_dim": 64, "num_attention_heads": 2},
    {"hidden_size": 128, "intermediate_size": 512, "projection_dim": 128, "num_attention_heads": 4},
)


def build(*, thin: bool, dtype: torch.dtype = torch.bfloat16) -> StableDiffusionXLPipeline:
    """Return a pipeline with random weights. REAL in bf16 takes 7 GB and about ten seconds."""
    modules = {name: _filled(module, dtype) for name, module in without_numbers(thin=thin).items()}
    tokenizer = CLIPTokenizer.from_pretrained(SDXL_CONFIG / "tokenizer")
    return StableDiffusionXLPipeline(
        **modules,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler.from_pretrained(SDXL_CONFIG / "scheduler"),
        add_watermarker=False,
    )


def without_numbers(*, thin: bool) -> dict[str, nn.Module]:
    """Return all components on PyTorch's meta device; its weights have shapes only."""
    unet = dict(UNet2DConditionModel.load_config(SDXL_CONFIG / "unet")) | (
        _THIN_UNET if thin else {}
    )
    texts = [_text_config(folder, thin=thin) for folder in ("text_encoder", "text_encoder_2")]
    vae = dict(AutoencoderKL.load_config(SDXL_CONFIG / "vae")) | (
        {"block_out_channels": (32, 32, 32, 32)} if thin else {}
    )
    with torch.device("meta"):
        return {
            "unet": UNet2DConditionModel.from_config(unet),
            "text_encoder": CLIPTextModel(texts[0]),
            "text_encoder_2": CLIPTextModelWithProjection(texts[1]),
            "vae": AutoencoderKL.from_config(vae),
        }


def unet_on_meta() -> UNet2DConditionModel:
    """Return REAL's UNet without numbers: enough to read LoRA files for it."""
    with torch.device("meta"):
        unet: UNet2DConditionModel = UNet2DConditionModel.from_config(
            UNet2DConditionModel.load_config(SDXL_CONFIG / "unet")
        )
    return unet


def write_lora(
    pipeline: StableDiffusionXLPipeline,
    path: Path,
    *,
    rank: int,
    with_text: bool,
    seed: int,
    unet_targets: re.Pattern[str] = UNET_TARGETS,
) -> Path:
    """Write fp16 factors under peft's names; each delta has a tenth of its weight's norm."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for component, name, module in targets(
        pipeline.components, with_text=with_text, unet_targets=unet_targets
    ):
        out, columns = module.weight.shape
        down = torch.randn(rank, columns, generator=generator) / columns**0.5
        up = (
            torch.randn(out, rank, generator=generator)
            * (0.1 * float(module.weight.detach().float().std()) * columns**0.5)
            / rank**0.5
        )
        spelt = name if component == "unet" else f"text_model.{name.removeprefix('text_model.')}"
        tensors[f"{component}.{spelt}.lora_A.weight"] = down.half()
        tensors[f"{component}.{spelt}.lora_B.weight"] = up.half()
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def targets(
    components: Mapping[str, nn.Module],
    *,
    with_text: bool,
    unet_targets: re.Pattern[str] = UNET_TARGETS,
) -> Iterator[tuple[str, str, nn.Linear]]:
    """Return the linear layers that trainers adapt, as component, name and module."""
    for component, pattern in (
        ("unet", unet_targets),
        ("text_encoder", TEXT_TARGETS),
        ("text_encoder_2", TEXT_TARGETS),
    ):
        if component == "unet" or with_text:
            for name, module in components[component].named_modules():
                if pattern.search(name):
                    yield component, name, module


def step_inputs(unet: UNet2DConditionModel, *, side: int = 256) -> dict[str, Any]:
    """Return the inputs of one denoising step of a square image with guidance."""
    generator = torch.Generator().manual_seed(6)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(unet.device, unet.dtype)

    pooled = (
        unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    )
    ids = torch.tensor([[side, side, 0, 0, side, side]] * 2).to(unet.device, unet.dtype)
    return {
        "sample": noise(2, 4, side // 8, side // 8),
        "timestep": torch.tensor(500, device=unet.device),
        "encoder_hidden_states": noise(2, 77, unet.config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": noise(2, pooled), "time_ids": ids},
    }


def _text_config(folder: str, *, thin: bool) -> CLIPTextConfig:
    config: dict[str, Any] = json.loads((SDXL_CONFIG / folder / "config.json").read_text())
    return CLIPTextConfig(**config | (_THIN_TEXT[folder.endswith("2")] if thin else {}))


def _filled(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Fill a module from a pool of random numbers; 7 GB of new ones take minutes."""
    pool = torch.randn(2**22, generator=torch.Generator().manual_seed(1)).to(dtype)
    module.to(dtype).to_empty(device="cpu")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name.endswith("position_ids"):
            tensor.copy_(torch.arange(tensor.shape[-1]).expand_as(tensor))
        elif tensor.dim() < 2:  # biases are zeros, and the weights of norms ones
            tensor.data.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            flat = tensor.data.view(-1)
            for start in range(0, len(flat), len(pool)):
                part = flat[start : start + len(pool)]
                part.copy_(pool[: len(part)]).mul_(0.5 / tensor[0].numel() ** 0.5)
    return module.eval()
