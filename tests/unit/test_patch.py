"""LoRAs into the resident model: exactly what their files say, all of it or none, and the base afterwards."""

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from fakes import (
    DEMO_LORAS,
    PARTS,
    TEXT,
    UNET,
    Target,
    Tensors,
    demo_lora,
    difference,
    kohya_lora,
    load_engine,
    peft_lora,
    pixels,
    write,
)
from safetensors.torch import save_file
from single_file import original_layout
from zlora.errors import LoraMismatch
from zlora_worker import lora, patch
from zlora_worker.demo.folder import demo_folder
from zlora_worker.engine import Engine, EngineState

SOURCE = "https://example.com/{}.safetensors"
WITH_TEXT = ("anime-style", "product-photography-v1")


@pytest.fixture(scope="module")
def engine(model_home: Path) -> Engine:
    return load_engine(model_home)


@pytest.fixture(scope="module")
def base(engine: Engine) -> bytes:
    """The picture without any LoRA."""
    return pixels(engine)


@pytest.fixture(autouse=True)
def nothing_stays(engine: Engine, base: bytes) -> Iterator[None]:
    """After every test of this file, passed or failed: no adapter, no changed weight, the same picture."""
    yield
    assert engine.pipeline.get_list_adapters() == {}
    assert engine.state is EngineState.READY
    assert pixels(engine) == base


def adapter(
    path: Path, *, weight: float = 1.0, text_encoder_weight: float | None = None, name: str | None = None
) -> patch.Adapter:
    source = SOURCE.format(path.stem if name is None else name)
    return patch.Adapter(
        lora=lora.read(path, source=source),
        source=source,
        unet_weight=weight,
        text_encoder_weight=weight if text_encoder_weight is None else text_encoder_weight,
    )


def drawn(engine: Engine, *adapters: patch.Adapter) -> bytes:
    """The picture with LoRAs, drawn as a job draws it."""
    with engine.borrowed() as pipeline, patch.applied(pipeline, adapters):
        return pixels(engine)


def demo_path(home: Path, name: str) -> Path:
    return demo_folder(home) / "loras" / f"{name}.safetensors"


# --- what a file means


def _config(part: Any) -> dict[str, Any]:
    config: dict[str, Any] = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    return config


def merge_by_hand(engine: Engine, tensors: Tensors, *, weight: float, text_encoder_weight: float) -> None:
    """Add `weight * alpha / rank * up @ down` to each weight in fp64. Shares no code with what is tested."""
    parts = {name: getattr(engine.pipeline, name) for name in PARTS}
    named = {name: part.state_dict() for name, part in parts.items()}
    layout = original_layout({name: _config(part) for name, part in parts.items()}, named)
    targets: Tensors = {
        "lora_unet_" + key.removeprefix("model.diffusion_model.").removesuffix(".weight").replace(".", "_"): tensor
        for key, tensor in layout.items()
        if key.startswith("model.diffusion_model.")
    }
    for component, kohya in (("unet", None), ("text_encoder", "lora_te1"), ("text_encoder_2", "lora_te2")):
        for key, tensor in named[component].items():
            bare = key.removesuffix(".weight").removeprefix("text_model.")
            for module in (bare, f"text_model.{bare}"):  # releases of transformers differ in it
                targets[f"{component}.{module}"] = tensor
                targets[f"{kohya}_{module}".replace(".", "_")] = tensor
    downs = {key: key.rpartition(".lora_")[0] for key in tensors if key.endswith(("lora_down.weight", "lora_A.weight"))}
    for key, module in downs.items():
        down = tensors[key].double()
        up = tensors[key.replace("lora_down", "lora_up").replace("lora_A", "lora_B")].double()
        scale = float(tensors.get(f"{module}.alpha", torch.tensor(len(down)))) / len(down)
        strength = weight if "unet" in module.partition("_blocks")[0] else text_encoder_weight
        target = targets[module]
        change = (up.flatten(1) @ down.flatten(1)).view_as(target)
        target.copy_(target.double() + strength * scale * change)


