"""Logs, metrics, and the short form of results that Flower shows."""
