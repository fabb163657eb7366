"""A result for people: its images, and what was used of each LoRA."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from zlora.cli.printing import print_facts, terminal
from zlora.redaction import on_one_line
from zlora.schema import GenerateResult, LoraReceipt
from zlora.sweep_labels import labels

_TABLE_WIDTH: Final = 80  # columns; a narrower terminal gets a line for each LoRA
_HEADINGS: Final = ("LoRA", "weight", "rank", "modules", "relative norm", "from")


def document(result: GenerateResult, files: Sequence[Path]) -> dict[str, Any]:
    """Return the result for programs; `files` are the images that were saved, all or none."""
    return {"job_id": result.job_id, "result": result, "files": [str(path) for path in files]}


def print_receipt(result: GenerateResult, files: Sequence[Path]) -> None:
    """Print the result; `files` are the images that were saved, all or none."""
    facts = [("job", result.job_id), *_image_facts(result, files)]
    timings = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in result.timings.items())
    facts.append(("seconds", timings))
    facts.append(("base intact", "yes" if result.base_intact else "no"))
    facts.append(("model", result.model))
    schedulers = dict.fromkeys(cell.scheduler for cell in result.cells) or [result.scheduler]
    facts.append(("scheduler", ", ".join(filter(None, schedulers))))
    for name, read in (
        ("prompt", result.prompt_receipt),
        ("negative", result.negative_prompt_receipt),
    ):
        if read is not None and read.windows > 1:
            facts.append((name, f"{read.tokens} tokens in {read.windows} windows"))
        if read is not None:
            facts += [("warning", f"{name}: {warning}") for warning in read.warnings]
    facts += _file_facts(result)

    console = terminal(sys.stdout)
    if console is None or console.width < _TABLE_WIDTH:
        for receipt in result.loras:
            source, *cells = _cells(receipt)
            pairs = zip(_HEADINGS[1:], cells, strict=True)
            facts.append(("LoRA", f"{source} ({', '.join(map(' '.join, pairs))})"))
        print_facts(facts)
        return
    print_facts(facts)
    if not result.loras:
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None)
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for receipt in result.loras:
        table.add_row(*(Text(on_one_line(cell)) for cell in _cells(receipt)))
    console.print(table)


def _image_facts(result: GenerateResult, files: Sequence[Path]) -> list[tuple[str, str]]:
    """Return the place and the own values of each image, then the sheet of a sweep."""
    images = [*result.images, *filter(None, [result.sheet])]
    places = [str(file) for file in files] or [image.url or image.key for image in images]
    own = labels(result.cells) if result.cells else []
    facts = []
    for index, (image, place) in enumerate(zip(result.images, places, strict=False)):
        notes = [f"seed {image.seed}", f"{image.width}x{image.height}"]
        if image.batch_size > 1:
            notes.append(f"batch size {image.batch_size}")
        if result.cells:
            notes += [label for path, label in own[index].items() if path != "seed"]
        facts.append(("image", f"{place} ({', '.join(notes)})"))
    if result.sheet is not None:
        facts.append(("sheet", f"{places[-1]} ({result.sheet.width}x{result.sheet.height})"))
    return facts


def _file_facts(result: GenerateResult) -> list[tuple[str, str]]:
    """Return what the receipts say beside the table: recipes, strengths, words and others."""
    facts = []
    steps = {cell.request.num_inference_steps for cell in result.cells}
    if len(steps) > 1:  # a recipe has set them for some of the images, or a path names them
        counts = ", ".join(str(cell.request.num_inference_steps) for cell in result.cells)
        facts.append(("steps by image", counts))
    if result.recipe_fields and not result.cells:
        names = ", ".join(filter(None, (receipt.recipe for receipt in result.loras)))
        values = ", ".join(f"{name} {value}" for name, value in result.recipe_fields.items())
        facts.append(("recipe", f"{names}: {values}"))
    for receipt in result.loras:
        if receipt.trigger_words:
            words = ", ".join(receipt.trigger_words)
            facts.append(("trigger words", f"{receipt.source}: {words}"))
        if receipt.unet_weights and not result.cells:
            shown = ", ".join(f"{weight:g} from {step}" for step, weight in receipt.unet_weights)
            facts.append(("weight by step", f"{receipt.source}: {shown}"))
        if receipt.blocks and not result.cells:
            shown = ", ".join(f"{block} {factor:g}" for block, factor in receipt.blocks.items())
            facts.append(("factor by block", f"{receipt.source}: {shown}"))
        facts += [("warning", f"{receipt.source}: {warning}") for warning in receipt.warnings]
    for found in result.embeddings:
        for token, count in found.used.items():
            shown = f"{token} (vectors {found.vectors[token]}, used {count}, {found.source})"
            facts.append(("embedding", shown))
        facts += [("warning", f"{found.source}: {warning}") for warning in found.warnings]
    return facts


def _cells(receipt: LoraReceipt) -> tuple[str, ...]:
    unet, text, norm = receipt.unet_weight, receipt.text_encoder_weight, receipt.relative_norm
    weight = f"{unet:g}"
    if unet != text and any(name.startswith("text_encoder") for name in receipt.modules):
        weight = f"{unet:g}, {text:g} in text encoders"
    modules = [f"{count} in {component}" for component, count in receipt.modules.items()]
    return (
        receipt.source,
        weight,
        ", ".join(map(str, receipt.ranks)) or "-",
        ", ".join(modules) or "-",
        "-" if norm is None else f"{norm:.4g}",
        receipt.tier,
    )
