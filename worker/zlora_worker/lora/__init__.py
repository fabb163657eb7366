"""LoRA files become weights merged into the base model."""
