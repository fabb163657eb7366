"""HTTP requests to hosts that jobs name: guarded against SSRF, bounded in time and size."""
