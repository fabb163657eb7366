"""peft's configuration as diffusers packs it into a LoRA file's header: what stands for `alpha` there."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, Final

FIELD: Final = "lora_adapter_metadata"
_PLAIN: Final = re.compile(r"\^?([\w.]+)\$?", re.ASCII)


class AdapterConfig:
    """Scales by module. Source: peft's `LoraConfig`; names have the component before them."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        """Raises `ValueError` where there is a configuration that cannot be understood."""
        try:
            packed = json.loads(metadata.get(FIELD, "{}"))
            self._values: dict[str, Any] = dict(packed)
            self._alphas = {
                key.partition(".")[0]: [
                    (_name(pattern), _number(alpha)) for pattern, alpha in (value or {}).items()
                ]
                for key, value in self._values.items()
                if key.endswith(".alpha_pattern")
            }
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"its {FIELD} cannot be read: {str(error)[:100]}") from None

    def scale(self, component: str, module: str, rank: int) -> float:
        """alpha / rank; 1 where the file says nothing. Raises `ValueError` for an alpha that is no number."""
        alpha = self._values.get(f"{component}.lora_alpha")
        for (name, anchored), own in self._alphas.get(component, ()):
            if module == name or (not anchored and module.endswith(f".{name}")):
                alpha = own
                break  # as peft: the first that fits
        if alpha is None:
            return 1.0
        return _number(alpha) / (rank**0.5 if self._values.get(f"{component}.use_rslora") else rank)


def _name(pattern: str) -> tuple[str, bool]:
    """The module's name that a pattern is. Expressions of strangers are never run: one can take for ever."""
    if found := _PLAIN.fullmatch(pattern):
        return found[1], pattern.startswith("^")
    raise ValueError(f"the pattern {pattern[:60]!r} is no module's name")


def _number(alpha: Any) -> float:
    try:
        number = float(alpha)
    except (OverflowError, TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"its {FIELD} has an alpha that is no number")
    return number
