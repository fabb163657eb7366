"""JSON that a person or a program has written: a request, or a line of a batch."""

import codecs
from typing import Any, Final

import msgspec

from zlora.errors import InvalidRequest

_MARKS: Final = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read(text: bytes) -> Any:
    """The data of a JSON document in UTF-8; raises `InvalidRequest`, whatever the bytes are."""
    if text.startswith(_MARKS):
        raise _refused("it begins with a byte order mark: save it as UTF-8 without one")
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _refused(str(error)) from None
    except RecursionError:
        raise _refused("it is nested too deep") from None


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, {"path": "$", "expected": "a JSON document"})
