"""From LoRA files to weights that are merged into the base model."""
