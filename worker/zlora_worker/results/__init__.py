"""Results: pixels become files in the store, the manifest last."""