@pytest.mark.parametrize(("name", "weight"), [*zip(DEMO_LORAS, (1.0, -0.6, 0.5, 2.0), strict=True)])
def test_a_lora_acts_as_if_merged_by_hand(
    engine: Engine, base: bytes, model_home: Path, name: str, weight: float
) -> None:
    """In kohya's spelling and in peft's, with text encoders and with convolutions; each of its modules is changed."""
    merged = copy.deepcopy(engine)
    merge_by_hand(merged, demo_lora(model_home, name), weight=weight, text_encoder_weight=weight)
    demo = adapter(demo_path(model_home, name), weight=weight)

    with engine.borrowed() as pipeline, patch.applied(pipeline, [demo]) as (changed,):
        picture = pixels(engine)

    assert difference(picture, pixels(merged)) <= 1
    assert difference(picture, base) > 32
    assert sum(changed.values()) == demo.lora.modules
    assert set(changed) == ({*PARTS} - {"vae"} if name in WITH_TEXT else {"unet"})


@pytest.mark.parametrize("seed", range(4))
def test_ranks_and_alphas_of_each_module_are_kept_or_the_file_is_refused(
    engine: Engine, model_home: Path, tmp_path: Path, seed: int
) -> None:
    """What resizing writes: each module has a rank and an alpha of its own."""
    generator = torch.Generator().manual_seed(seed)
    tensors = demo_lora(model_home, "anime-style")
    for module in [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]:
        rank, alpha = (int(torch.randint(1, 5, (), generator=generator)) for _ in range(2))
        tensors[f"{module}.lora_down.weight"] = tensors[f"{module}.lora_down.weight"][:rank]
        tensors[f"{module}.lora_up.weight"] = tensors[f"{module}.lora_up.weight"][:, :rank]
        tensors[f"{module}.alpha"] = torch.tensor(float(alpha if seed % 2 else rank))
    merged = copy.deepcopy(engine)
    merge_by_hand(merged, tensors, weight=1.0, text_encoder_weight=1.0)

    picture, refusal = b"", ""
    try:
        picture = drawn(engine, adapter(write(tmp_path / "resized.safetensors", tensors)))
    except LoraMismatch as error:
        refusal = error.message

    assert "ranks or alphas" in refusal or difference(picture, pixels(merged)) <= 1


@pytest.mark.parametrize(
    "tensors",
    [kohya_lora((*UNET, *TEXT)), peft_lora((*UNET, *TEXT)), peft_lora((*UNET, *TEXT), ranks=(2, 8, 4))],
    ids=["kohya", "peft", "ranks that differ"],
)
def test_names_and_shapes_that_people_have_act_as_if_merged_by_hand(
    engine: Engine, base: bytes, tmp_path: Path, tensors: Tensors
) -> None:
    """Cross-attention, feed-forward and the text encoders' layers, under the names that training tools write."""
    merged = copy.deepcopy(engine)
    merge_by_hand(merged, tensors, weight=0.5, text_encoder_weight=0.25)

    path = write(tmp_path / "a.safetensors", tensors)
    picture = drawn(engine, adapter(path, weight=0.5, text_encoder_weight=0.25))

    assert difference(picture, pixels(merged)) <= 1
    assert difference(picture, base) > 16


def test_two_loras_act_as_if_both_were_merged(engine: Engine, base: bytes, model_home: Path) -> None:
    """Each with its own weights, and with weights for the text encoders that differ from the UNet's."""
    merged = copy.deepcopy(engine)
    merge_by_hand(merged, demo_lora(model_home, "anime-style"), weight=0.5, text_encoder_weight=1.25)
    merge_by_hand(merged, demo_lora(model_home, "neon-lights"), weight=0.75, text_encoder_weight=0.75)

    picture = drawn(
        engine,
        adapter(demo_path(model_home, "anime-style"), weight=0.5, text_encoder_weight=1.25),
        adapter(demo_path(model_home, "neon-lights"), weight=0.75),
    )

    assert difference(picture, pixels(merged)) <= 1
    assert difference(picture, base) > 32


# --- weights


def test_weight_zero_is_no_lora(engine: Engine, base: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya_lora((*UNET, *TEXT)))

    assert drawn(engine, adapter(path, weight=0.0)) == base
    assert drawn(engine, adapter(path, weight=0.1)) != base


def test_no_loras_touch_nothing(engine: Engine, base: bytes) -> None:
    with engine.borrowed() as pipeline, patch.applied(pipeline, []) as changed:
        assert changed == []
        assert pixels(engine) == base


