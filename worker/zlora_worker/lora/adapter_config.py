"""Scales from peft's configuration of an adapter.

diffusers writes it into the header of a LoRA file, peft into a file beside the LoRA file.
"""

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Self

import regex
from zlora.lora.peft_config import CONFIG_FILE, HEADER_CONFIG, MAX_CONFIG

_MAX_PATTERNS: Final = 4096  # SDXL has 986 layers
_MAX_EXPRESSIONS: Final = 1000  # patterns that are not names
_MAX_PATTERN: Final = 256  # characters; the longest name of a layer has 80
_MAX_SECONDS: Final = 1.0  # for all regular expressions of a file

# A dot stands for itself, escaped or not: names of layers differ in other characters.
_MODULE_NAME: Final = re.compile(r"(\^?)((?:[\w.]|\\\.)+)\$?", re.ASCII)
# Field with the alpha, by peft's type.
_ALPHAS: Final = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
# Beginnings of `init_lora_weights` with which peft changes the base model before the training.
_CHANGED_BASE: Final = ("pissa", "olora", "corda", "lora_ga", "loftq")
# Fields of kinds that are not `up @ down`; `use_dora` shows in the tensors.
_OTHER_KINDS: Final = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)


class Scales:
    """Scales of the modules of one file that have no `alpha` tensor.

    In this order: the configuration in the header, the one beside the file, the request's alpha.
    `assumed` is set if a module of peft had none of them, and got the scale 1.
    """

    def __init__(
        self, metadata: Mapping[str, str], *, beside: bytes | None, alpha: float | None
    ) -> None:
        """Raise `ValueError` if a configuration is malformed or not supported."""
        self._in_header = AdapterConfig.in_header(metadata)
        self._beside = None if beside is None else AdapterConfig.beside(beside)
        self._alpha, self._alpha_is_used = alpha, False
        self.assumed = False

    def of(self, component: str, names: Sequence[str], rank: int | None, *, is_peft: bool) -> float:
        """Return the scale of a module by its names; raise `ValueError` if it cannot be known."""
        config = self._in_header.get(component)
        if config and (scale := config.scale(names, rank)) is not None:
            return scale
        if self._beside:
            return self._beside.require_scale(names, rank)
        if self._alpha is not None and rank:
            self._alpha_is_used = True
            return self._alpha / rank
        self.assumed |= is_peft
        return 1.0

    def require_alpha_used(self) -> None:
        """Raise `ValueError` if the request has an alpha that no module of the file needs."""
        if self._alpha is not None and not self._alpha_is_used:
            raise ValueError("the request names an alpha, but the file has its own")


