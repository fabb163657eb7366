"""Pauses between tries."""

import random


def jittered(seconds: float, spread: float = 0.25) -> float:
    """Return `seconds` changed at random by up to `spread` of it, so that retries do not align."""
    return seconds * random.uniform(1 - spread, 1 + spread)  # noqa: S311 - not a secret
