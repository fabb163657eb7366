"""The sidecar: the helper process beside each worker."""
