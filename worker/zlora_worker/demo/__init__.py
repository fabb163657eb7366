"""The demo: a tiny SDXL model with LoRAs, and the command that draws with them."""
