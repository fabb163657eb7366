"""LoRA addresses and headers, as far as they can be checked without torch."""