@pytest.mark.parametrize("spell", [kohya_lora, peft_lora])
def test_unet_and_text_encoders_are_weighed_apart(
    engine: Engine, base: bytes, tmp_path: Path, spell: Callable[[Sequence[Target]], Tensors]
) -> None:
    """A weight of 0 for one part gives the picture of a file without that part."""
    whole = write(tmp_path / "whole.safetensors", spell((*UNET, *TEXT)))
    tensors = spell((*UNET, *TEXT))
    unet_only = write(tmp_path / "unet.safetensors", {key: tensors[key] for key in spell(UNET)})
    text_only = write(tmp_path / "text.safetensors", {key: tensors[key] for key in spell(TEXT)})

    without_text = drawn(engine, adapter(whole, weight=1.0, text_encoder_weight=0.0))
    without_unet = drawn(engine, adapter(whole, weight=0.0, text_encoder_weight=1.0))

    assert without_text == drawn(engine, adapter(unet_only))
    assert without_unet == drawn(engine, adapter(text_only))
    assert len({base, without_text, without_unet}) == 3


# --- several at once


def test_two_loras_are_not_either_of_them_alone(engine: Engine, base: bytes, tmp_path: Path) -> None:
    one = adapter(write(tmp_path / "one.safetensors", kohya_lora(UNET)))
    other = adapter(write(tmp_path / "other.safetensors", peft_lora(TEXT)))

    pictures = {base, drawn(engine, one), drawn(engine, other), drawn(engine, one, other)}

    assert len(pictures) == 4


