"""Names of the base model's modules in Stability's code."""

from typing import Any, Final

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers
from zlora_worker.lora.key_map import LdmNames
from zlora_worker.model.families.sdxl import CONFIG

WAYS: Final = {
    "down_blocks": "input_blocks",
    "mid_block": "middle_block",
    "up_blocks": "output_blocks",
}


def leaves(unet: Any) -> list[str]:
    """List the modules that have weights of their own."""
    return sorted({name.rpartition(".")[0] for name, _ in unet.named_parameters()})


def block_of(module: str) -> str:
    """Return the start of a name that diffusers' converter returns for a module."""
    way, *numbers = module.split(".")[: 3 if module.startswith("mid_block") else 4]
    return "_".join(["lora_unet", WAYS[way], *numbers, ""])


@pytest.mark.parametrize("layers", [1, 2])
def test_block_numbers_of_stability_are_those_that_diffusers_converts(layers: int) -> None:
    """SDXL's own UNet has two layers in each block."""
    config = dict(UNet2DConditionModel.load_config(CONFIG / "unet")) | {"layers_per_block": layers}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    modules = leaves(unet)
    inside = [module for module in modules if module.partition(".")[0] in WAYS]
    ldm = LdmNames(modules)
    theirs = {f"lora_unet_{ldm.of(module)}".replace(".", "_"): module for module in inside}

    converted = _maybe_map_sgm_blocks_to_diffusers(dict(theirs), unet.config)

    assert sorted(converted.values()) == sorted(theirs.values()) == inside
    assert [key for key, module in converted.items() if not key.startswith(block_of(module))] == []
    assert None not in map(ldm.of, modules)
