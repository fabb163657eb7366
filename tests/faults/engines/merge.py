"""Replaces `zlora_worker.lora.merge`: a LoRA with its weights, and no arithmetic."""

from dataclasses import dataclass

from zlora_worker.lora.reader import Lora


@dataclass(frozen=True, kw_only=True)
class WeightedLora:
    """One LoRA with the weights of a job."""

    lora: Lora
    unet_weight: float = 1.0
    text_encoder_weight: float = 1.0
    schedule: tuple[tuple[float, float], ...] = ()
    blocks: tuple[tuple[str, float], ...] = ()
    source: str = "the LoRA"

    @property
    def key(self) -> tuple[object, ...]:
        """Everything that the merged weights would depend on."""
        return self.lora.digest, self.unet_weight, self.text_encoder_weight, self.blocks
