"""Training of the demo model on drawn images; `make demo-model` runs all stages."""
