"""HTTP requests to hosts that a producer names: guarded, bounded in time and size."""
