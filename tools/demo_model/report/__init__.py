"""Report on the demo model, as numbers and a grid of images: `make demo-model-report`."""
