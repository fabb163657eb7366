r"""Syntax of prompts: from the text of a request to weighted fragments and inline LoRAs.

`plain` is the text itself. `a1111` is what AUTOMATIC1111's web UI reads:

* `(text)` multiplies the weight by 1.1, `[text]` divides it by 1.1, `(text:1.3)` multiplies it by
  1.3; brackets nest. A bracket that is never closed holds until the end of the text; one that was
  never opened is text.
* `BREAK` ends a window of the text encoders.
* `<lora:name>`, `<lora:name:0.8>` and `<lora:name:0.8:0.5>` (text encoders, UNet) name LoRAs.
* A backslash makes the next character text: `\(`, also `\AND` and `\BREAK`.

What the web UI also has and this project does not is refused by name: prompt editing, alternation,
`AND`, and other networks than LoRAs.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import Final, Literal, NamedTuple

PromptSyntax = Literal["plain", "a1111"]

MAX_WINDOWS: Final = 10  # of the text encoders for one prompt; each costs memory in every step
MAX_WEIGHT: Final = 10.0  # of a fragment; images are noise long before
MAX_LORA_WEIGHT: Final = 4.0  # as of a LoRA in `loras`
_FACTORS: Final = {"(": 1.1, "[": 1 / 1.1}  # of the weight, by bracket
_MAX_OPEN: Final = 100  # brackets at once, so that no text takes more than milliseconds
_NUMBER: Final = re.compile(
    r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[-+]?[0-9]+)?", re.ASCII | re.IGNORECASE
)
_LORA_NETWORKS: Final = ("lora", "lyco")  # the web UI reads both alike
_SPECIAL: Final = re.compile(
    r"""
    \\ (?P<escaped> .?)
    | < (?P<network> \w+) : (?P<arguments> [^<>]*) >
    | \b (?P<word> AND | BREAK) \b
    | : \s* (?P<number> [-+]?[.0-9]+) \s* (?P<closing> [)\]])
    | (?P<bracket> [()\[\]|])
    """,
    re.VERBOSE | re.DOTALL,
)
_MEANINGFUL: Final = re.compile(r"[\\()\[\]|]|<(?=\w+:)|\b(?:AND|BREAK)\b")


class Fragment(NamedTuple):
    """Text with one weight; 1.0 changes nothing."""

    text: str
    weight: float = 1.0


class LoraTag(NamedTuple):
    """LoRA that a prompt names; a weight that the tag does not have is None."""

    name: str
    text_encoder_weight: float | None = None
    unet_weight: float | None = None


class ParsedPrompt(NamedTuple):
    """Fragments of each part between `BREAK`s, of which there is at least one, and the LoRAs."""

    sections: tuple[tuple[Fragment, ...], ...]
    loras: tuple[LoraTag, ...] = ()


@lru_cache(maxsize=128)  # images of a sweep mostly have the same prompt, and it is read often
def parse(text: str, syntax: PromptSyntax) -> ParsedPrompt:
    """Read a prompt.

    Raises `ValueError` for what is refused; the message may have the position in the text, and has
    nothing of the text, which logs must not contain.
    """
    if syntax == "plain":
        return ParsedPrompt(((Fragment(text),),))
    brackets = _Brackets()
    loras: list[LoraTag] = []
    end = 0
    for found in _SPECIAL.finditer(text):
        brackets.pieces.append(_Piece(text[end : found.start()]))
        start, end = found.span()
        if found["network"]:
            loras.append(_lora_tag(found["network"], found["arguments"], start))
        elif found["word"] == "AND":
            raise _refused("`AND` between prompts is not supported; `\\AND` is the word", start)
        elif found["word"] == "BREAK":
            brackets.pieces.append(_Piece(None))
        elif found["escaped"] is not None:
            brackets.pieces.append(_Piece(found["escaped"]))
        elif not brackets.apply(found["bracket"] or found["closing"], found["number"], start):
            brackets.pieces.append(_Piece(found[0]))
    brackets.pieces.append(_Piece(text[end:]))
    return ParsedPrompt(_sections(brackets.weighted()), tuple(loras))


def without_loras(text: str) -> str:
    """Return a prompt of the syntax `a1111` without its LoRA tags; all else stays as it is."""
    return _SPECIAL.sub(lambda found: "" if found["network"] else found[0], text)


def escaped(text: str) -> str:
    """Return what the syntax `a1111` reads as this text."""
    return _MEANINGFUL.sub(r"\\\g<0>", text)


@dataclass
class _Piece:
    """Text, or None for a `BREAK`, and its weight."""

    text: str | None
    weight: float = 1.0


@dataclass
class _Bracket:
    """Open bracket; `start` is the number of pieces before it."""

    kind: str
    start: int
    position: int  # in the text
    is_alternation: bool = False


class _Brackets:
    """Pieces of a text, whose weights change with each bracket that closes."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self._open: list[_Bracket] = []

    def apply(self, bracket: str, number: str | None, position: int) -> bool:
        """Open or close a bracket, with the number before it; return False if it is only text."""
        if bracket == "|":
            # Only an alternation once its bracket is closed.
            if self._open and self._open[-1].kind == "[":
                self._open[-1].is_alternation = True
            return False
        if bracket in _FACTORS:
            self._open.append(_Bracket(bracket, len(self.pieces), position))
            if len(self._open) > _MAX_OPEN:
                raise _refused(f"at most {_MAX_OPEN} brackets are open at once", position)
            return True
        kind = "(" if bracket == ")" else "["
        opened = next((one for one in reversed(self._open) if one.kind == kind), None)
        if opened is None:
            return False
        if opened.is_alternation:
            raise _refused("alternation, `[one|other]`, is not supported", opened.position)
        if number is not None and kind == "[":
            raise _refused("prompt editing, `[from:to:when]`, is not supported", opened.position)
        self._open.remove(opened)
        self._multiply(opened, _FACTORS[kind] if number is None else _number(number, position))
        return True

    def weighted(self) -> list[_Piece]:
        """Close what is open at the end of the text, and return the pieces."""
        for opened in self._open:
            self._multiply(opened, _FACTORS[opened.kind])
        return self.pieces

    def _multiply(self, opened: _Bracket, factor: float) -> None:
        for piece in self.pieces[opened.start :]:
            piece.weight *= factor


