"""What the demo model learned from, and that its training may be cut off at any time."""

from pathlib import Path

import pytest
import torch
from demo_model import architecture
from demo_model.drawing.canvas import STYLES
from demo_model.drawing.captions import VOCABULARY, caption, with_style_word
from demo_model.drawing.dice import Dice
from demo_model.drawing.scenes import KINDS
from demo_model.training.loop import Loop, Plan
from demo_model.training.pictures import random_of, some_weights
from demo_model.training.styles import RANKS, Mix, Styled
from rich.console import Console
from torch import Generator, Tensor, nn
from zlora.errors import InvalidSetting

# --- the drawings


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_a_scene_in_any_look(kind: str) -> None:
    """The same pictures from the same seed, others from another; and a picture owes nothing to its batch."""
    scenes = [KINDS[kind].sample(Dice(3, seed)) for seed in (5, 5, 6)]
    weights = some_weights(3, seed=1)

    one, again, other = (scene.paint(weights) for scene in scenes)

    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(scenes[0].paint(weights * torch.tensor([[0.0], [1.0], [1.0]]))[1:], one[1:])


def test_the_shadow_of_a_portrait_does_not_come_back_from_the_other_side() -> None:
    """Its shoulders leave the picture at the foot; above it the paper is white."""
    weights = torch.zeros(8, len(STYLES))
    weights[:, STYLES.index("product")] = 1.0

    pictures = KINDS["portrait"].sample(Dice(8, 1)).paint(weights)

    assert pictures[:, :, :2].min() > 0.95


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer, rng = architecture.tokenizer(VOCABULARY), random_of(1)

    for kind, sort in KINDS.items():
        scene = sort.sample(Dice(40, 3))
        for index in range(40):
            text = with_style_word(caption(kind, scene, index, rng), rng.choice(STYLES), rng)
            assert [
                token.removesuffix("</w>") for token in tokenizer.tokenize(text)
            ] == text.replace(",", " ,").split()


# --- the training


class Stop(Exception):
    """Somebody ends the program."""


def train(folder: Path, *, stop_at: int | None = None, rate: float = 1e-2) -> tuple[Tensor, str]:
    """One weight vector towards a noisy goal; the trained vector, and the losses as they were written down."""
    folder.mkdir(exist_ok=True)
    weight = nn.Parameter(torch.zeros(3))

    def loss(step: int, generator: Generator) -> Tensor:
        if step == stop_at:
            raise Stop
        return (weight - torch.randn(3, generator=generator) - 1).square().mean()

    plan = Plan("stage", seed=1, steps=1200, rate=rate, hold=0.5)
    Loop(folder, Console(quiet=True), bfloat16=False).run(plan, [weight], loss)
    return weight.detach(), (folder / "stage.json").read_text().partition('"seconds"')[0]


def test_a_run_that_was_cut_off_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """To the last bit, and once it has ended it is not trained again."""
    whole = train(tmp_path / "whole")
    with pytest.raises(Stop):
        train(tmp_path / "cut", stop_at=777)

    resumed = train(tmp_path / "cut")
    again = train(tmp_path / "cut", stop_at=0)

    assert torch.equal(whole[0], resumed[0])
    assert whole[1] == resumed[1]
    assert torch.equal(again[0], resumed[0])


def test_a_run_of_another_plan_is_not_taken_up(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tmp_path / "run", stop_at=600)

    with pytest.raises(InvalidSetting, match="another plan"):
        train(tmp_path / "run", rate=2e-2)


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, padding=1, stride=2)], ids=["linear", "conv"]
)
def test_each_row_of_a_batch_has_weights_of_its_own(layer: nn.Linear | nn.Conv2d) -> None:
    """A row gives what a layer gives into which the row's LoRAs were merged."""
    generator = torch.Generator().manual_seed(1)
    weights = some_weights(4, seed=2)
    styled = Styled(layer, Mix(weights), generator)
    nn.init.normal_(styled.up, generator=generator)
    values = torch.randn(
        4, 6, *((9, 9) if isinstance(layer, nn.Conv2d) else ()), generator=generator
    )

    with torch.no_grad():
        given = styled(values)

    kept = layer.weight.detach().clone()
    for row, of_row in enumerate(weights):
        changes = {
            style: (up.flatten(1) @ down.flatten(1)).view_as(kept)
            for style, down, up in styled.factors()
            if down.any()
        }
        merged = kept + sum(
            weight * changes[style] for style, weight in zip(STYLES, of_row, strict=True)
        )
        with torch.no_grad():
            layer.weight.copy_(merged)
            torch.testing.assert_close(given[row], layer(values[row : row + 1])[0])
            layer.weight.copy_(kept)
    assert set(changes) == set(RANKS)
