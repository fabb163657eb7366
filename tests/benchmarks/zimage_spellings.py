"""Print what happens to a LoRA of Z-Image, by spelling and kind, in three loaders, as Markdown.

Each file is made for a tiny Z-Image. A loader applies it if all weights are those computed by hand,
misapplies it if it raises nothing and they are not, and else refuses it. diffusers' loader is
`ZImagePipeline.load_lora_weights`; PEFT's is `set_peft_model_state_dict`, with an adapter of the
right kind, rank and modules prepared for it, because the files have no configuration.
"""

import copy
import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import click
import diffusers
import peft
import torch
from diffusers import ZImagePipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from support import tiny_zimage
from support.fakes import Tensors
from support.zimage_loras import KINDS, SOME, SPELLINGS, WEIGHT, written
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.reader import require_whole
from zlora_worker.model import loader
from zlora_worker.model.pipeline import Pipeline
from zlora_worker.settings import Settings

APPLIED, MISAPPLIED, REFUSED = "applied", "**misapplied**", "refused"
_TOLERANCE: Final = 1e-5  # of the greatest weight
_NAMES: Final = ("This project", "diffusers", "PEFT")
_TUNERS: Final = {"lora": peft.LoraConfig, "loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}

Load = Callable[[Path], Tensors]  # weights that a file gives


def main() -> None:
    """Print the table, and the sums of its columns."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    with TemporaryDirectory() as name:
        folder = Path(name)
        tiny_zimage.build_zimage(folder / "model")
        click.echo(table(folder))


def table(folder: Path) -> str:
    """Return the table of a model in `folder`."""
    variables = {"ZLORA_MODEL": str(folder / "model"), "ZLORA_DEVICE": "cpu"}
    model = loader.load(Settings.from_env(variables | {"ZLORA_HOME": str(folder)}))
    pipeline = ZImagePipeline.from_pretrained(folder / "model")
    weights = dict(pipeline.transformer.state_dict())
    ends: dict[str, list[list[str]]] = {name: [] for name in _NAMES}  # by loader, then spelling
    for how in SPELLINGS.values():
        for name in _NAMES:
            ends[name].append([])
        for shown, make in KINDS.values():
            tensors, expected = written(weights, how, make, SOME)
            file = folder / "lora.safetensors"
            save_file(tensors, file)
            loads: tuple[Load, ...] = (
                partial(by_us, model),
                partial(by_diffusers, pipeline),
                partial(by_peft, pipeline.transformer, shown),
            )
            for name, load in zip(_NAMES, loads, strict=True):
                ends[name][-1].append(end_of(load, file, weights, expected))
    lines = ["| loader | applied | misapplied | refused |", "| --- | --- | --- | --- |"]
    for name, rows in ends.items():
        count = Counter(end for row in rows for end in row)
        lines.append(f"| {name} | {count[APPLIED]} | {count[MISAPPLIED]} | {count[REFUSED]} |")
    for name, rows in ends.items():
        lines += ["", f"## {name}", "", f"| spelling | {' | '.join(KINDS)} |"]
        lines.append(f"|{' --- |' * (len(KINDS) + 1)}")
        lines += [
            f"| {spelling} | {' | '.join(row)} |"
            for spelling, row in zip(SPELLINGS, rows, strict=True)
        ]
    return "\n".join(lines)


def end_of(load: Load, file: Path, weights: Tensors, expected: Tensors) -> str:
    """Return what a loader does with a file."""
    try:
        found = load(file)
    except Exception:  # noqa: BLE001 - loaders raise errors of any kind
        return REFUSED
    for name, weight in weights.items():
        wanted = expected.get(name, weight.double())
        if float((found[name].double() - wanted).abs().max()) > _TOLERANCE * float(
            wanted.abs().max()
        ):
            return MISAPPLIED
    return APPLIED


def by_us(model: Pipeline, file: Path) -> Tensors:
    """Return the weights that a strict job has."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    lora = model.reader.read(file, digest=digest, source="a")
    require_whole(lora, source="a")
    with model.patch.applied([WeightedLora(lora=lora, unet_weight=WEIGHT)]):
        return {
            name: weight.clone() for name, weight in model.pipeline.transformer.state_dict().items()
        }


def by_diffusers(pipeline: Any, file: Path) -> Tensors:
    """Return the weights after diffusers has loaded and fused the file."""
    parts = pipeline.components | {"transformer": copy.deepcopy(pipeline.transformer)}
    own = ZImagePipeline(**parts)
    own.load_lora_weights(file, adapter_name="a")
    if own.get_list_adapters():
        own.set_adapters("a", WEIGHT)
    return _merged(own.transformer, 1.0)


def by_peft(transformer: Any, kind: str, file: Path) -> Tensors:
    """Return the weights after PEFT has loaded the file into an adapter that fits it."""
    own = copy.deepcopy(transformer)
    options: dict[str, Any] = {"target_modules": list(SOME), "r": 2}
    inner = kind.removeprefix("dora-")
    if inner == "full":
        raise ValueError("PEFT has no adapter of this kind")
    options["lora_alpha" if inner == "lora" else "alpha"] = 2
    if kind.startswith("dora-"):
        if inner != "lora":
            raise ValueError("PEFT has no adapter of this kind")
        options["use_dora"] = True
    if inner == "lokr":
        options |= {"decompose_factor": 2}
    config = _TUNERS[inner](**options)
    peft.inject_adapter_in_model(config, own)
    peft.set_peft_model_state_dict(own, load_file(file))
    return _merged(own, WEIGHT)


def _merged(transformer: Any, weight: float) -> Tensors:
    for layer in transformer.modules():
        if isinstance(layer, BaseTunerLayer):
            if weight != 1.0:
                layer.scale_layer(weight)
            layer.merge()
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in transformer.state_dict().items()
    }


if __name__ == "__main__":
    main()
