"""Merging of LoRAs: exactly the change in their files, rounded once, and the base afterwards."""

import faulthandler
import gc
import random
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.fakes import (
    PARTS,
    PLACES,
    TEXT,
    UNET,
    Target,
    Tensors,
    difference,
    kohya_lora,
    load_pipeline,
    lora_tensors,
    peft_lora,
    pixels,
    weights,
    write,
)
from support.single_file import original_layout
from support.tiny_folder import TINY_LORAS, tiny_lora
from torch import Tensor, nn
from zlora.errors import BaseNotRestored
from zlora_worker.lora.merge import Chunk, MergePool, Plan, WeightedLora
from zlora_worker.lora.patch import Mode, Patch, choose_mode
from zlora_worker.lora.reader import Reader
from zlora_worker.lora.weights import Weights
from zlora_worker.model.pipeline import Pipeline, PipelineState
from zlora_worker.signals import run_to_completion

WITH_TEXT = ("anime-style", "product-photography-v1")
MODES: tuple[Mode, ...] = ("shadow", "inplace")


@pytest.fixture(scope="module", params=PLACES)
def resident(request: pytest.FixtureRequest, model_home: Path) -> Pipeline:
    """Load the model in both modes of the patch on each device."""
    return load_pipeline(model_home, **request.param)


@pytest.fixture(scope="module")
def base(resident: Pipeline) -> bytes:
    """Draw the image without any LoRA."""
    return pixels(resident)


@pytest.fixture
def model(resident: Pipeline, base: bytes) -> Iterator[Pipeline]:
    """Require that the whole base and its image are unchanged after each test."""
    yield resident
    resident.check()
    assert resident.state is PipelineState.READY
    assert resident.base_checked == 1.0
    assert pixels(resident) == base


@pytest.fixture(scope="module")
def spare_model(resident: Pipeline, model_home: Path) -> Pipeline:
    return load_pipeline(model_home, ZLORA_DEVICE=str(resident.device))


@pytest.fixture
def spare(spare_model: Pipeline) -> Iterator[Pipeline]:
    """Provide another model on the same device, whose weights a test may change."""
    before = {part: weights(spare_model, part) for part in PARTS}
    kept = {part: {name: t.clone() for name, t in before[part].items()} for part in PARTS}
    yield spare_model
    for part in PARTS:
        for name, tensor in kept[part].items():
            before[part][name].copy_(tensor)


def weighted(
    model: Pipeline, path: Path, *, weight: float = 1.0, text_encoder_weight: float | None = None
) -> WeightedLora:
    """Read a file; its path is its digest, since each file has a path of its own here."""
    return WeightedLora(
        lora=model.reader.read(path, digest=str(path), source=path.name),
        unet_weight=weight,
        text_encoder_weight=weight if text_encoder_weight is None else text_encoder_weight,
    )


def drawn(model: Pipeline, *loras: WeightedLora) -> bytes:
    """Draw the image with LoRAs."""
    with model.with_loras(loras):
        return pixels(model)


# --- the first job


