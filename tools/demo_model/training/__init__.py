"""How the demo model's weights were made: `make demo-model` runs all of it, on drawn pictures alone."""
