"""The demo: a tiny SDXL and its LoRAs, which are part of the package, and what draws with them."""
