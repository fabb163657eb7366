"""The `LoraError` of each failed HTTP request for a LoRA, for workers and for preflight."""

from typing import Any, Final

from zlora.errors import (
    LoraError,
    LoraForbidden,
    LoraNotAllowed,
    LoraNotFound,
    LoraTooLarge,
    LoraUnreachable,
)
from zlora.http.client import AddressRefused, BodyTooLarge, CertificateRefused, HttpError

# The first line that has the status decides; every other status is `LoraUnreachable`.
_BY_STATUS: Final[tuple[tuple[frozenset[int], type[LoraError]], ...]] = (
    (frozenset({404, 410}), LoraNotFound),
    (frozenset({408, 425, 429}), LoraUnreachable),
    (frozenset(range(400, 500)), LoraForbidden),
)
_BY_CLASS: Final[dict[type[HttpError], type[LoraError]]] = {
    AddressRefused: LoraNotAllowed,
    CertificateRefused: LoraNotAllowed,
    BodyTooLarge: LoraTooLarge,
}


def lora_error(error: HttpError, *, name: str) -> LoraError:
    """Return the error to raise for a LoRA; `name` is its address without secrets."""
    kind = _BY_CLASS.get(type(error), LoraUnreachable)
    details: dict[str, Any] = {}
    if error.status is not None:
        details["status"] = int(error.status)
        kind = next((kind for statuses, kind in _BY_STATUS if error.status in statuses), kind)
    if error.transient and error.retry_after is not None:
        details["retry_after"] = error.retry_after
    return kind(f"{name}: {error}", details)