def test_one_file_twice_acts_twice(engine: Engine, base: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", peft_lora((*UNET, *TEXT)))

    twice = drawn(engine, adapter(path, weight=0.5), adapter(path, weight=0.25))
    once = drawn(engine, adapter(path, weight=0.75))

    assert difference(twice, once) <= 1
    assert difference(twice, base) > 16


@pytest.mark.parametrize("names", [("v1.5", "v1.5"), ("a1", "a0")])
def test_no_name_of_a_source_reaches_the_model(engine: Engine, tmp_path: Path, names: Sequence[str]) -> None:
    """A name with a dot is a path to peft, and a name given twice an error: what users call their files is neither."""
    paths = [write(tmp_path / "1.safetensors", kohya_lora()), write(tmp_path / "2.safetensors", peft_lora())]
    plain = drawn(engine, *(adapter(path) for path in paths))

    named = drawn(engine, *(adapter(path, name=name) for path, name in zip(paths, names, strict=True)))

    assert named == plain


# --- what does not fit


def halved(tensors: Tensors) -> Tensors:
    """The tensors of a narrower model: each down factor reads half as many numbers."""
    downs = ("lora_down.weight", "lora_A.weight")
    return {key: tensor[:, ::2] if key.endswith(downs) else tensor for key, tensor in tensors.items()}


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


MISFITS = {
    "kohya, another width": halved(kohya_lora()),
    "peft, another width": halved(peft_lora()),
    "ranks of a pair differ": {
        key: tensor[:1] if key.endswith("lora_A.weight") else tensor for key, tensor in peft_lora().items()
    },
    "kohya, unknown modules": renamed(kohya_lora(), "blocks_0", "blocks_7"),
    "peft, unknown modules": renamed(peft_lora(), "blocks.0", "blocks.7"),
    "kohya, half unknown": kohya_lora() | renamed(kohya_lora(), "blocks_0", "blocks_7"),
    "peft, half unknown": peft_lora() | renamed(peft_lora(), "blocks.0", "blocks.7"),
    "peft, one block unknown": peft_lora() | renamed(peft_lora(UNET[:1]), "attentions.0", "attentions.7"),
    "transformer.*": renamed(peft_lora(), "unet.", "transformer."),
    "diffusion_model.*": renamed(peft_lora(), "unet.", "diffusion_model."),
    "no prefix": renamed(peft_lora(), "unet.", ""),
    "text encoder, unknown modules": renamed(peft_lora(TEXT), "self_attn", "self_tan"),
    "UNet fits, text encoders are narrower": peft_lora() | halved(peft_lora(TEXT)),
    "UNet fits, text encoders have fewer layers": kohya_lora() | renamed(kohya_lora(TEXT), "layers_0", "layers_9"),
}
# Files whose modules are all there, and of which a part has no effect: nothing may be dropped in silence.
LEFT_OVER = {
    "kohya, one up is missing": dict([*kohya_lora().items()][:-1]),
    "peft, one up is missing": dict([*peft_lora().items()][:-1]),
    "an adapter's name in the keys": renamed(renamed(peft_lora(), "lora_A.", "lora_A.x."), "lora_B.", "lora_B.x."),
    "kohya DoRA": kohya_lora()
    | {f"{target.kohya}.dora_scale": torch.full((1, target.columns), 2.0) for target in UNET},
    "a stray tensor of a LoRA": peft_lora() | {f"unet.{UNET[0].module}.lora_C.weight": torch.ones(2)},
    "a stray tensor": peft_lora() | {"emphasis": torch.ones(2)},
    "an alpha of no module": kohya_lora() | {"lora_unet_input_blocks_0_0.alpha": torch.tensor(1.0)},
}


def mismatch(engine: Engine, *adapters: patch.Adapter, of: str = "bad") -> str:
    """The one line of a refused LoRA, which names its source."""
    with pytest.raises(LoraMismatch) as raised, engine.borrowed() as pipeline, patch.applied(pipeline, adapters):
        pytest.fail("a LoRA that does not fit was applied")
    message = str(raised.value)
    assert message.startswith(SOURCE.format(of))
    assert len(message.splitlines()) == 1
    assert len(message) < 400
    return message


@pytest.mark.parametrize("case", MISFITS)
def test_a_lora_that_does_not_fit_is_refused(engine: Engine, tmp_path: Path, case: str) -> None:
    bad = adapter(write(tmp_path / "bad.safetensors", MISFITS[case]))

    mismatch(engine, bad)


@pytest.mark.parametrize("case", LEFT_OVER)
def test_a_lora_of_which_a_part_lands_nowhere_is_refused(engine: Engine, tmp_path: Path, case: str) -> None:
    path = write(tmp_path / "bad.safetensors", LEFT_OVER[case])

    with pytest.raises(LoraMismatch) as raised:
        drawn(engine, adapter(path))

    assert str(raised.value).startswith(SOURCE.format("bad"))


def test_a_refusal_counts_what_landed(engine: Engine, tmp_path: Path) -> None:
    bad = adapter(write(tmp_path / "bad.safetensors", MISFITS["peft, one block unknown"]))

    assert "only 3 of the 4 modules" in mismatch(engine, bad)


@pytest.mark.parametrize(
    "case", ["peft, another width", "kohya, half unknown", "transformer.*", "UNet fits, text encoders are narrower"]
)
def test_the_first_of_two_loras_goes_when_the_second_is_refused(engine: Engine, tmp_path: Path, case: str) -> None:
    good = adapter(write(tmp_path / "good.safetensors", kohya_lora((*UNET, *TEXT))))
    bad = adapter(write(tmp_path / "bad.safetensors", MISFITS[case]))

    mismatch(engine, good, bad)


def test_loras_go_when_the_job_fails(engine: Engine, tmp_path: Path) -> None:
    """Whatever the job raises comes through as it is."""
    paths = [write(tmp_path / "1.safetensors", kohya_lora()), write(tmp_path / "2.safetensors", peft_lora(TEXT))]
    adapters = [adapter(path) for path in paths]

    with (
        pytest.raises(ZeroDivisionError),
        engine.borrowed() as pipeline,
        patch.applied(pipeline, adapters),
    ):
        _ = 1 / 0


def test_no_metadata_makes_a_lora_draw_at_random(engine: Engine, tmp_path: Path) -> None:
    """A file may say with which dropout it was trained, and diffusers believes it."""
    modules = [target.module for target in UNET]
    told = {"r": 2, "lora_alpha": 2, "lora_dropout": 0.9, "target_modules": modules}
    path = tmp_path / "dropout.safetensors"
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps({f"unet.{key}": told[key] for key in told})}
    save_file(peft_lora(), path, metadata=metadata)
    plain = write(tmp_path / "plain.safetensors", peft_lora())

    assert drawn(engine, adapter(path)) == drawn(engine, adapter(path)) == drawn(engine, adapter(plain))


def test_a_lora_with_a_magnitude_in_some_modules_only_is_refused(engine: Engine, tmp_path: Path) -> None:
    """peft makes one for every module, and leaves those without values that the file does not hold."""
    tensors = peft_lora() | {f"unet.{UNET[0].module}.lora_magnitude_vector": torch.ones(UNET[0].rows)}

    assert "missing" in mismatch(engine, adapter(write(tmp_path / "bad.safetensors", tensors)))


def test_a_gpu_without_room_is_no_fault_of_the_file(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = adapter(write(tmp_path / "good.safetensors", peft_lora()))
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    monkeypatch.setattr(engine.pipeline, "load_lora_weights", full)

    with pytest.raises(torch.OutOfMemoryError):
        drawn(engine, good)


def test_a_shape_that_does_not_fit_is_told_by_its_module(engine: Engine, tmp_path: Path) -> None:
    bad = adapter(write(tmp_path / "bad.safetensors", MISFITS["peft, another width"]))

    assert UNET[0].module.rpartition(".")[2] in mismatch(engine, bad)