def _sections(pieces: list[_Piece]) -> tuple[tuple[Fragment, ...], ...]:
    """Join neighbours of one weight, and split at each `BREAK`; one at the end is ignored."""
    sections: list[list[Fragment]] = [[]]
    for piece in pieces:
        last = sections[-1]
        if piece.text is None:
            sections.append([])
        elif piece.text and last and last[-1].weight == piece.weight:
            last[-1] = Fragment(last[-1].text + piece.text, piece.weight)
        elif piece.text:
            if not abs(piece.weight) <= MAX_WEIGHT:  # or NaN
                raise ValueError(f"Expected weights from -{MAX_WEIGHT:g} to {MAX_WEIGHT:g}")
            last.append(Fragment(piece.text, piece.weight))
    if len(sections) > 1 and not "".join(fragment.text for fragment in sections[-1]).strip():
        sections.pop()
    return tuple(tuple(section) or (Fragment(""),) for section in sections)


def _lora_tag(network: str, arguments: str, position: int) -> LoraTag:
    """Read `name`, `name:0.8`, `name:0.8:0.5` or `name:te=0.8:unet=0.5`."""
    if network not in _LORA_NETWORKS:
        raise _refused(
            "of networks in the prompt, only `<lora:name:weight>` is supported", position
        )
    name, *given = (argument.strip() for argument in arguments.split(":"))
    numbers: dict[str, float] = {}
    for argument, place in zip_longest(given, ("te", "unet")):
        key, mark, value = (argument or "").rpartition("=")
        if argument is None:
            continue
        if not mark:
            key = place
        if key not in ("te", "unet") or key in numbers:
            raise _refused("a LoRA tag has a name and at most two weights", position)
        numbers[key] = _number(value, position)
    if not name:
        raise _refused("a LoRA tag has a name", position)
    if any(abs(number) > MAX_LORA_WEIGHT for number in numbers.values()):
        bound = f"from -{MAX_LORA_WEIGHT:g} to {MAX_LORA_WEIGHT:g}"
        raise _refused(f"the weight of a LoRA is {bound}", position)
    text = numbers.get("te")
    return LoraTag(name, text, numbers.get("unet", text))


def _number(text: str, position: int) -> float:
    if not _NUMBER.fullmatch(text):
        raise _refused("a weight is a number such as 1.2", position)
    return float(text)


def _refused(reason: str, position: int) -> ValueError:
    return ValueError(f"Expected prompt syntax a1111: {reason} (character {position + 1})")
