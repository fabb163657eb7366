"""In place of `zlora_worker.lora.merge`."""

from dataclasses import dataclass

from zlora_worker.lora.reader import Lora


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One LoRA with the weights of a job."""

    lora: Lora
    unet_weight: float = 1.0
    text_encoder_weight: float = 1.0
    source: str = "the LoRA"
