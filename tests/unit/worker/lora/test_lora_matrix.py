"""LoRAs of each family: each spelling and kind is merged to the result by hand, or refused."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import pytest
import torch
from benchmarks import lora_matrix
from support.fakes import load_pipeline, write
from support.lora_files import State, read_whole, require_unchanged
from support.lora_matrix import FAMILIES, KINDS, WEIGHT, Family, LoraWriter, Module
from torch import Tensor
from zlora.errors import LoraMismatch
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.reader import Lora
from zlora_worker.model.pipeline import Pipeline

TOLERANCE: Final = 1e-6  # of the greatest weight, in fp32
TEXT_WEIGHT: Final = -1.5  # of a LoRA in the text encoders
# Files that diffusers applies, by docs/lora-matrix.md.
THEIRS: Final = (
    ("SDXL", "kohya", "LoCon"),
    ("SD 1.5", "diffusers", "LoCon"),
    ("SD 1.5", "kohya, diffusers' names", "LoRA"),
    ("Z-Image", "diffusers", "DoRA of peft"),
    ("Z-Image", "kohya", "LoRA"),
    *(("Z-Image", "ai-toolkit", kind) for kind in ("LoRA", "LoKr", "LoKr of whole matrices")),
)


class Subject(NamedTuple):
    """A family with its tiny model."""

    family: Family
    model: Pipeline
    writer: LoraWriter
    parameters: dict[Module, Tensor]


@pytest.fixture(scope="module")
def subjects(model_home: Path) -> Iterator[dict[str, Subject]]:
    """Return the families by name; after all tests no bit of their weights has changed."""
    found = {}
    for name, family in FAMILIES.items():
        model = load_pipeline(model_home, ZLORA_MODEL=str(family.folder(model_home)))
        parameters = {
            (component, parameter): tensor
            for component in model.weights.components
            for parameter, tensor in getattr(model.pipeline, component).named_parameters()
        }
        found[name] = Subject(family, model, LoraWriter(model), parameters)
    yield found
    for subject in found.values():
        require_unchanged(subject.model, subject.writer.base)
        subject.model.check()


@pytest.fixture
def subject(subjects: dict[str, Subject], name: str) -> Subject:
    return subjects[name]


def mistakes(
    subject: Subject, lora: Lora, expected: State, text_weight: float = WEIGHT
) -> list[str]:
    """Merge a LoRA; return the weights that are neither expected nor the base model's own."""
    weighted = WeightedLora(lora=lora, unet_weight=WEIGHT, text_encoder_weight=text_weight)
    found = []
    with subject.model.patch.applied([weighted]):
        for name, base in subject.writer.base.items():
            weight = subject.parameters[name]
            if name not in expected:
                is_right = torch.equal(weight, base)
            else:
                off = float((weight.double() - expected[name]).abs().max())
                is_right = off <= TOLERANCE * float(expected[name].abs().max())
                is_right = is_right and not torch.equal(weight, base)
            found += [] if is_right else [".".join(name)]
    return found


SPELLINGS: Final = [(name, each) for name, family in FAMILIES.items() for each in family.spellings]


@pytest.mark.parametrize(("name", "spelling"), SPELLINGS)
def test_each_kind_in_a_spelling_is_merged_to_the_result_by_hand_or_refused_by_name(
    subject: Subject, tmp_path: Path, spelling: str
) -> None:
    """The cells of this project in docs/lora-matrix.md."""
    family, model = subject.family, subject.model
    wrong = {}
    for kind in [kind for own, kind in family.cells() if own == spelling]:
        tensors, expected = subject.writer.write(
            family.spellings[spelling], KINDS[kind], family.modules
        )
        file = write(tmp_path / "a", tensors)
        if words := family.refusal(spelling, kind):
            with pytest.raises(LoraMismatch, match=words):
                read_whole(model, file)
            continue
        lora = read_whole(model, file)
        wrong[kind] = mistakes(subject, lora, expected)
        assert lora.kinds == (KINDS[kind].shown,)
    assert {kind: names for kind, names in wrong.items() if names} == {}
    assert wrong


@pytest.mark.parametrize(("name", "spelling"), SPELLINGS)
def test_a_spelling_finds_each_module_of_the_model(
    subject: Subject, tmp_path: Path, spelling: str
) -> None:
    """All linear layers and convolutions change, and no other weight."""
    written_as = subject.family.spellings[spelling]
    tensors, expected = subject.writer.write(
        written_as,
        KINDS["LoCon"],
        ranks=(2, 3, 1),
        alphas=(1.0, 0.5, 4.0, 2.5),
        text_weight=TEXT_WEIGHT,
    )

    lora = read_whole(subject.model, write(tmp_path / "a", tensors))

    assert mistakes(subject, lora, expected, TEXT_WEIGHT) == []
    assert (lora.format, lora.kinds, lora.ranks) == (written_as.format, ("lora",), (1, 2, 3))
    assert sum(lora.modules.values()) == len(expected)
    assert lora.modules.keys() == written_as.prefixes.keys() & subject.model.weights.components


@pytest.mark.parametrize(("name", "spelling", "kind"), THEIRS)
def test_weights_are_those_of_diffusers_if_it_applies_the_file(
    subject: Subject, tmp_path: Path, spelling: str, kind: str
) -> None:
    """A second oracle beside the result by hand: its own loader, in fp32."""
    family = subject.family
    tensors, changed = subject.writer.write(family.spellings[spelling], KINDS[kind], family.modules)
    file = write(tmp_path / "a.safetensors", tensors)

    theirs = lora_matrix.by_diffusers(subject.model, file)

    expected = {name: theirs[name].double() for name in changed}
    assert mistakes(subject, read_whole(subject.model, file), expected) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_in_the_docs_has_these_files_and_ends(subject: Subject, name: str) -> None:
    """The other loaders take minutes: `make lora-matrix` counts them."""
    ends = lora_matrix.promised(subject.family)
    page = lora_matrix.PAGE.read_text()

    parts: Sequence[str] = (
        lora_matrix.summary_row(name, subject.family, lora_matrix.US, ends),
        lora_matrix.legend(subject.family, subject.model),
        f"### {name}: {lora_matrix.US}\n\n{lora_matrix.table(subject.family, ends)}\n",
    )

    assert [part for part in parts if part not in page] == [], "run `make lora-matrix`"
