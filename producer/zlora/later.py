"""Documents that a later version has written: what it has added is passed over.

A request that is submitted is read strictly, so that a misspelt field is no silent default; one that was drawn is a
record, and what it says in known fields stays true.
"""

from typing import Any

import msgspec

from zlora.schema import Asset, GenerateRequest, GenerateResult, LoraSpec


class TolerantAsset(Asset, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """An `Asset` with fields that are not known here."""


class TolerantLoraSpec(LoraSpec, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A `LoraSpec` with fields that are not known here."""

    file: TolerantAsset


class TolerantRequest(GenerateRequest, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A `GenerateRequest` with fields that are not known here."""

    loras: tuple[TolerantLoraSpec, ...] = ()


class _LaterResult(GenerateResult, frozen=True, kw_only=True):
    request: TolerantRequest | None = None


def parse_result(document: bytes | str | dict[str, Any]) -> GenerateResult:
    """A result from JSON or its data; raises `msgspec.DecodeError`, or its kind `msgspec.ValidationError`."""
    if isinstance(document, dict):
        found = msgspec.convert(document, _LaterResult)
    else:
        found = msgspec.json.decode(document, type=_LaterResult)
    return msgspec.convert(msgspec.to_builtins(found), GenerateResult)
