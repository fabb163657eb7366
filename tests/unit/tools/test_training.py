"""The drawings that the demo model is trained on, and training that may be interrupted."""

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
    """A seed determines the images, and an image does not depend on its batch."""
    scenes = [KINDS[kind].sample(Dice(3, seed)) for seed in (5, 5, 6)]
    weights = some_weights(3, seed=1)

    one, again, other = (scene.paint(weights) for scene in scenes)

    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(scenes[0].paint(weights * torch.tensor([[0.0], [1.0], [1.0]]))[1:], one[1:])


def test_the_shadow_of_a_portrait_does_not_wrap_around() -> None:
    """The shoulders leave the image at its lower edge; the upper edge is white."""
    weights = torch.zeros(8, len(STYLES))
    weights[:, STYLES.index("product")] = 1.0

    images = KINDS["portrait"].sample(Dice(8, 1)).paint(weights)

    assert images[:, :, :2].min() > 0.95


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
    """The program is ended."""


def train(folder: Path, *, stop_at: int | None = None, rate: float = 1e-2) -> tuple[Tensor, str]:
    """Train one vector towards a noisy goal; return the vector and the logged losses."""
    folder.mkdir(exist_ok=True)
    weight = nn.Parameter(torch.zeros(3))

    def loss(step: int, generator: Generator) -> Tensor:
        if step == stop_at:
            raise Stop
        return (weight - torch.randn(3, generator=generator) - 1).square().mean()

    plan = Plan("stage", seed=1, steps=600, rate=rate, hold=0.5)
    Loop(folder, Console(quiet=True), bfloat16=False).run(plan, [weight], loss)
    return weight.detach(), (folder / "stage.json").read_text().partition('"seconds"')[0]


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    """The results have the same bits, and a finished run is not trained again."""
    whole = train(tmp_path / "whole")
    with pytest.raises(Stop):
        train(tmp_path / "cut", stop_at=555)

    resumed = train(tmp_path / "cut")
    again = train(tmp_path / "cut", stop_at=0)

    assert torch.equal(whole[0], resumed[0])
    assert whole[1] == resumed[1]
    assert torch.equal(again[0], resumed[0])


def test_a_run_of_another_plan_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        train(tmp_path / "run", stop_at=510)

    with pytest.raises(InvalidSetting, match="another plan"):
        train(tmp_path / "run", rate=2e-2)


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 5), nn.Conv2d(6, 5, 3, padding=1, stride=2)], ids=["linear", "conv"]
)
def test_each_row_of_a_batch_has_its_own_weights(layer: nn.Linear | nn.Conv2d) -> None:
    """A row equals the output of a layer with the row's LoRAs merged."""
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
