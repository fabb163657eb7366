"""LoRAs into the resident model: exactly what their files say, one rounding, and the base afterwards."""

import gc
import signal
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
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
    load_engine,
    lora_tensors,
    peft_lora,
    pixels,
    write,
)
from support.single_file import original_layout
from support.tiny_folder import TINY_LORAS, tiny_lora
from torch import Tensor, nn
from zlora.errors import BaseNotRestored
from zlora_worker.lora.merge import Block, MergePool, Plan, WeightedLora
from zlora_worker.lora.patch import Mode, Patch, choose_mode
from zlora_worker.lora.reader import Reader
from zlora_worker.lora.weights import Weights
from zlora_worker.model.pipeline import Pipeline, PipelineState
from zlora_worker.signals import run_to_completion

WITH_TEXT = ("anime-style", "product-photography-v1")
MODES: tuple[Mode, ...] = ("shadow", "inplace")


@pytest.fixture(scope="module", params=PLACES)
def model(request: pytest.FixtureRequest, model_home: Path) -> Pipeline:
    """In both ways to hold merged weights, on each device: a test of this file says what none may change."""
    return load_engine(model_home, **request.param)


@pytest.fixture
def spare(model: Pipeline, model_home: Path) -> Pipeline:
    """Another model on the same device, to be merged into by hand."""
    return load_engine(model_home, ZLORA_DEVICE=str(model.device))


@pytest.fixture(scope="module")
def base(model: Pipeline) -> bytes:
    """The picture without any LoRA."""
    return pixels(model)


@pytest.fixture(autouse=True)
def nothing_stays(model: Pipeline, base: bytes) -> Iterator[None]:
    """After every test, passed or failed: the whole base is what was loaded, and draws the same picture."""
    yield
    model.check()
    assert model.state is PipelineState.READY
    assert model.base_checked == 1.0
    assert pixels(model) == base


def adapter(
    model: Pipeline, path: Path, *, weight: float = 1.0, text_encoder_weight: float | None = None
) -> WeightedLora:
    """A file with its weights; each file has a path of its own here."""
    return WeightedLora(
        lora=model.reader.read(path, digest=str(path), source=path.name),
        unet_weight=weight,
        text_encoder_weight=weight if text_encoder_weight is None else text_encoder_weight,
    )


def drawn(model: Pipeline, *adapters: WeightedLora) -> bytes:
    """The picture with LoRAs, drawn as a job draws it."""
    with model.with_loras(adapters):
        return pixels(model)


# --- what a file means


def _config(part: Any) -> dict[str, Any]:
    config: dict[str, Any] = (
        part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
    )
    return config


def merge_by_hand(
    model: Pipeline, tensors: Tensors, *, weight: float, text_encoder_weight: float
) -> None:
    """Add `weight * alpha / rank * up @ down` to each weight in fp64. Shares no code with what is tested."""
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
    """In kohya's spelling and in peft's, with text encoders and with convolutions; each of its modules is changed."""
    name, weight = case
    merged = spare
    merge_by_hand(merged, lora_tensors(model_home, name), weight=weight, text_encoder_weight=weight)
    demo = adapter(model, tiny_lora(model_home, name), weight=weight)

    picture = drawn(model, demo)

    assert difference(picture, pixels(merged)) <= 1
    assert difference(picture, base) > 32
    assert set(demo.lora.modules) == ({*PARTS} - {"vae"} if name in WITH_TEXT else {"unet"})