@pytest.mark.parametrize("mode", MODES)
def test_the_first_merge_after_a_warm_up_prepares_nothing(
    model_home: Path, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shadows are in memory and the base is measured; and no bit of an image differs."""
    warm, cold = (load_pipeline(model_home, ZLORA_PATCH=mode) for _ in range(2))
    warm.warm_up()
    assert warm.state is PipelineState.READY
    files = [tiny_lora(model_home, name) for name in TINY_LORAS]
    expected = [drawn_with_norm(cold, file) for file in files]
    shadows = {number: shadow.data_ptr() for number, shadow in warm.patch._shadows.items()}
    monkeypatch.setattr(torch, "empty_like", None)
    monkeypatch.setattr(torch, "dot", None)

    assert [drawn_with_norm(warm, file) for file in files] == expected
    assert len(shadows) == (len(warm.weights.stacks) if mode == "shadow" else 0)
    assert {n: shadow.data_ptr() for n, shadow in warm.patch._shadows.items()} == shadows


def drawn_with_norm(model: Pipeline, file: Path) -> tuple[bytes, float]:
    with model.with_loras([weighted(model, file)]) as merged:
        return pixels(model), merged.relative_norms[0]


# --- what a file means


def _config(part: Any) -> dict[str, Any]:
    config: dict[str, Any] = (
        part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    )
    return config


def merge_by_hand(
    model: Pipeline, tensors: Tensors, *, weight: float, text_encoder_weight: float
) -> None:
    """Add `weight * alpha / rank * up @ down` to each weight in fp64, without the tested code."""
    parts = {name: getattr(model.pipeline, name) for name in PARTS}
    named = {name: part.state_dict() for name, part in parts.items()}
    layout = original_layout({name: _config(part) for name, part in parts.items()}, named)
    targets: Tensors = {
        "lora_unet_"
        + key.removeprefix("model.diffusion_model.")
        .removesuffix(".weight")
        .replace(".", "_"): tensor
        for key, tensor in layout.items()
        if key.startswith("model.diffusion_model.")
    }
    for component, kohya in (
        ("unet", None),
        ("text_encoder", "lora_te1"),
        ("text_encoder_2", "lora_te2"),
    ):
        for key, tensor in named[component].items():
            bare = key.removesuffix(".weight").removeprefix("text_model.")
            for module in (bare, f"text_model.{bare}"):  # releases of transformers differ in it
                targets[f"{component}.{module}"] = tensor
                targets[f"{kohya}_{module}".replace(".", "_")] = tensor
    downs = {
        key: key.rpartition(".lora_")[0]
        for key in tensors
        if key.endswith(("lora_down.weight", "lora_A.weight"))
    }
    for key, module in downs.items():
        down = tensors[key].double()
        up = tensors[key.replace("lora_down", "lora_up").replace("lora_A", "lora_B")].double()
        scale = float(tensors.get(f"{module}.alpha", torch.tensor(len(down)))) / len(down)
        strength = weight if "unet" in module.partition("_blocks")[0] else text_encoder_weight
        target = targets[module]
        change = (up.flatten(1) @ down.flatten(1)).view_as(target).to(target.device)
        target.copy_(target.double() + strength * scale * change)


@pytest.mark.parametrize("case", [*zip(TINY_LORAS, (1.0, -0.6, 0.5, 2.0), strict=True)])
def test_a_lora_acts_as_if_merged_by_hand(
    model: Pipeline, spare: Pipeline, base: bytes, model_home: Path, case: tuple[str, float]
) -> None:
    """In the spellings of kohya and peft, with text encoders and with convolutions."""
    name, weight = case
    merge_by_hand(spare, lora_tensors(model_home, name), weight=weight, text_encoder_weight=weight)
    lora = weighted(model, tiny_lora(model_home, name), weight=weight)

    image = drawn(model, lora)

    assert difference(image, pixels(spare)) <= 1
    assert difference(image, base) > 32
    assert set(lora.lora.modules) == ({*PARTS} - {"vae"} if name in WITH_TEXT else {"unet"})


def test_ranks_and_alphas_of_each_module_are_kept(
    model: Pipeline, spare: Pipeline, model_home: Path, tmp_path: Path
) -> None:
    """Tools that resize LoRAs write modules with a rank and an alpha of their own."""
    generator = torch.Generator().manual_seed(1)
    tensors = lora_tensors(model_home, "anime-style")
    for module in [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]:
        rank, alpha = (int(torch.randint(1, 5, (), generator=generator)) for _ in range(2))
        tensors[f"{module}.lora_down.weight"] = tensors[f"{module}.lora_down.weight"][:rank]
        tensors[f"{module}.lora_up.weight"] = tensors[f"{module}.lora_up.weight"][:, :rank]
        tensors[f"{module}.alpha"] = torch.tensor(float(alpha))
    merge_by_hand(spare, tensors, weight=1.0, text_encoder_weight=1.0)

    image = drawn(model, weighted(model, write(tmp_path / "resized.safetensors", tensors)))

    assert difference(image, pixels(spare)) <= 1


@pytest.mark.parametrize(
    "tensors",
    [
        kohya_lora((*UNET, *TEXT)),
        peft_lora((*UNET, *TEXT)),
        peft_lora((*UNET, *TEXT), ranks=(2, 8, 4)),
    ],
    ids=["kohya", "peft", "ranks that differ"],
)
def test_common_names_and_shapes_act_as_if_merged_by_hand(
    model: Pipeline, spare: Pipeline, base: bytes, tmp_path: Path, tensors: Tensors
) -> None:
    """Cross-attention, feed-forward and text encoders, under the names of training tools."""
    merge_by_hand(spare, tensors, weight=0.5, text_encoder_weight=0.25)

    path = write(tmp_path / "a.safetensors", tensors)
    image = drawn(model, weighted(model, path, weight=0.5, text_encoder_weight=0.25))

    assert difference(image, pixels(spare)) <= 1
    assert difference(image, base) > 16


def test_two_loras_act_as_if_both_were_merged(
    model: Pipeline, spare: Pipeline, base: bytes, model_home: Path
) -> None:
    """Each has its own weights, and other weights for the text encoders than for the UNet."""
    merge_by_hand(
        spare, lora_tensors(model_home, "anime-style"), weight=0.5, text_encoder_weight=1.25
    )
    merge_by_hand(
        spare, lora_tensors(model_home, "neon-lights"), weight=0.75, text_encoder_weight=0.75
    )

    image = drawn(
        model,
        weighted(model, tiny_lora(model_home, "anime-style"), weight=0.5, text_encoder_weight=1.25),
        weighted(model, tiny_lora(model_home, "neon-lights"), weight=0.75),
    )

    assert difference(image, pixels(spare)) <= 1
    assert difference(image, base) > 32


# --- weights


def test_weight_zero_is_no_lora(model: Pipeline, base: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya_lora((*UNET, *TEXT)))

    assert drawn(model, weighted(model, path, weight=0.0)) == base
    assert drawn(model, weighted(model, path, weight=0.1)) != base


def test_an_empty_set_changes_nothing(model: Pipeline, base: bytes) -> None:
    with model.with_loras([]) as merged:
        assert merged.relative_norms == []
        assert pixels(model) == base


@pytest.mark.parametrize("spell", [kohya_lora, peft_lora])
def test_unet_and_text_encoders_have_separate_weights(
    model: Pipeline, base: bytes, tmp_path: Path, spell: Callable[[Sequence[Target]], Tensors]
) -> None:
    """A weight of 0 for one component gives the image of a file without that component."""
    whole = write(tmp_path / "whole.safetensors", spell((*UNET, *TEXT)))
    tensors = spell((*UNET, *TEXT))
    unet_only = write(tmp_path / "unet.safetensors", {key: tensors[key] for key in spell(UNET)})
    text_only = write(tmp_path / "text.safetensors", {key: tensors[key] for key in spell(TEXT)})

    without_text = drawn(model, weighted(model, whole, weight=1.0, text_encoder_weight=0.0))
    without_unet = drawn(model, weighted(model, whole, weight=0.0, text_encoder_weight=1.0))

    assert without_text == drawn(model, weighted(model, unet_only))
    assert without_unet == drawn(model, weighted(model, text_only))
    assert len({base, without_text, without_unet}) == 3


# --- several at once


def test_two_loras_are_not_either_of_them_alone(
    model: Pipeline, base: bytes, tmp_path: Path
) -> None:
    one = weighted(model, write(tmp_path / "one.safetensors", kohya_lora(UNET)))
    other = weighted(model, write(tmp_path / "other.safetensors", peft_lora(TEXT)))

    images = {base, drawn(model, one), drawn(model, other), drawn(model, one, other)}

    assert len(images) == 4


def test_one_file_twice_acts_twice(model: Pipeline, base: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", peft_lora((*UNET, *TEXT)))

    twice = drawn(model, weighted(model, path, weight=0.5), weighted(model, path, weight=0.25))
    once = drawn(model, weighted(model, path, weight=0.75))

    assert difference(twice, once) <= 1
    assert difference(twice, base) > 16


def test_the_order_of_loras_changes_no_bit(model: Pipeline, tmp_path: Path) -> None:
    one = weighted(model, write(tmp_path / "1.safetensors", kohya_lora((*UNET, *TEXT))), weight=0.3)
    other = weighted(
        model, write(tmp_path / "2.safetensors", peft_lora((*UNET, *TEXT))), weight=0.7
    )

    assert drawn(model, one, other) == drawn(model, other, one)


# --- the numbers


def random_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(3)
    return (
        nn.ModuleDict({f"{index}": nn.Linear(48, 64) for index in range(5)})
        .to(dtype)
        .requires_grad_(False)
    )


def factors(path: Path, model: nn.Module, *, rank: int, seed: int, component: str = "unet") -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            tensors[f"{component}.{name}.lora_A.weight"] = torch.randn(
                rank, 48, generator=generator
            )
            tensors[f"{component}.{name}.lora_B.weight"] = (
                torch.randn(64, rank, generator=generator) / 50
            )
    return write(path, tensors)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_three_loras_are_rounded_once(tmp_path: Path, mode: Mode, dtype: torch.dtype) -> None:
    """The merged weight is the fp64 sum in the model's type, except for a few ties."""
    model = random_model(dtype)
    weights = Weights({"unet": model})
    reader, patch = Reader(weights), Patch(weights, mode=mode)
    paths = [
        factors(tmp_path / f"{rank}.safetensors", model, rank=rank, seed=rank) for rank in (4, 8, 3)
    ]
    loras = [
        WeightedLora(lora=reader.read(path, digest=path.name, source=path.name), unet_weight=weight)
        for path, weight in zip(paths, (0.7, -0.4, 1.3), strict=True)
    ]
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    truth = {name: weight.double() for name, weight in before.items()}
    for path, weight in zip(paths, (0.7, -0.4, 1.3), strict=True):
        tensors = load_file(path)
        for name in [name for name in truth if name.endswith("weight")]:
            module = f"unet.{name.removesuffix('.weight')}"
            change = (
                tensors[f"{module}.lora_B.weight"].double()
                @ tensors[f"{module}.lora_A.weight"].double()
            )
            truth[name] += weight * change

    with patch.applied(loras):
        merged = {name: weight.clone() for name, weight in model.named_parameters()}

    for name, exact in truth.items():
        if dtype is torch.float32:
            assert torch.allclose(merged[name].double(), exact, rtol=0, atol=1e-6)
        else:
            assert float((merged[name] != exact.to(dtype)).double().mean()) < 1e-3
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_relative_norm_is_that_of_the_delta_to_the_changed_weights(
    model: Pipeline, model_home: Path
) -> None:
    """The tiny LoRAs are built with 0.8, 1.6 and 2 times the norm of each weight."""
    for name, strength in (("anime-style", 0.8), ("neon-lights", 1.6), ("cyberpunk-style", 2.0)):
        with model.patch.applied([weighted(model, tiny_lora(model_home, name), weight=-0.5)]) as (
            norm,
        ):
            assert norm == pytest.approx(strength / 2, rel=1e-4)


# --- work that is not done twice


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Record each merge."""
    seen: list[object] = []
    merge = Patch._merge

    def counted(patch: Patch, plan: Plan) -> Plan:
        seen.append(plan)
        return merge(patch, plan)

    monkeypatch.setattr(Patch, "_merge", counted)
    return seen


def test_the_same_set_again_is_a_change_of_pointers(model_home: Path, merges: list[object]) -> None:
    """In any order; another weight is another set."""
    model = load_pipeline(model_home)
    one, other = (
        weighted(model, tiny_lora(model_home, name)) for name in ("anime-style", "neon-lights")
    )
    first = drawn(model, one, other)

    assert drawn(model, other, one) == first
    assert len(merges) == 1
    assert (
        drawn(model, one, weighted(model, tiny_lora(model_home, "neon-lights"), weight=0.9))
        != first
    )
    assert len(merges) == 2


def test_a_merged_set_holds_none_of_its_loras(model_home: Path) -> None:
    """The bound of the memory cache holds while a set is merged."""
    model = load_pipeline(model_home)
    lora = weighted(model, tiny_lora(model_home, "anime-style"))
    held = weakref.ref(lora.lora.batches[0].up)
    drawn(model, lora)

    del lora
    gc.collect()

    assert held() is None


def test_a_set_after_another_is_the_set_alone(model_home: Path) -> None:
    """The second set changes fewer weights than the first."""
    model, fresh = load_pipeline(model_home), load_pipeline(model_home)
    wide, narrow = tiny_lora(model_home, "anime-style"), tiny_lora(model_home, "cyberpunk-style")
    drawn(model, weighted(model, wide))

    assert drawn(model, weighted(model, narrow)) == drawn(fresh, weighted(fresh, narrow))


def test_an_interrupted_merge_is_never_reused(
    model_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_pipeline(model_home)
    lora = weighted(model, tiny_lora(model_home, "anime-style"))
    whole = drawn(model, lora)
    model.patch._merged = None  # forget the merged set
    with monkeypatch.context() as context:
        context.setattr("zlora_worker.lora.merge.Plan.merge", raising_after(3))
        with pytest.raises(Interrupted):
            drawn(model, lora)

    assert drawn(model, lora) == whole


# --- exceptions at any point


class Interrupted(BaseException):
    """Exception of a signal's handler."""


def raising_after(calls: int) -> Callable[..., None]:
    """Return a function that does nothing so many times, then raises."""
    left = [calls]

    def call(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted

    return call


def test_the_base_is_restored_when_the_job_fails(model: Pipeline, tmp_path: Path) -> None:
    """The error of the job is raised unchanged."""
    path = write(tmp_path / "1.safetensors", kohya_lora())

    with (
        pytest.raises(ZeroDivisionError),
        model.with_loras([weighted(model, path)]),
    ):
        _ = 1 / 0


@pytest.mark.parametrize(
    "point", [(step, when) for step in ("_apply", "_put_back", "_merge") for when in (0, 1)]
)
def test_a_signal_around_any_step_leaves_the_base(
    model: Pipeline,
    base: bytes,
    model_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    point: tuple[str, int],
) -> None:
    """The signal arrives before the step and after it."""
    attribute, when = point
    lora = weighted(model, tiny_lora(model_home, "anime-style"))
    model.patch._merged = None  # forget the merged set
    step, signals = getattr(model.patch, attribute), [Interrupted()]

    def interrupted(*arguments: object) -> object:
        if when == 0 and signals:
            raise signals.pop()
        result = step(*arguments)
        if signals:
            raise signals.pop()
        return result

    with monkeypatch.context() as context:
        context.setattr(model.patch, attribute, interrupted)
        with pytest.raises(Interrupted), model.with_loras([lora]):
            assert pixels(model) != base


@pytest.fixture
def one_thread_afterwards() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture
def loaded(model_home: Path) -> Pipeline:
    """Load a model for one test."""
    return load_pipeline(model_home)


@pytest.mark.usefixtures("one_thread_afterwards")
def test_no_thread_still_merges_when_a_merge_fails(
    loaded: Pipeline, model_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that goes on would write into the weights of the next job."""
    lora = weighted(loaded, tiny_lora(model_home, "anime-style"))
    torch.set_num_threads(3)
    active, calls = list[int](), count()

    def merge(*_: object) -> None:
        active.append(1)
        time.sleep(0.01)
        active.pop()
        if next(calls) == 1:
            raise Interrupted

    monkeypatch.setattr("zlora_worker.lora.merge.Plan.merge", merge)
    with pytest.raises(Interrupted), loaded.patch.applied([lora]):
        pytest.fail("the merge succeeded")

    assert active == []
    assert torch.get_num_threads() == 3


def test_no_thread_still_merges_after_a_signal_during_the_wait_for_it() -> None:
    pool, begun, gate, merged = MergePool(), threading.Event(), threading.Event(), list[int]()

    def merge(_chunk: Chunk, thread: int) -> None:
        if thread == 0:
            assert begun.wait(30)
            return
        begun.set()
        assert gate.wait(30)
        merged.append(thread)

    def strike(*_: object) -> None:
        threading.Timer(0.05, gate.set).start()
        raise Interrupted

    before = signal.signal(signal.SIGALRM, strike)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(Interrupted):
            pool.merge(2, chunks(2), merge)
        run_to_completion(pool.stop)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert merged == [1]


def chunks(count: int) -> list[Chunk]:
    return [Chunk(stack=0, first=0, last=1, top=index, bottom=index + 1) for index in range(count)]


# The exception of a signal during garbage collection is lost, as in a worker.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("one_thread_afterwards")
@pytest.mark.parametrize("mode", MODES)
def test_a_signal_at_any_time_neither_blocks_a_merge_nor_changes_the_base(
    tmp_path: Path, mode: Mode
) -> None:
    """The exception of a signal can leave a lock of `threading` acquired for ever."""
    module = random_model(torch.float32)
    weights = Weights({"unet": module})
    path = factors(tmp_path / "a.safetensors", module, rank=4, seed=1)
    lora = Reader(weights).read(path, digest="a", source="a")
    patch = Patch(weights, mode=mode)
    kept = [stack.base.clone() for stack in weights.stacks]
    chance, signals = random.Random(1), 0

    def strike(*_: object) -> None:
        raise Interrupted

    def merge(number: int) -> None:
        """Merge another set each time, so that none is reused."""
        with patch.applied([WeightedLora(lora=lora, unet_weight=1 + number / 1000)]):
            pass

    torch.set_num_threads(3)
    durations = []
    for number in range(-6, 0):
        start = time.perf_counter()
        merge(number)
        durations.append(time.perf_counter() - start)
    duration = min(durations)
    before = signal.signal(signal.SIGALRM, strike)
    faulthandler.dump_traceback_later(100, exit=True)  # if a merge blocks
    try:
        for number in range(2000):  # more only if many signals come after the end of a merge
            if signals == 200:
                break
            try:
                signal.setitimer(signal.ITIMER_REAL, 1e-6 + chance.random() * duration)
                try:
                    merge(number)
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupted:
                signals += 1
            patch.restore()
            assert torch.get_num_threads() == 3
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)

    assert signals == 200
    assert all(
        torch.equal(stack.base, base) for stack, base in zip(weights.stacks, kept, strict=True)
    )
    assert weights.moved_parameters() == []


@pytest.mark.usefixtures("one_thread_afterwards")
@pytest.mark.parametrize("step", ["merge", "stop"])
def test_torch_has_its_threads_again_after_an_interrupted_merge(
    loaded: Pipeline, model_home: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """A signal arrives before the end of the merge, or during the wait for its threads."""
    lora = weighted(loaded, tiny_lora(model_home, "anime-style"))
    torch.set_num_threads(3)
    whole, signals = getattr(MergePool, step), [Interrupted()]

    def interrupted(pool: MergePool, *arguments: Any) -> None:
        if step == "stop" and signals:
            raise signals.pop()
        whole(pool, *arguments)
        if signals:
            raise signals.pop()

    monkeypatch.setattr(MergePool, step, interrupted)
    with pytest.raises(Interrupted), loaded.patch.applied([lora]):
        pytest.fail("the merge succeeded")

    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("one_thread_afterwards")
def test_the_number_of_threads_changes_no_bit(loaded: Pipeline, model_home: Path) -> None:
    lora = weighted(loaded, tiny_lora(model_home, "anime-style"))
    first = drawn(loaded, lora)
    loaded.patch._merged = None  # forget the merged set
    torch.set_num_threads(3)
    with loaded.patch.applied([lora]):
        torch.set_num_threads(1)
        assert pixels(loaded) == first


def test_run_to_completion_repeats_an_action_and_then_raises_the_interruption() -> None:
    done: list[int] = []

    def action() -> None:
        done.append(len(done))
        if len(done) < 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_to_completion(action)

    assert done == [0, 1, 2]


def test_a_base_that_cannot_be_restored_is_an_error(
    loaded: Pipeline, model_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the device has failed, the model is lost, whatever the error of the job."""

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with (
        pytest.raises(BaseNotRestored, match="illegal memory access"),
        loaded.with_loras([weighted(loaded, tiny_lora(model_home, "anime-style"))]),
    ):
        monkeypatch.setattr(loaded.patch, "_put_back", broken)

    assert loaded.state is PipelineState.DIRTY


# --- memory


def test_only_stacks_that_change_have_a_shadow(model_home: Path) -> None:
    model = load_pipeline(model_home)
    assert model.patch._shadows == {}

    drawn(model, weighted(model, tiny_lora(model_home, "cyberpunk-style")))

    shadowed = {model.patch._weights.stacks[number].component for number in model.patch._shadows}
    assert shadowed == {"unet"}


@pytest.mark.parametrize(("free", "mode"), [(3.0, "shadow"), (1.9, "inplace")])
def test_a_gpu_has_a_shadow_if_the_same_amount_of_memory_stays_free(
    monkeypatch: pytest.MonkeyPatch, free: float, mode: Mode
) -> None:
    """`free` is a multiple of the size of the weights; the GPU is simulated."""
    weights = Weights({"unet": random_model(torch.float16)})
    assert choose_mode(weights, "auto") == "shadow"
    monkeypatch.setattr(Weights, "device", torch.device("cuda"))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda _device: (int(free * weights.nbytes), 2**40)
    )

    assert choose_mode(weights, "auto") == mode
    assert choose_mode(weights, "shadow") == "shadow"
    assert choose_mode(weights, "inplace") == "inplace"


def test_the_weights_of_a_model_are_moved_and_keep_their_values() -> None:
    """Every parameter but embeddings is a view of a stack, in the slot of its name."""
    model = random_model(torch.float32)
    model.add_module("words", nn.Embedding(5, 64))
    before = {name: weight.clone() for name, weight in model.named_parameters()}

    weights = Weights({"unet": model})

    assert {name: weight.shape for name, weight in model.named_parameters()} == {
        n: w.shape for n, w in before.items()
    }
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    for (_, module, leaf), slot in weights.slots.items():
        found: Tensor = model.get_parameter(f"{module}.{leaf}")
        assert found.data_ptr() == weights.stacks[slot.stack].base[slot.row].data_ptr()
    assert len(weights.slots) == len(before) - 1
