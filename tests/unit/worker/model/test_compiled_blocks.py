"""A compiled UNet: no LoRA and no size of an image compiles anything after the warm-up.

PyTorch counts and guards what it compiles before its backend runs. The backend here is `eager`,
which runs what was traced as it is: it needs no C compiler, and no bit of an image differs.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from support.fakes import UNET, load_pipeline, peft_lora, pixels, settings, write
from support.tiny_folder import TINY_LORAS, tiny_lora, tiny_zimage
from torch._dynamo.utils import counters
from zlora.errors import InvalidSetting, ModelUnavailable
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.model.family import Family
from zlora_worker.model.pipeline import Pipeline

# PyTorch's compiler warns about its own modules.
pytestmark: Final = pytest.mark.filterwarnings("ignore:`torch.jit.:DeprecationWarning")

STYLE, UNET_ONLY, CONVOLUTIONS, PHOTO = TINY_LORAS
DORA: Final = "dora"
SETS: Final[tuple[tuple[str, ...], ...]] = (
    (),
    (STYLE,),
    (UNET_ONLY,),
    (CONVOLUTIONS,),
    (DORA,),
    (STYLE, PHOTO),
    (),
    (UNET_ONLY, DORA, CONVOLUTIONS),
    TINY_LORAS,
    (PHOTO,),
)
SIZES: Final = ((64, 64), (72, 64), (64, 128), (104, 88))


@pytest.fixture(scope="module")
def plain(model_home: Path) -> Pipeline:
    return load_pipeline(model_home)


@pytest.fixture(scope="module", params=("blocks", "graphs"))
def model(request: pytest.FixtureRequest, model_home: Path) -> Iterator[Pipeline]:
    """Load a compiled model and warm it up, as a worker does before its first job."""
    torch._dynamo.reset()
    with torch.compiler.set_stance(force_backend="eager"):
        compiled = load_pipeline(model_home, ZLORA_COMPILE=request.param, ZLORA_BASE_CHECK="all")
        compiled.warm_up()
        yield compiled
    torch._dynamo.reset()


def compiled_graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def loras(model: Pipeline, home: Path, folder: Path, names: tuple[str, ...]) -> list[WeightedLora]:
    """Read LoRAs of the tiny model by their names."""
    tensors = peft_lora()
    for target in UNET:
        magnitude = torch.full((target.rows,), 1.5)
        tensors[f"unet.{target.module}.lora_magnitude_vector"] = magnitude
    dora = write(folder / "dora.safetensors", tensors)
    files = {DORA: dora} | {name: tiny_lora(home, name) for name in TINY_LORAS}
    return [
        WeightedLora(lora=model.reader.read(files[name], digest=name, source=name), unet_weight=0.7)
        for name in names
    ]


def test_ten_sets_of_loras_compile_nothing_and_draw_what_they_draw_uncompiled(
    plain: Pipeline, model: Pipeline, model_home: Path, tmp_path: Path
) -> None:
    """After each of them, all of the base is compared with its checksum."""
    before = compiled_graphs()
    drawn: list[dict[tuple[str, ...], bytes]] = [{}, {}]
    for names in SETS:
        for images, one in zip(drawn, (plain, model), strict=True):
            with one.with_loras(loras(one, model_home, tmp_path, names)):
                images[names] = pixels(one)
        assert model.base_checked == 1.0

    assert compiled_graphs() == before > 0
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0].values())) == len(set(SETS))


def test_strengths_over_the_steps_compile_nothing_and_draw_what_they_draw_uncompiled(
    plain: Pipeline, model: Pipeline, model_home: Path, tmp_path: Path
) -> None:
    before = compiled_graphs()
    images = []
    for one in (plain, model):
        (lora,) = loras(one, model_home, tmp_path, (CONVOLUTIONS,))
        schedule = ((0.0, 0.0), (0.2, 1.0), (0.4, 0.3), (0.6, 0.0), (0.8, 0.3))
        with one.with_loras([replace(lora, schedule=schedule, text_encoder_weight=0.0)]):
            images.append(pixels(one, num_inference_steps=5))

    assert images[0] == images[1] != pixels(model, num_inference_steps=5)
    assert compiled_graphs() == before > 0


def test_no_size_scheduler_or_guidance_compiles_anything(model: Pipeline) -> None:
    before = compiled_graphs()
    for width, height in SIZES:
        for guidance in (1.0, 5.0):
            pixels(model, width=width, height=height, guidance_scale=guidance)
    pixels(model, scheduler="ddim")

    assert compiled_graphs() == before > 0


@pytest.mark.parametrize("mode", ["blocks", "graphs"])
def test_no_size_prompt_or_guidance_of_z_image_compiles_anything(
    model_home: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """Prompts of other lengths than the negative one have a mask."""
    name = str(tiny_zimage(model_home))
    plain = load_pipeline(model_home, ZLORA_MODEL=name)
    torch._dynamo.reset()
    monkeypatch.setattr(Family, "side_of", lambda *_: 128)  # 1024 takes seconds on a CPU
    with torch.compiler.set_stance(force_backend="eager"):
        compiled = load_pipeline(model_home, ZLORA_MODEL=name, ZLORA_COMPILE=mode)
        compiled.warm_up()
        before = compiled_graphs()
        for (width, height), guidance, prompt in product(
            ((64, 64), (80, 256)), (0.0, 4.0), ("a city", "a city " * 30)
        ):
            fields: dict[str, Any] = {"width": width, "height": height, "guidance_scale": guidance}
            images = [pixels(one, prompt=prompt, **fields) for one in (plain, compiled)]
            assert images[0] == images[1]

        assert compiled_graphs() == before > 0
    torch._dynamo.reset()


def test_cuda_graphs_find_each_weight_where_it_was(
    model: Pipeline, model_home: Path, tmp_path: Path
) -> None:
    """In a shadow, on the other hand, merged weights have addresses of their own."""
    before = addresses(model)

    with model.with_loras(loras(model, model_home, tmp_path, (STYLE,))):
        inside = addresses(model)

    assert (inside == before) is (model.machine.compile == "graphs")
    assert addresses(model) == before


def addresses(model: Pipeline) -> list[int]:
    return [parameter.data_ptr() for parameter in model.pipeline.unet.parameters()]


def test_a_compiled_base_is_the_same_base(plain: Pipeline, model: Pipeline) -> None:
    """Only the provenance differs: last bits of compiled images do."""
    assert model.base.digest == plain.base.digest
    assert plain.machine.compile == "off"
    assert model.machine == plain.machine._replace(compile=model.machine.compile)


def test_a_compiler_that_fails_ends_the_start_with_a_line_that_names_the_setting(
    model_home: Path,
) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("no C compiler")

    torch._dynamo.reset()
    compiled = load_pipeline(model_home, ZLORA_COMPILE="blocks")
    logging.getLogger("torch._dynamo").setLevel(logging.CRITICAL)

    with (
        torch.compiler.set_stance(force_backend=broken),
        pytest.raises(ModelUnavailable, match=r"^ZLORA_COMPILE=blocks: .*no C compiler") as caught,
    ):
        compiled.warm_up()
    torch._dynamo.reset()

    assert "\n" not in str(caught.value)


def test_cuda_graphs_and_a_shadow_are_refused_together(model_home: Path) -> None:
    with pytest.raises(InvalidSetting, match=r"ZLORA_PATCH=shadow and ZLORA_COMPILE=graphs"):
        settings(model_home, ZLORA_COMPILE="graphs", ZLORA_PATCH="shadow")

    for patch in ("auto", "inplace"):
        assert settings(model_home, ZLORA_COMPILE="graphs", ZLORA_PATCH=patch).patch == patch
