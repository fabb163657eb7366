"""Sweeps: the values of some fields of a request, of which each combination is one image.

A value is named by its path in the request, such as `seed` or `loras[0].weight`.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any, Final

from zlora.errors import ZloraError

MAX_CELLS: Final = 64  # images of a sweep
MAX_LORAS: Final = 16  # different LoRAs of a sweep, which are in memory all together
MAX_BYTES: Final = 500_000  # of a request in JSON; Celery's message is a third larger
# What the images may differ in. From one image to the next, the values of the last fields change
# often and those of the first ones seldom: merging LoRAs takes longer than encoding a prompt, and
# that takes longer than drawing other noise.
FIELDS: Final = (
    "loras",
    "prompt",
    "prompt_syntax",
    "trigger_words",
    "negative_prompt",
    "clip_skip",
    "recipes",
    "scheduler",
    "schedule",
    "timesteps",
    "sigmas",
    "eta",
    "num_inference_steps",
    "guidance_scale",
    "strength",
    "upscale",
    "seed",
)
_PATH: Final = re.compile(rf"({'|'.join(FIELDS)})(?:\[([0-9])\])?(?:\.([a-z_]+))?", re.ASCII)

Values = Mapping[str, Any]  # of one image, by path


def is_path(path: str) -> bool:
    """Return whether a path names a value that images of a sweep may differ in."""
    found = _PATH.fullmatch(path)
    if found is None:
        return False
    name, index, field = found.groups()
    if name == "loras":
        return field is None or index is not None
    return index is None and (field is None or name == "upscale")


def count(sweep: Mapping[str, Sequence[Any]]) -> int:
    """Return the number of images."""
    return math.prod(map(len, sweep.values()))


def cells(sweep: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Return the values of each image: the order does not depend on that of the paths."""
    paths = sorted(sweep, key=lambda path: (FIELDS.index(parts_of(path)[0]), path))
    return [
        dict(zip(paths, values, strict=True))
        for values in product(*(sweep[path] for path in paths))
    ]


def with_values(document: dict[str, Any], values: Values) -> dict[str, Any]:
    """Return the request of one image, as JSON data.

    Raises `LookupError` with the LoRA of a path that the document lacks.
    """
    found = dict(document)
    for path, value in values.items():
        name, index, field = parts_of(path)
        if index is not None:
            found[name] = loras = list(found.get(name, ()))
            if index >= len(loras):
                raise LookupError(f"{name}[{index}]")
            loras[index] = {**loras[index], field: value} if field else value
        elif field is not None:
            found[name] = {**(found.get(name) or {}), field: value}
        else:
            found[name] = value
    return found


def value_at(request: object, path: str) -> Any:
    """Return the value of a path in a request."""
    name, index, field = parts_of(path)
    value = getattr(request, name)
    if index is not None:
        value = value[index]
    return value if field is None else getattr(value, field)


def parts_of(path: str) -> tuple[str, int | None, str | None]:
    """Return the field of the request, the index in `loras`, and the field there, of a path."""
    found = _PATH.fullmatch(path)
    assert found is not None  # noqa: S101 - of a request that was checked
    name, index, field = found.groups()
    return name, None if index is None else int(index), field


@contextmanager
def naming_image(sweep: object, index: int) -> Iterator[None]:
    """Name the image of this index in the message and the details of errors, if there is a sweep.

    In the details it is `image`.
    """
    try:
        yield
    except ZloraError as error:
        if sweep is not None:
            error.message += f" (image {index} of the sweep)"
            error.add_details(image=index)
        raise