@pytest.mark.parametrize("seed", range(2))
def test_ranks_and_alphas_of_each_module_are_kept(
    model: Pipeline, spare: Pipeline, model_home: Path, tmp_path: Path, seed: int
) -> None:
    """What resizing writes: each module has a rank and an alpha of its own."""
    generator = torch.Generator().manual_seed(seed)
    tensors = lora_tensors(model_home, "anime-style")
    for module in [key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")]:
        rank, alpha = (int(torch.randint(1, 5, (), generator=generator)) for _ in range(2))
        tensors[f"{module}.lora_down.weight"] = tensors[f"{module}.lora_down.weight"][:rank]
        tensors[f"{module}.lora_up.weight"] = tensors[f"{module}.lora_up.weight"][:, :rank]
        tensors[f"{module}.alpha"] = torch.tensor(float(alpha))
    merge_by_hand(spare, tensors, weight=1.0, text_encoder_weight=1.0)

    picture = drawn(model, adapter(model, write(tmp_path / "resized.safetensors", tensors)))

    assert difference(picture, pixels(spare)) <= 1


@pytest.mark.parametrize(
    "tensors",
    [
        kohya_lora((*UNET, *TEXT)),
        peft_lora((*UNET, *TEXT)),
        peft_lora((*UNET, *TEXT), ranks=(2, 8, 4)),
    ],
    ids=["kohya", "peft", "ranks that differ"],
)
def test_names_and_shapes_that_people_have_act_as_if_merged_by_hand(
    model: Pipeline, spare: Pipeline, base: bytes, tmp_path: Path, tensors: Tensors
) -> None:
    """Cross-attention, feed-forward and the text encoders' layers, under the names that training tools write."""
    merged = spare
    merge_by_hand(merged, tensors, weight=0.5, text_encoder_weight=0.25)

    path = write(tmp_path / "a.safetensors", tensors)
    picture = drawn(model, adapter(model, path, weight=0.5, text_encoder_weight=0.25))

    assert difference(picture, pixels(merged)) <= 1
    assert difference(picture, base) > 16


def test_two_loras_act_as_if_both_were_merged(
    model: Pipeline, spare: Pipeline, base: bytes, model_home: Path
) -> None:
    """Each with its own weights, and with weights for the text encoders that differ from the UNet's."""
    merged = spare
    merge_by_hand(
        merged, lora_tensors(model_home, "anime-style"), weight=0.5, text_encoder_weight=1.25
    )
    merge_by_hand(
        merged, lora_tensors(model_home, "neon-lights"), weight=0.75, text_encoder_weight=0.75
    )

    picture = drawn(
        model,
        adapter(model, tiny_lora(model_home, "anime-style"), weight=0.5, text_encoder_weight=1.25),
        adapter(model, tiny_lora(model_home, "neon-lights"), weight=0.75),
    )

    assert difference(picture, pixels(merged)) <= 1
    assert difference(picture, base) > 32


# --- weights


def test_weight_zero_is_no_lora(model: Pipeline, base: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", kohya_lora((*UNET, *TEXT)))

    assert drawn(model, adapter(model, path, weight=0.0)) == base
    assert drawn(model, adapter(model, path, weight=0.1)) != base


def test_no_loras_touch_nothing(model: Pipeline, base: bytes) -> None:
    with model.exclusive(), model.patch.applied([]) as norms:
        assert norms == []
        assert pixels(model) == base


@pytest.mark.parametrize("spell", [kohya_lora, peft_lora])
def test_unet_and_text_encoders_are_weighed_apart(
    model: Pipeline, base: bytes, tmp_path: Path, spell: Callable[[Sequence[Target]], Tensors]
) -> None:
    """A weight of 0 for one part gives the picture of a file without that part."""
    whole = write(tmp_path / "whole.safetensors", spell((*UNET, *TEXT)))
    tensors = spell((*UNET, *TEXT))
    unet_only = write(tmp_path / "unet.safetensors", {key: tensors[key] for key in spell(UNET)})
    text_only = write(tmp_path / "text.safetensors", {key: tensors[key] for key in spell(TEXT)})

    without_text = drawn(model, adapter(model, whole, weight=1.0, text_encoder_weight=0.0))
    without_unet = drawn(model, adapter(model, whole, weight=0.0, text_encoder_weight=1.0))

    assert without_text == drawn(model, adapter(model, unet_only))
    assert without_unet == drawn(model, adapter(model, text_only))
    assert len({base, without_text, without_unet}) == 3


# --- several at once


def test_two_loras_are_not_either_of_them_alone(
    model: Pipeline, base: bytes, tmp_path: Path
) -> None:
    one = adapter(model, write(tmp_path / "one.safetensors", kohya_lora(UNET)))
    other = adapter(model, write(tmp_path / "other.safetensors", peft_lora(TEXT)))

    pictures = {base, drawn(model, one), drawn(model, other), drawn(model, one, other)}

    assert len(pictures) == 4


def test_one_file_twice_acts_twice(model: Pipeline, base: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", peft_lora((*UNET, *TEXT)))

    twice = drawn(model, adapter(model, path, weight=0.5), adapter(model, path, weight=0.25))
    once = drawn(model, adapter(model, path, weight=0.75))

    assert difference(twice, once) <= 1
    assert difference(twice, base) > 16


def test_the_order_of_loras_changes_no_bit(model: Pipeline, tmp_path: Path) -> None:
    one = adapter(model, write(tmp_path / "1.safetensors", kohya_lora((*UNET, *TEXT))), weight=0.3)
    other = adapter(model, write(tmp_path / "2.safetensors", peft_lora((*UNET, *TEXT))), weight=0.7)

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
    """The merged weight is the fp64 sum rounded to the model's type, but where that sum is all but half way between."""
    model = random_model(dtype)
    weights = Weights({"unet": model})
    reader, patch = Reader(weights), Patch(weights, mode=mode)
    paths = [
        factors(tmp_path / f"{rank}.safetensors", model, rank=rank, seed=rank) for rank in (4, 8, 3)
    ]
    adapters = [
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

    with patch.applied(adapters):
        merged = {name: weight.clone() for name, weight in model.named_parameters()}

    for name, exact in truth.items():
        if dtype is torch.float32:
            assert torch.allclose(merged[name].double(), exact, rtol=0, atol=1e-6)
        else:
            assert float((merged[name] != exact.to(dtype)).double().mean()) < 1e-3
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_a_relative_norm_is_that_of_the_change_to_the_weights_that_it_touches(
    model: Pipeline, model_home: Path
) -> None:
    """The tiny model's LoRAs are made so: 0.8, 1.6 and 2 times each weight's norm."""
    for name, strength in (("anime-style", 0.8), ("neon-lights", 1.6), ("cyberpunk-style", 2.0)):
        with model.patch.applied([adapter(model, tiny_lora(model_home, name), weight=-0.5)]) as (
            norm,
        ):
            assert norm == pytest.approx(strength / 2, rel=1e-4)


# --- work that is not done twice


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows by one with each merge."""
    seen: list[object] = []
    merge = Patch._merge

    def counted(patch: Patch, plan: Plan) -> Plan:
        seen.append(plan)
        return merge(patch, plan)

    monkeypatch.setattr(Patch, "_merge", counted)
    return seen


def test_the_same_set_again_is_a_change_of_pointers(model_home: Path, merges: list[object]) -> None:
    """In any order and after a job without LoRAs; another weight is another set."""
    model = load_engine(model_home)
    one, other = (
        adapter(model, tiny_lora(model_home, name)) for name in ("anime-style", "neon-lights")
    )
    first = drawn(model, one, other)

    assert drawn(model, other, one) == first
    assert len(merges) == 1
    assert (
        drawn(model, one, adapter(model, tiny_lora(model_home, "neon-lights"), weight=0.9)) != first
    )
    assert len(merges) == 2


def test_a_merged_set_holds_none_of_its_loras(model_home: Path) -> None:
    """They are the shelf's, whose bound on memory holds while a set is merged."""
    model = load_engine(model_home)
    demo = adapter(model, tiny_lora(model_home, "anime-style"))
    held = weakref.ref(demo.lora.batches[0].up)
    drawn(model, demo)

    del demo
    gc.collect()

    assert held() is None


def test_a_set_after_another_is_the_set_alone(model_home: Path) -> None:
    """From one set to the next without a restore between, the second touching fewer weights."""
    model, fresh = load_engine(model_home), load_engine(model_home)
    wide, narrow = tiny_lora(model_home, "anime-style"), tiny_lora(model_home, "cyberpunk-style")
    drawn(model, adapter(model, wide))

    assert drawn(model, adapter(model, narrow)) == drawn(fresh, adapter(fresh, narrow))


def test_a_merge_that_was_cut_short_is_never_taken_for_a_merged_set(
    model_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_engine(model_home)
    demo = adapter(model, tiny_lora(model_home, "anime-style"))
    whole = drawn(model, demo)
    with model.patch.applied([]):  # forget the merged set
        pass
    with monkeypatch.context() as context:
        context.setattr("zlora_worker.lora.merge.Plan.merge", raising_after(3))
        with pytest.raises(Interrupted):
            drawn(model, demo)

    assert drawn(model, demo) == whole


# --- whatever is raised, wherever


class Interrupted(BaseException):
    """As a signal's handler raises it."""


def raising_after(calls: int) -> Callable[..., None]:
    """Does nothing so many times, then raises."""
    left = [calls]

    def call(*_: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted

    return call


def test_loras_go_when_the_job_fails(model: Pipeline, tmp_path: Path) -> None:
    """Whatever the job raises comes through as it is."""
    path = write(tmp_path / "1.safetensors", kohya_lora())

    with (
        pytest.raises(ZeroDivisionError),
        model.exclusive(),
        model.patch.applied([adapter(model, path)]),
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
    """Before it is done, and after."""
    attribute, when = point
    demo = adapter(model, tiny_lora(model_home, "anime-style"))
    with model.patch.applied([]):  # forget the merged set
        pass
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
        with pytest.raises(Interrupted), model.with_loras([demo]):
            assert pixels(model) != base


def test_no_thread_still_merges_when_a_merge_is_cut_short(
    model_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would write into the next job's weights."""
    model = load_engine(model_home)
    monkeypatch.setattr("zlora_worker.lora.merge.Plan.merge", raising_after(1))
    torch.set_num_threads(3)
    try:
        with pytest.raises(Interrupted):
            drawn(model, adapter(model, tiny_lora(model_home, "anime-style")))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)

    assert [thread.name for thread in threading.enumerate() if "merge" in thread.name] == []


def test_no_thread_still_merges_after_a_signal_while_they_are_waited_for() -> None:
    """CPython takes a thread for ended where a signal has interrupted the wait for it."""
    crew, begun, gate, merged = MergePool(), threading.Event(), threading.Event(), list[int]()

    def merge(_block: Block, thread: int) -> None:
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
            crew.merge(2, blocks(2), merge)
        run_to_completion(crew.stop)
    finally:
        signal.signal(signal.SIGALRM, before)

    assert merged == [1]


def blocks(count: int) -> list[Block]:
    return [Block(stack=0, first=0, last=1, top=index, bottom=index + 1) for index in range(count)]


@pytest.mark.parametrize("step", ["merge", "stop"])
def test_torch_has_its_threads_again_after_a_merge_was_cut_short(
    model_home: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Else every later picture is drawn on one. A signal may come before the merge's end, and while it is awaited."""
    model = load_engine(model_home)
    whole, signals = getattr(MergePool, step), [Interrupted()]

    def interrupted(crew: MergePool, *arguments: Any) -> None:
        if step == "stop" and signals:
            raise signals.pop()
        whole(crew, *arguments)
        if signals:
            raise signals.pop()

    monkeypatch.setattr(MergePool, step, interrupted)
    torch.set_num_threads(3)
    try:
        with pytest.raises(Interrupted):
            drawn(model, adapter(model, tiny_lora(model_home, "anime-style")))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)


def test_threads_change_no_bit(model_home: Path) -> None:
    one, three = load_engine(model_home), load_engine(model_home)
    first = drawn(one, adapter(one, tiny_lora(model_home, "anime-style")))
    torch.set_num_threads(3)
    try:
        with three.patch.applied([adapter(three, tiny_lora(model_home, "anime-style"))]):
            torch.set_num_threads(1)
            assert pixels(three) == first
    finally:
        torch.set_num_threads(1)


def test_an_action_is_insisted_on_and_what_interrupted_it_is_raised_then() -> None:
    done: list[int] = []

    def action() -> None:
        done.append(len(done))
        if len(done) < 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        run_to_completion(action)

    assert done == [0, 1, 2]


def test_a_base_that_cannot_be_put_back_is_told(
    model_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device that has failed: whatever the job was, the model is lost."""
    model = load_engine(model_home)

    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with (
        pytest.raises(BaseNotRestored, match="illegal memory access"),
        model.exclusive(),
        model.patch.applied([adapter(model, tiny_lora(model_home, "anime-style"))]),
    ):
        monkeypatch.setattr(model.patch, "_put_back", broken)

    assert model.state is PipelineState.DIRTY


# --- memory


def test_a_shadow_is_made_of_the_stacks_that_are_touched_and_no_others(model_home: Path) -> None:
    model = load_engine(model_home)
    assert model.patch._shadows == {}

    drawn(model, adapter(model, tiny_lora(model_home, "cyberpunk-style")))

    shadowed = {model.patch._weights.stacks[number].component for number in model.patch._shadows}
    assert shadowed == {"unet"}


@pytest.mark.parametrize(("free", "mode"), [(3.0, "shadow"), (1.9, "inplace")])
def test_a_gpu_has_a_shadow_where_as_much_again_stays_free(
    monkeypatch: pytest.MonkeyPatch, free: float, mode: Mode
) -> None:
    """`free` is in times the weights' size. No GPU here: only the choice is tested."""
    weights = Weights({"unet": random_model(torch.float16)})
    assert choose_mode(weights, "auto") == "shadow"
    monkeypatch.setattr(Weights, "device", torch.device("cuda"))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda _device: (int(free * weights.nbytes), 2**40)
    )

    assert choose_mode(weights, "auto") == mode
    assert choose_mode(weights, "shadow") == "shadow"
    assert choose_mode(weights, "inplace") == "inplace"


def test_weights_of_a_model_are_moved_and_keep_their_values() -> None:
    """Every parameter but embeddings is a view of a stack, in a place that its name finds."""
    model = random_model(torch.float32)
    model.add_module("words", nn.Embedding(5, 64))
    before = {name: weight.clone() for name, weight in model.named_parameters()}

    weights = Weights({"unet": model})

    assert {name: weight.shape for name, weight in model.named_parameters()} == {
        n: w.shape for n, w in before.items()
    }
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    for (_, module, leaf), place in weights.slots.items():
        found: Tensor = model.get_parameter(f"{module}.{leaf}")
        assert found.data_ptr() == weights.stacks[place.stack].base[place.row].data_ptr()
    assert len(weights.slots) == len(before) - 1
