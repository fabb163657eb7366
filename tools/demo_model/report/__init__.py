"""What the demo model reaches, in numbers and as a grid of pictures: `make demo-model-report`."""
