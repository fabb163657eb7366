"""What a person sees of a result: where the pictures are, and what was used of each LoRA."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from zlora.cli.printing import print_facts, terminal
from zlora.redaction import on_one_line
from zlora.schema import GenerateResult, LoraReceipt

if TYPE_CHECKING:
    from rich.console import Console

_TABLE: Final = 80  # columns of a terminal; on a narrower one a LoRA is a line
_HEADINGS: Final = ("LoRA", "weight", "rank", "modules", "relative norm", "from")


def document(result: GenerateResult, files: Sequence[Path]) -> dict[str, Any]:
    """The same for a program."""
    return {"job_id": result.job_id, "result": result, "files": [str(path) for path in files]}


def print_receipt(result: GenerateResult, files: Sequence[Path]) -> None:
    """Print it; `files` are the pictures that were brought here, all or none."""
    console = terminal(sys.stdout)
    wide = console is not None and console.width >= _TABLE
    loras = [] if wide else [("LoRA", _line(receipt)) for receipt in result.loras]
    print_facts([*_facts(result, files), *loras])
    if console is not None and wide and result.loras:
        _print_table(console, result.loras)


def _facts(result: GenerateResult, files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    yield "job", result.job_id
    places = [str(file) for file in files] or [image.url or image.key for image in result.images]
    for image, place in zip(result.images, places, strict=True):
        yield "picture", f"{place} (seed {image.seed}, {image.width}x{image.height})"
    yield (
        "seconds",
        ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in result.timings.items()),
    )
    yield "base intact", "yes" if result.base_intact else "no"
    yield "model", result.model


def _cells(receipt: LoraReceipt) -> tuple[str, ...]:
    norm = receipt.relative_norm
    return (
        receipt.source,
        _weight(receipt),
        ", ".join(map(str, receipt.ranks)) or "-",
        ", ".join(f"{count} in {component}" for component, count in receipt.modules.items()) or "-",
        "-" if norm is None else f"{norm:.4g}",
        receipt.tier,
    )


def _weight(receipt: LoraReceipt) -> str:
    unet, encoders = receipt.unet_weight, receipt.text_encoder_weight
    return f"{unet:g}" if unet == encoders else f"{unet:g} in unet, {encoders:g} in text encoders"


def _line(receipt: LoraReceipt) -> str:
    source, *cells = _cells(receipt)
    return f"{source} ({', '.join(f'{name} {cell}' for name, cell in zip(_HEADINGS[1:], cells, strict=True))})"


def _print_table(console: "Console", receipts: Sequence[LoraReceipt]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for receipt in receipts:
        table.add_row(*(Text(on_one_line(cell)) for cell in _cells(receipt)))
    console.print(table)
