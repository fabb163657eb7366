"""The text in PNG files by which A1111's web UI and its clients know how an image was drawn.

The chunk `parameters` has the infotext: the prompt, a line `Negative prompt: ...` if there is one,
and a line of `Name: value` pairs. A value with a comma, a colon or a double quote is a JSON string.
"""

import re
import struct
from typing import Final

import msgspec

PARAMETERS: Final = "parameters"
_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_MAX_TEXTS: Final = 100  # chunks that are read
_MAX_LETTERS: Final = 65_536  # of an infotext whose pairs are read
_NEGATIVE: Final = "Negative prompt:"
_NAME: Final = re.compile(r"\w[\w \-/]*")
_QUOTED: Final = re.compile(r'\s*("(?:\\.|[^\\"])*")\s*(?:,|$)')
_LEAST_PAIRS: Final = 3  # in the last line, without which it is part of the prompt


def texts_of(png: bytes) -> dict[str, str]:
    """Return the text chunks of a PNG by keyword (PNG specification, 11.3.3).

    Compressed ones are left out: a small file could have gigabytes of them. Raises `ValueError` if
    the file is no PNG, or ends within a chunk.
    """
    if not png.startswith(_SIGNATURE):
        raise ValueError("Expected a PNG")
    found: dict[str, str] = {}
    start = len(_SIGNATURE)
    while start < len(png) and len(found) < _MAX_TEXTS:
        if len(png) < start + 8:
            raise ValueError("Expected a PNG that is complete")
        size, kind = struct.unpack_from(">I4s", png, start)
        data = png[start + 8 : start + 8 + size]
        if len(data) < size:
            raise ValueError("Expected a PNG that is complete")
        keyword, _, rest = data.partition(b"\0")
        if kind == b"tEXt":
            found[keyword.decode("latin-1")] = rest.decode("latin-1")
        elif kind == b"iTXt" and rest[:1] == b"\0":
            text = rest[2:].split(b"\0", 2)[-1]  # after the language and the translated keyword
            found[keyword.decode("latin-1")] = text.decode("utf-8", "replace")
        elif kind == b"IEND":
            break
        start += size + 12
    return found


def pairs_of(infotext: str) -> dict[str, str]:
    """Return the pairs of an infotext, with `Prompt` and `Negative prompt`.

    Raises `ValueError` for one of more than 65,536 characters.
    """
    if len(infotext) > _MAX_LETTERS:
        raise ValueError(f"Expected an infotext of at most {_MAX_LETTERS} characters")
    *lines, last = infotext.strip().split("\n")
    pairs = _pairs_in(last)
    if len(pairs) < _LEAST_PAIRS:
        lines, pairs = [*lines, last], {}
    prompt, _, negative = "\n".join(lines).partition(_NEGATIVE)
    found = {"Prompt": prompt.strip(), "Negative prompt": negative.strip()}
    for name, value in pairs.items():
        try:
            found[name] = msgspec.json.decode(value, type=str)
        except msgspec.DecodeError:  # without quotes
            found[name] = value.strip()
    return found


def _pairs_in(line: str) -> dict[str, str]:
    """Return the pairs of a line, with quotes, in a time that grows as the line does."""
    found: dict[str, str] = {}
    start = 0
    while (colon := line.find(":", start)) >= 0:
        name = line[max(start, line.rfind(",", start, colon) + 1) : colon].strip()
        if quoted := _QUOTED.match(line, colon + 1):
            value, start = quoted[1], quoted.end()
        else:
            comma = line.find(",", colon)
            end = comma if comma >= 0 else len(line)
            value, start = line[colon + 1 : end], end + 1
        if _NAME.fullmatch(name):
            found[name] = value
    return found
