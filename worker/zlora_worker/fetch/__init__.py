"""Fetch: the address of a LoRA becomes a checked file in the disk cache."""
