"""Scales from peft's configuration, which diffusers writes into a LoRA file's header."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

FIELD: Final = "lora_adapter_metadata"
_MODULE_NAME: Final = re.compile(r"\^?([\w.]+)\$?", re.ASCII)


class AdapterConfig:
    """Scale of each module. Source: peft's `LoraConfig`, its keys prefixed with the component."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        """Parse the header's metadata; raise `ValueError` if the configuration is malformed."""
        try:
            self._values: dict[str, Any] = dict(json.loads(metadata.get(FIELD, "{}")))
            self._alphas = {
                key.partition(".")[0]: [
                    (*_parse_pattern(pattern), _number(alpha))
                    for pattern, alpha in (value or {}).items()
                ]
                for key, value in self._values.items()
                if key.endswith(".alpha_pattern")
            }
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"its {FIELD} cannot be read: {str(error)[:100]}") from None

    def scale(self, component: str, module: str, rank: int) -> float:
        """Return alpha / rank, or 1 if the file has no alpha for the module.

        Raises `ValueError` if the alpha is not a number.
        """
        alpha = self._values.get(f"{component}.lora_alpha")
        for name, anchored, pattern_alpha in self._alphas.get(component, ()):
            if module == name or (not anchored and module.endswith(f".{name}")):
                alpha = pattern_alpha
                break  # peft uses the first pattern that matches
        if alpha is None:
            return 1.0
        divisor = rank**0.5 if self._values.get(f"{component}.use_rslora") else rank
        return _number(alpha) / float(divisor)


def _parse_pattern(pattern: str) -> tuple[str, bool]:
    """Return the module name in a pattern, and True if the pattern is anchored at the start.

    Regular expressions from files are never executed, because one can run for ever.
    """
    if found := _MODULE_NAME.fullmatch(pattern):
        return found[1], pattern.startswith("^")
    raise ValueError(f"the pattern {pattern[:60]!r} is not a module name")


def _number(alpha: Any) -> float:
    try:
        number = float(alpha)
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"its {FIELD} has an alpha that is not a number")
    return number
