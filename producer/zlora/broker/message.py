"""Messages of Celery, as producers write them and workers read them."""

from collections.abc import Mapping
from typing import Any, Final

from zlora.broker.keys import RECORD_EXPIRES

SUBMITTED_AT: Final = (
    "zlora_submitted_at"  # message header: seconds since the epoch on the producer's clock
)


def submitted_at(headers: Mapping[str, Any], now: float) -> float | None:
    """When a message's job was submitted, seconds since the epoch; None where its header is no time that can be meant.

    The header is anybody's to write. A clock that is ahead of this one may make it later than `now`.
    """
    said: Any = headers.get(SUBMITTED_AT)
    if type(said) in (int, float) and now - RECORD_EXPIRES < said < now + RECORD_EXPIRES:
        return float(said)
    return None
