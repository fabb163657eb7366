"""Results: images become files in the store, and the manifest follows last."""