class AdapterConfig:
    """peft's configuration of one component, or of a whole file.

    A module has the name that the file has of it, and that of diffusers; patterns may be for either
    one. The first name that a pattern matches counts.

    Any method raises `ValueError` if the configuration is malformed or not supported.
    """

    def __init__(self, fields: Mapping[str, Any], *, name: str) -> None:
        """`name` stands for the configuration in messages."""
        self._name, self._fields = name, fields
        start = str(fields.get("init_lora_weights")).lower()
        if start.startswith(_CHANGED_BASE):
            raise ValueError(
                f"{name}: trained by {start[:20]} on a changed base model, and not converted: "
                "save it with `path_initial_model_for_weight_conversion` of peft's save_pretrained"
            )
        if used := [field for field in _OTHER_KINDS if fields.get(field)]:
            raise ValueError(f"{name}: `{used[0]}` is not supported")
        self._seconds_left = _MAX_SECONDS
        self._alphas = self._patterns("alpha_pattern")
        self._ranks = self._patterns("rank_pattern")

    @classmethod
    def in_header(cls, metadata: Mapping[str, str]) -> dict[str, Self]:
        """Return the configuration of each component: in the header, its name is a prefix."""
        components: dict[str, dict[str, Any]] = {}
        for key, value in _read(metadata.get(HEADER_CONFIG, "{}"), name=HEADER_CONFIG).items():
            component, _, field = key.partition(".")
            components.setdefault(component, {})[field] = value
        return {
            component: cls(fields, name=HEADER_CONFIG) for component, fields in components.items()
        }

    @classmethod
    def beside(cls, document: bytes) -> Self:
        """Return the configuration in the file that peft writes beside a LoRA."""
        return cls(_read(document, name=CONFIG_FILE), name=CONFIG_FILE)

    def scale(self, names: Sequence[str], rank: int | None) -> float | None:
        """Return alpha / rank; None if the configuration has no alpha.

        `rank` is None for factors without a rank: then the configuration's rank counts.
        """
        alpha = _first(self._alphas, names)
        if alpha is None:
            kind = str(self._fields.get("peft_type", "LORA")).upper()
            alpha = self._fields.get(_ALPHAS.get(kind, "lora_alpha"))
        if rank is None:
            rank = self.rank(names)
        if alpha is None or not rank:
            return None
        divisor = rank**0.5 if self._fields.get("use_rslora") else rank
        return self._number(alpha) / float(divisor)

    def rank(self, names: Sequence[str]) -> int | None:
        """Return the rank that the configuration names for a module."""
        rank = _first(self._ranks, names)
        if rank is None:
            rank = self._fields.get("r")
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise ValueError(f"its {self._name} has a rank that is not a number")
        return rank

    def require_scale(self, names: Sequence[str], rank: int | None) -> float:
        """Return the scale; raise `ValueError` unless the configuration is that of this file."""
        kind = str(self._fields.get("peft_type"))
        if kind.upper() not in _ALPHAS:
            raise ValueError(f"its {self._name} is of the type {kind[:30]}, which is not supported")
        named = self.rank(names)
        if named is None or rank not in (None, named):
            raise ValueError(
                f"its {self._name} is that of another file: it names the rank {named} for "
                f"{names[0]}; `config_sha256: none` uses no such file"
            )
        if (scale := self.scale(names, rank)) is None:
            raise ValueError(f"its {self._name} has no alpha")
        return scale

    def _patterns(self, field: str) -> Callable[[str], Any]:
        """Return a function from a module's name to the value of the first pattern that matches.

        Plain names, of which there may be one for each module, are looked up. Others are regular
        expressions, which are matched with a limit of time: an untrusted one can run for ever.
        """
        table = self._fields.get(field) or {}
        if not isinstance(table, dict):
            raise ValueError(  # noqa: TRY004 - as all errors of a file
                f"its {self._name} cannot be read: {field} is not an object"
            )
        if len(table) > _MAX_PATTERNS:
            raise ValueError(
                f"its {self._name} has {len(table)} patterns, at most {_MAX_PATTERNS} are read"
            )
        values = list(table.values())
        plain: dict[str, int] = {}
        expressions: list[tuple[int, Any]] = []
        for index, pattern in enumerate(table):
            if len(pattern) > _MAX_PATTERN:
                raise ValueError(
                    f"its {self._name} has a pattern of {len(pattern)} characters, "
                    f"at most {_MAX_PATTERN} are read"
                )
            if found := _MODULE_NAME.fullmatch(pattern):
                plain.setdefault(found[1] + found[2].replace("\\", ""), index)
                continue
            if len(expressions) == _MAX_EXPRESSIONS:
                raise ValueError(
                    f"its {self._name} has more than {_MAX_EXPRESSIONS} regular expressions"
                )
            try:
                expressions.append((index, regex.compile(rf"(.*\.)?({pattern})$")))
            except (regex.error, RecursionError, OverflowError):
                raise ValueError(
                    f"its {self._name} has the pattern {pattern[:60]!r}, "
                    "which is not a regular expression"
                ) from None

        def value_of(module: str) -> Any:
            parts = module.split(".")
            names = [".".join(parts[start:]) for start in range(len(parts))]
            first = min(
                (plain[name] for name in (f"^{module}", *names) if name in plain),
                default=len(values),
            )
            for index, expression in expressions:
                if index > first:
                    break
                if self._matches(expression, module):
                    first = index
                    break
            return values[first] if first < len(values) else None

        return value_of

    def _matches(self, expression: Any, module: str) -> bool:
        start = time.perf_counter()
        try:
            return expression.match(module, timeout=max(self._seconds_left, 1e-3)) is not None
        except TimeoutError:
            raise ValueError(
                f"the patterns of its {self._name} take more than {_MAX_SECONDS:g} s"
            ) from None
        finally:
            self._seconds_left -= time.perf_counter() - start

    def _number(self, alpha: Any) -> float:
        try:
            number = float(alpha)
        except (OverflowError, TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"its {self._name} has an alpha that is not a number")
        return number


def _first(value_of: Callable[[str], Any], names: Sequence[str]) -> Any:
    """Return the value of the first name that has one; None if no name has."""
    return next((value for value in map(value_of, names) if value is not None), None)


def _read(document: bytes | str, *, name: str) -> dict[str, Any]:
    if len(document) > MAX_CONFIG:
        raise ValueError(f"its {name} has {len(document)} bytes, at most {MAX_CONFIG} are read")
    try:
        return dict(json.loads(document))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"its {name} cannot be read: {str(error)[:100]}") from None
