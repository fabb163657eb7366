"""Names of a UNet's blocks in requests: diffusers', and the letters of A1111's LoRA Block Weight.

diffusers' names may be short (`down.1`, `mid`), written out (`down_blocks.1`), or go on to a part
of a block (`up.0.attentions.2`). Letters are `IN00` to `IN11`, `M00` or `MID`, `OUT00` to `OUT11`.
"""

import re
from collections.abc import Iterable
from typing import Final

_PART: Final = re.compile(
    r"(?:(down|up)(?:_blocks)?((?:\.\w+)*)|(mid)(?:_block)?((?:\.\w+)*))", re.ASCII
)
_LETTERS: Final = re.compile(r"(?:IN|OUT)(?:0[0-9]|1[01])|M00|MID", re.ASCII)
_MAX_NAME: Final = 100  # characters; modules of SDXL have names of up to 70
_TEXT: Final = "BASE"  # the letters of the text encoders


def canonical(name: str) -> str:
    """Return the one spelling of a block's name; raise `ValueError` if it has the form of none."""
    if len(name) > _MAX_NAME:
        raise ValueError(f"Expected names of at most {_MAX_NAME} characters")
    if _LETTERS.fullmatch(name):
        return "M00" if name == "MID" else name
    if found := _PART.fullmatch(name):
        return "".join(filter(None, found.groups()))
    if name == _TEXT:
        raise ValueError("Expected `text_encoder_weight` instead of BASE")
    raise ValueError("Expected names of blocks, such as `down.1`, `mid`, `up.0.attentions.2`, IN04")


def require_distinct(names: Iterable[str]) -> None:
    """Raise `ValueError` for names of both kinds together, or two spellings of one name.

    Also raises it for a name that is none; see `canonical`.
    """
    spelt = [canonical(name) for name in names]
    if len({name.isupper() for name in spelt}) > 1:
        raise ValueError("Expected diffusers' names or letters such as IN04, not both")
    if len(set(spelt)) < len(spelt):
        raise ValueError("Expected each block once")
