"""Write docs/lora-matrix.md: what three loaders do with LoRAs, by family, spelling and kind.

    PYTHONPATH=tests:tools python -P tests/benchmarks/lora_matrix.py       # or: make lora-matrix

Each file is made for a tiny model. A loader applies it if all weights are those computed by hand,
misapplies it if it raises nothing and they are not, and else refuses it. diffusers' loader is
`load_lora_weights` of the family's pipeline; PEFT's is `set_peft_model_state_dict` for each network
of the file, with an adapter of the right kind, rank, alpha and modules prepared for it, because the
files have no configuration.
"""

import copy
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import click
import diffusers
import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.progress import track
from safetensors.torch import load_file
from support.fakes import load_pipeline, write
from support.lora_files import State, merged, read_whole
from support.lora_matrix import ALPHA, FAMILIES, RANK, WEIGHT, Family, LoraWriter, Module
from support.lora_spellings import Spelling
from support.tiny_folder import build_tiny
from zlora_worker.model.pipeline import Pipeline

PAGE: Final = Path(__file__).parents[2] / "docs" / "lora-matrix.md"
US: Final = "This project"
_LOADERS: Final = (US, "diffusers", "PEFT")
APPLIED, MISAPPLIED, REFUSED = "a", "**m**", "r"
_TOLERANCE: Final = 1e-5  # of the greatest weight; the tests of this project ask for 1e-6

Cell = tuple[str, str]  # spelling and kind
Ends = Mapping[str, Mapping[Cell, str]]  # of one loader, by family

INTRODUCTION: Final = """\
# LoRAs by family, spelling and kind

What three loaders do with the same files. Written by `make lora-matrix` with {versions}; do not \
edit. Each file is made for a tiny model and changes some layers of each sort, in all networks \
that its spelling can name.

* **a**: applied. All weights are those computed by hand, within 1e-5 of the greatest one; the \
tests of this project ask for 1e-6, in fp32.
* **m**: misapplied. No error, and other weights than those; mostly the base model's own.
* **r**: refused with an error. That of this project names the kind.
* No letter: no such file can exist.

{summary}

Other kinds are the last seven of each table, which this project refuses by name. Their weights \
are not computed by hand: a loader that changes any weight counts as one that applies them. \
[LoRA files](loras.md#formats) lists all kinds that are refused.

diffusers' loader is `load_lora_weights` of the family's pipeline. PEFT's is \
`set_peft_model_state_dict` for each network of a file, with an adapter that was prepared for the \
file's kind, rank, alpha and modules, since such files have no configuration. PEFT ignores \
tensors that do not have its own names, without an error; its function for such adapters does not \
prepare VeRA. Columns are the spellings by their numbers. The names of SD 2.x are those of SD 1.5.
"""


