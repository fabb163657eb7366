"""peft's configuration of an adapter, which has the alpha of files of peft.

diffusers writes it into a field of the header, peft into a file beside the LoRA. The worker reads
it (`zlora_worker.lora.adapter_config`).
"""

from typing import Final

from zlora.lora import key_names
from zlora.lora.safetensors_header import Header

HEADER_CONFIG: Final = "lora_adapter_metadata"
CONFIG_FILE: Final = "adapter_config.json"
MAX_CONFIG: Final = 2**20  # bytes; one with a pattern for each layer of SDXL has 150 KB


def lacks_alpha(header: Header) -> bool:
    """Return whether a file of peft has no alpha: then a file beside it may have one."""
    names = header.tensors
    return (
        HEADER_CONFIG not in header.metadata
        and any(map(key_names.is_peft, names))
        and not any(name.endswith(".alpha") for name in names)
    )
