"""The payload that the task returns: a result as JSON data, with a short `repr` for Flower."""

from collections import UserDict
from typing import Any, Final

from zlora.redaction import short
from zlora.schema import GenerateResult, to_dict

MAX_SHOWN: Final = 500  # characters of a result in logs and events


class ResultPayload(UserDict[str, Any]):
    """A result's JSON document for Celery's serializer, whose `repr` is one short line.

    The line has at most `MAX_SHOWN` characters, no signed URLs and no secrets of addresses. A plain
    dict would be shown by Celery's own `repr`.
    """

    def __init__(self, result: GenerateResult) -> None:
        super().__init__(to_dict(result))
        self._line = _line(result)

    def __json__(self) -> dict[str, Any]:  # called by kombu's encoder
        return self.data

    def __repr__(self) -> str:
        return self._line


def _line(result: GenerateResult) -> str:
    """Return the facts in order of importance, since lists of jobs and many LoRAs cut the line."""
    count = len(result.images)
    parts = ["1 image" if count == 1 else f"{count} images"]
    parts.append("base intact" if result.base_intact else "base not intact")
    if result.started_at is not None and result.finished_at is not None:
        parts.append(f"{result.finished_at - result.started_at:.1f} s")
    if result.images:
        first, *others = [image.key for image in result.images]
        parts.append(", ".join([first, *(key.rpartition("/")[2] for key in others)]))
    if result.loras:
        loras = []
        for lora in result.loras:
            words = [short(lora.adapter_name or lora.source)]
            if lora.ranks:
                words.append(f"rank {'/'.join(map(str, lora.ranks[:3]))}")
            loras.append(" ".join([*words, f"{lora.unet_weight:g}", f"({lora.tier})"]))
        parts.append(f"loras: {', '.join(loras)}")
    line = "; ".join(parts)
    if len(line) > MAX_SHOWN:
        line = f"{line[: MAX_SHOWN - 3]}..."
    return line
