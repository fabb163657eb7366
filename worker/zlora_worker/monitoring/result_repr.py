"""What logs and watchers, such as Flower, see of a result; its document is unchanged."""

from collections import UserDict
from typing import Any, Final

from zlora.redaction import short
from zlora.schema import GenerateResult, LoraReceipt, to_dict

MAX_SHOWN: Final = 500  # characters of a result in logs and events


class ResultPayload(UserDict[str, Any]):
    """A result's JSON document, as Celery's serializer takes it, with a `repr` of its own: of a dict Celery makes one.

    That is one line of at most `MAX_SHOWN` characters, without a signed URL and what is secret in an address.
    """

    def __init__(self, result: GenerateResult) -> None:
        super().__init__(to_dict(result))
        self._line = _line(result)

    def __json__(self) -> dict[str, Any]:  # what kombu's encoder asks for
        return self.data

    def __repr__(self) -> str:
        return self._line


def _line(result: GenerateResult) -> str:
    """What is most worth knowing first: a list of jobs has room for a few words, and many LoRAs are cut here."""
    count = len(result.images)
    parts = [f"{count} picture{'' if count == 1 else 's'}"]
    parts.append("base intact" if result.base_intact else "base not intact")
    if result.started_at is not None and result.finished_at is not None:
        parts.append(f"{result.finished_at - result.started_at:.1f} s")
    if result.images:
        parts.append(_keys(result))
    if result.loras:
        parts.append(f"loras: {', '.join(map(_lora, result.loras))}")
    line = "; ".join(parts)
    return line if len(line) <= MAX_SHOWN else f"{line[: MAX_SHOWN - 3]}..."


def _keys(result: GenerateResult) -> str:
    """The first key whole, and of the others, which lie beside it, the names."""
    first, *others = [image.key for image in result.images]
    return ", ".join([first, *(key.rpartition("/")[2] for key in others)])


def _lora(receipt: LoraReceipt) -> str:
    ranks = f" rank {'/'.join(map(str, receipt.ranks[:3]))}" if receipt.ranks else ""
    name = short(receipt.adapter_name or receipt.source)
    return f"{name}{ranks} {receipt.unet_weight:g} ({receipt.tier})"
