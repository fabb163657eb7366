"""JSON that a person or a program has written: a request, or a line of a batch."""

import codecs
from typing import Any, Final

import msgspec

from zlora.errors import InvalidRequest

_MARKS: Final = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read(text: bytes) -> Any:
    """Return the data of a JSON document in UTF-8; raise `InvalidRequest` for all other bytes."""
    try:
        if text.startswith(_MARKS):
            raise ValueError("it begins with a byte order mark: save it as UTF-8 without one")  # noqa: TRY301
        return msgspec.json.decode(text)
    except RecursionError:
        reason = "it is nested too deep"
    except ValueError as error:  # also msgspec.DecodeError and UnicodeDecodeError
        reason = str(error)
    raise InvalidRequest(reason, {"path": "$", "expected": "a JSON document"})
