"""Addresses and headers of LoRA files, as far as they can be checked without torch."""
