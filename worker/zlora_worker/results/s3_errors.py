"""What S3's answers mean: what passes, what is refused for good, and what is tried again."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, TypeVar

from zlora.errors import StoreFailed

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

# Seconds between tries of what botocore does not try again, as a write that meets another one of the same key.
_PAUSES: Final = (0.1, 0.2, 0.4)
# What S3 answers where a body or a part came to harm on the way, or an upload's end was heard and its answer lost.
_PASSING: Final = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "NoSuchUpload",
        "XAmzContentChecksumMismatch",
        "XAmzContentSHA256Mismatch",
    }
)
# Of statuses that refuse, those that are of the moment; and so are these codes, whatever their status.
_OF_THE_MOMENT: Final = (
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.CONFLICT,
    HTTPStatus.TOO_MANY_REQUESTS,
)
_BUSY: Final = frozenset({"RequestTimeout", "SlowDown"})

_T = TypeVar("_T")


def created(create: Callable[[], object]) -> bool:
    """Whether `create` has created its object; False where there is one already."""
    from botocore.exceptions import ClientError

    try:
        persistent(create)
    except ClientError as error:
        # Perhaps by this very call: where an answer is lost botocore asks again, and meets its own first try. That is
        # well, since the caller adopts what is there.
        if _status(error) == HTTPStatus.PRECONDITION_FAILED:
            return False
        raise
    return True


def persistent(act: Callable[[], _T]) -> _T:
    """What `act` returns, in a few tries where it fails in a way that passes, and that botocore takes for final."""
    from botocore.exceptions import BotoCoreError, ClientError

    for pause in _PAUSES:
        try:
            return act()
        except (BotoCoreError, ClientError) as error:
            if not _passes(error):
                raise
        time.sleep(pause)
    return act()


def _passes(error: Exception) -> bool:
    from botocore.exceptions import (
        ClientError,
        FlexibleChecksumError,
        IncompleteReadError,
        ResponseStreamingError,
    )

    if isinstance(error, ClientError):
        return (
            _status(error) == HTTPStatus.CONFLICT
            or error.response.get("Error", {}).get("Code") in _PASSING
        )
    # A body that broke off or was changed. One that stalls has taken its time already.
    return isinstance(error, (FlexibleChecksumError, IncompleteReadError, ResponseStreamingError))


def is_final(error: BaseException | None) -> bool:
    """Whether whoever asks again is refused again: neither the network nor the moment is to blame."""
    from botocore import exceptions

    if isinstance(error, exceptions.ClientError):
        status, code = _status(error), error.response.get("Error", {}).get("Code")
        refused = status < HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.NOT_IMPLEMENTED
        return refused and status not in _OF_THE_MOMENT and code not in _PASSING | _BUSY
    if isinstance(error, exceptions.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" in str(error)
    network = (
        exceptions.ConnectionError,
        exceptions.HTTPClientError,
        exceptions.CapacityNotAvailableError,
    )
    harmed = (exceptions.IncompleteReadError, exceptions.FlexibleChecksumError)
    # Credentials, a profile, an argument; what this module itself gives up is none of botocore's own.
    return type(error).__module__ == exceptions.__name__ and not isinstance(error, network + harmed)


def _status(error: "ClientError") -> int:
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def given_up(reason: str) -> Exception:
    """Of a kind that botocore does not try again."""
    from botocore.exceptions import BotoCoreError

    class GivenUp(BotoCoreError):
        fmt = reason

    return GivenUp()


@contextmanager
def failing_requests(what: str) -> Iterator[None]:
    """What S3 refuses inside, or does not answer, is a `StoreFailed` that says `what` is wrong."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (BotoCoreError, ClientError) as error:
        raise StoreFailed(f"{what}: {error}") from error
