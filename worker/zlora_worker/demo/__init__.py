"""The demo model: a tiny SDXL with random weights, made on the spot. It draws textures, no scenes."""
