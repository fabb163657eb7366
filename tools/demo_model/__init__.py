"""Draw, train and measure the demo model that ships with the worker."""