def main() -> None:
    """Write the page."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    ends: dict[str, dict[str, dict[Cell, str]]] = {loader: {} for loader in _LOADERS}
    sections = []
    with TemporaryDirectory() as folder:
        home = Path(folder, "home")
        build_tiny(home)
        for name, family in FAMILIES.items():
            model = load_pipeline(home, ZLORA_MODEL=str(family.folder(home)))
            found = _ends(name, family, model, home / "a.safetensors")
            sections += [f"## {name}", legend(family, model)]
            for loader in _LOADERS:
                ends[loader][name] = found[loader]
                sections += [f"### {name}: {loader}", table(family, found[loader])]
    versions = f"diffusers {diffusers.__version__} and PEFT {peft.__version__}"
    introduction = INTRODUCTION.format(versions=versions, summary=summary(ends))
    PAGE.write_text("\n\n".join([introduction.rstrip(), *sections]) + "\n")
    click.echo(summary(ends))


def _ends(name: str, family: Family, model: Pipeline, path: Path) -> dict[str, dict[Cell, str]]:
    """Return what each loader does with each file of a family."""
    writer = LoraWriter(model)
    ends: dict[str, dict[Cell, str]] = {loader: {} for loader in _LOADERS}
    for cell in track(family.cells(), name):
        spelling, kind = family.spellings[cell[0]], family.kinds[cell[1]]
        tensors, expected = writer.write(spelling, kind, family.modules)
        file = write(path, tensors)
        modules = writer.modules(spelling, kind, family.modules)
        loads: tuple[Callable[[], State], ...] = (
            partial(by_us, model, file),
            partial(by_diffusers, model, file),
            partial(by_peft, model, file, _peft_config(cell[1], spelling), modules),
        )
        for loader, load in zip(_LOADERS, loads, strict=True):
            ends[loader][cell] = _end(load, writer.base, expected)
    if ends[US] != promised(family):
        raise click.ClickException(f"{name}: other ends than the tests of this project have")
    return ends


def promised(family: Family) -> dict[Cell, str]:
    """Return what this project does with each file, as its tests require."""
    return {cell: REFUSED if family.refusal(*cell) else APPLIED for cell in family.cells()}


def _end(load: Callable[[], State], base: State, expected: State) -> str:
    """Return what a loader does with a file.

    A kind whose weights are not `expected` is applied if it changes any.
    """
    try:
        found = load()
    except Exception:  # noqa: BLE001 - loaders raise errors of any kind
        return REFUSED
    if not expected:
        is_base = all(torch.equal(found[name], weight) for name, weight in base.items())
        return MISAPPLIED if is_base else APPLIED
    for name, weight in base.items():
        wanted = expected.get(name, weight.double())
        off = float((found[name].double() - wanted).abs().max())
        if not off <= _TOLERANCE * float(wanted.abs().max()):
            return MISAPPLIED
    return APPLIED


def by_us(model: Pipeline, file: Path) -> State:
    """Return the weights that a strict job has."""
    return merged(model, read_whole(model, file), unet=WEIGHT, text=WEIGHT)


def by_diffusers(model: Pipeline, file: Path) -> State:
    """Return the weights after diffusers has loaded the file and PEFT has merged it."""
    networks = _copies(model)
    pipeline = type(model.pipeline).from_pipe(model.pipeline, **networks)
    pipeline.load_lora_weights(file, adapter_name="a")
    if pipeline.get_list_adapters():
        pipeline.set_adapters("a", WEIGHT)
    return _merged(networks, 1.0)


def by_peft(
    model: Pipeline, file: Path, config: Callable[..., Any] | None, modules: Sequence[Module]
) -> State:
    """Return the weights after PEFT has loaded the file into adapters that fit it."""
    if config is None:
        raise ValueError("PEFT has no adapter of this kind")
    networks, tensors = _copies(model), load_file(file)
    for component, network in networks.items():
        if targets := [module for owner, module in modules if owner == component]:
            peft.inject_adapter_in_model(config(target_modules=targets), network)
            peft.set_peft_model_state_dict(network, tensors)
    return _merged(networks, WEIGHT)


def _copies(model: Pipeline) -> dict[str, Any]:
    return {name: copy.deepcopy(getattr(model.pipeline, name)) for name in model.weights.components}


def _peft_config(kind: str, spelling: Spelling) -> Callable[..., Any] | None:
    """Return PEFT's configuration of a kind, but for its modules; None if it has none."""
    alpha = ALPHA if spelling.has_alpha else RANK
    lora = partial(peft.LoraConfig, r=RANK, lora_alpha=alpha)
    loha = partial(peft.LoHaConfig, r=RANK, alpha=alpha)
    lokr = partial(peft.LoKrConfig, r=RANK, alpha=alpha, decompose_factor=2)
    of_factors = partial(lokr, r=1, alpha=ALPHA if spelling.has_alpha else 1)
    dora = partial(lora, use_dora=True)
    whole = 1024  # a rank above half of the sides means a matrix without factors
    return {
        **dict.fromkeys(("LoRA", "LoCon", "LoCon with a middle"), lora),
        **dict.fromkeys(("DoRA", "DoRA by inputs", "DoRA of peft"), dora),
        "LoHa": loha,
        "LoHa with middles": partial(loha, use_effective_conv2d=True),
        "LoKr": lokr,
        "LoKr of factors": partial(of_factors, decompose_factor=4, decompose_both=True),
        "LoKr of whole matrices": partial(lokr, decompose_factor=4, r=whole, alpha=whole),
        "LoKr with a middle": partial(lokr, use_effective_conv2d=True),
        **dict.fromkeys(("OFT", "OFT of peft"), partial(peft.OFTConfig, oft_block_size=4)),
        "BOFT": partial(peft.BOFTConfig, boft_block_size=4),
        "IA3": partial(peft.IA3Config, feedforward_modules=[]),
        "GLoRA": partial(peft.GloraConfig, r=RANK),
        "VeRA": partial(peft.VeraConfig, r=RANK, save_projection=False),
        "AdaLoRA": partial(peft.AdaLoraConfig, init_r=RANK, target_r=1, total_step=10),
    }.get(kind)


def _merged(networks: Mapping[str, Any], weight: float) -> State:
    for network in networks.values():
        for layer in network.modules():
            if isinstance(layer, BaseTunerLayer):
                if weight != 1.0 and hasattr(layer, "scale_layer"):
                    layer.scale_layer(weight)
                layer.merge()
    return {
        (component, name.replace(".base_layer.", ".")): tensor
        for component, network in networks.items()
        for name, tensor in network.state_dict().items()
    }


# --- the page


def summary(ends: Mapping[str, Ends]) -> str:
    """Return the table of all families and loaders, with their counts."""
    lines = [
        "| family | loader | applied | misapplied | refused | other kinds: a | m | r |",
        f"|{' --- |' * 8}",
    ]
    for name, family in FAMILIES.items():
        lines += [summary_row(name, family, loader, ends[loader][name]) for loader in ends]
    return "\n".join(lines)


def summary_row(name: str, family: Family, loader: str, ends: Mapping[Cell, str]) -> str:
    """Return the counts of one loader: of the kinds that this project serves, and of others."""
    counts = Counter((bool(family.kinds[kind].refusal), end) for (_, kind), end in ends.items())
    cells = [
        str(counts[is_other, end])
        for is_other in (False, True)
        for end in (APPLIED, MISAPPLIED, REFUSED)
    ]
    return f"| {' | '.join((name, loader, *cells))} |"


def legend(family: Family, model: Pipeline) -> str:
    """Return the list of a family's spellings, with the names of a tensor of each network."""
    writer = LoraWriter(model)
    lines = []
    for number, (name, spelling) in enumerate(family.spellings.items(), 1):
        examples = []
        for component in model.weights.components:
            modules = [module for module in family.modules if module[0] == component]
            tensors, _ = writer.write(spelling, family.kinds["LoRA"], modules)
            queries = [key for key in tensors if re.search("to_q|q_proj|qkv", key)]
            examples += [f"`{key}`" for key in queries[:1]]
        alpha = " (and `.alpha`)" if spelling.has_alpha else ""
        lines.append(f"{number}. {name}{alpha}: {', '.join(examples)}")
    return "\n".join(lines)


def table(family: Family, ends: Mapping[Cell, str]) -> str:
    """Return the table of one loader: a row for each kind, and a column for each spelling."""
    numbers = range(1, len(family.spellings) + 1)
    lines = [f"| | {' | '.join(map(str, numbers))} |", f"|{' --- |' * (len(numbers) + 1)}"]
    for kind in family.kinds:
        row = [ends.get((spelling, kind), "") for spelling in family.spellings]
        lines.append(f"| {kind} | {' | '.join(row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
