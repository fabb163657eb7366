"""peft's configuration beside a LoRA, and its patterns, compared with peft."""

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from peft.utils.other import get_pattern_key
from support import lora_files
from support.fakes import UNET, Tensors, kohya_lora, peft_lora, write
from support.lora_files import SOURCE, State, merged, require_equal, require_unchanged, snapshot
from zlora.errors import LoraMismatch
from zlora_worker.lora.adapter_config import AdapterConfig
from zlora_worker.lora.reader import Lora
from zlora_worker.model.pipeline import Pipeline

CONFIG: Final = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
SLOW: Final = r"(?:(\w)|(\w)\w|\w(\w)\w)+(?(1)\W|\W\W)"  # tries every way to split a name


@pytest.fixture(scope="module")
def base(model: Pipeline) -> State:
    return snapshot(model)


@pytest.fixture(autouse=True)
def unchanged(model: Pipeline, base: State) -> Iterator[None]:
    """Require after each test that no bit of the weights has changed."""
    yield
    require_unchanged(model, base)


def read(model: Pipeline, path: Path, **options: Any) -> Lora:
    """Read a file; the digest is that of everything that its deltas depend on."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest() + str(options)
    return model.reader.read(path, digest=digest, source=SOURCE, **options)


def refusal(model: Pipeline, path: Path, config: object, **options: Any) -> str:
    """Return the message of a file that is refused with this configuration beside it."""
    document = config if isinstance(config, bytes) else json.dumps(config).encode()
    with pytest.raises(LoraMismatch) as raised:
        read(model, path, config=document, **options)
    message = str(raised.value)
    assert SOURCE in message
    assert len(message) < 500
    return message


SAVED: Final = {
    "LoRA": ("LoraConfig", {"r": 4, "lora_alpha": 8}),
    "LoRA with patterns": (
        "LoraConfig",
        {
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "alpha_pattern": {r".*attn1\.to_q": 3, r"down_blocks\.\d+\.resnets\.0\.conv1": 5},
            "rank_pattern": {"to_q": 2, r"(?:mid|up)_block.*conv1": 3},
        },
    ),
    "DoRA": ("LoraConfig", {"r": 4, "lora_alpha": 8, "use_dora": True}),
    "LoHa": ("LoHaConfig", {"r": 4, "alpha": 8, "alpha_pattern": {"to_q": 3}}),
    "LoHa of kernels": ("LoHaConfig", {"r": 4, "alpha": 8, "use_effective_conv2d": True}),
    "LoKr": ("LoKrConfig", {"r": 2, "alpha": 8, "decompose_both": True}),
    "LoKr without a rank": ("LoKrConfig", {"r": 40, "alpha": 8}),
}


@pytest.mark.parametrize(("kind", "options"), SAVED.values(), ids=SAVED)
def test_a_folder_that_peft_saves_acts_as_peft_merges_it(
    model: Pipeline,
    base: State,
    model_home: Path,
    tmp_path: Path,
    *,
    kind: str,
    options: dict[str, Any],
) -> None:
    """peft keeps alpha in a file beside the LoRA; without it the change has another strength."""
    expected = lora_files.saved_by_peft(model_home, tmp_path, kind, options)
    path = tmp_path / "adapter_model.safetensors"

    lora = read(model, path, config=(tmp_path / "adapter_config.json").read_bytes())
    alone = read(model, path)

    require_equal(merged(model, lora), base, expected)
    assert (lora.format, lora.alpha_assumed) == ("peft", False)
    assert alone.alpha_assumed
    with pytest.raises(AssertionError):
        require_equal(merged(model, alone), base, expected)


def test_an_alpha_of_the_request_is_that_of_layers_without_one(
    model: Pipeline, tmp_path: Path
) -> None:
    path = write(tmp_path / "a", peft_lora(ranks=(2, 4)))

    found = merged(model, read(model, path, alpha=6.0))

    config = json.dumps(CONFIG | {"lora_alpha": 6, "rank_pattern": {"attn2.to_k": 4}}).encode()
    beside = merged(model, read(model, path, config=config))
    assert all(torch.equal(found[weight], beside[weight]) for weight in beside)


def test_an_alpha_of_the_request_is_refused_if_the_file_has_its_own(
    model: Pipeline, tmp_path: Path
) -> None:
    with pytest.raises(LoraMismatch, match="has its own"):
        read(model, write(tmp_path / "a", kohya_lora()), alpha=6.0)


def test_only_a_file_of_peft_without_alpha_is_one_with_an_assumed_alpha(
    model: Pipeline, tmp_path: Path
) -> None:
    """kohya's files without alpha have the scale 1, by definition."""
    bare = {name: tensor for name, tensor in kohya_lora().items() if "alpha" not in name}
    with_alpha = {f"unet.{target.module}.alpha": torch.tensor(1.0) for target in UNET} | peft_lora()

    assumed = [
        read(model, write(tmp_path / f"a{number}", tensors)).alpha_assumed
        for number, tensors in enumerate((peft_lora(), bare, kohya_lora(), with_alpha))
    ]

    assert assumed == [True, False, False, False]


# --- patterns


def scales(table: dict[str, float], modules: list[str]) -> list[float | None]:
    config = AdapterConfig({"alpha_pattern": table, "lora_alpha": -1.0, "r": 1}, name="it")
    return [config.scale([module], 1) for module in modules]


def scales_of_peft(table: dict[str, float], modules: list[str]) -> list[float | None]:
    return [table.get(get_pattern_key(list(table), module), -1.0) for module in modules]


def names(model: Pipeline) -> list[str]:
    return [name for name, _ in model.pipeline.unet.named_modules() if name]


def test_patterns_match_as_in_peft(model: Pipeline) -> None:
    """Plain, anchored, escaped and real expressions; the first that matches counts."""
    modules = names(model)
    chance = random.Random(20260105)
    for _ in range(15):
        patterns = []
        for name in chance.sample(modules, 12):
            parts = name.split(".")
            suffix = ".".join(parts[chance.randrange(len(parts)) :])
            patterns += [
                chance.choice(
                    [
                        name,
                        suffix,
                        f"^{name}",
                        f"^{suffix}",
                        f"{suffix}$",
                        suffix.replace(".", r"\."),
                        f".*{suffix}",
                        suffix.replace("0", r"\d+"),
                        f"(?:{suffix}|conv1)",
                        f".*{parts[0]}.*{parts[-1]}",
                    ]
                )
            ]
        table = {pattern: float(number) for number, pattern in enumerate(patterns)}

        assert scales(table, modules) == scales_of_peft(table, modules)


def test_thousands_of_plain_names_match_as_in_peft_and_are_looked_up(model: Pipeline) -> None:
    modules = names(model)
    others = [f"down_blocks.{number}.nowhere" for number in range(4000 - len(modules))]
    table = {name: float(number) for number, name in enumerate([*others, *reversed(modules)])}

    assert scales(table, modules) == [table[name] for name in modules]


def test_expressions_that_take_for_ever_are_refused() -> None:
    config = AdapterConfig({"alpha_pattern": {SLOW: 4.0}, "lora_alpha": 1.0}, name="it")

    with pytest.raises(ValueError, match="more than 1 s"):
        config.scale(["a" * 80], 1)


LIMITS: Final = {
    "patterns": ({f"a{number}": 1 for number in range(5000)}, "5000 patterns"),
    "expressions": ({f"a{number}.*": 1 for number in range(1001)}, "regular expressions"),
    "a pattern": ({"a" * 300: 1}, "300 characters"),
    "a long document": ({"a" * 2**21: 1}, "bytes"),
    "no expression": ({"(": 1}, "not a regular expression"),
}


@pytest.mark.parametrize(("table", "words"), LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("field", ["alpha_pattern", "rank_pattern"])
def test_patterns_beyond_a_limit_are_refused(
    model: Pipeline, tmp_path: Path, field: str, table: dict[str, int], words: str
) -> None:
    path = write(tmp_path / "a", peft_lora())

    assert words in refusal(model, path, CONFIG | {field: table})


# --- refused configurations


REFUSED: Final = {
    "no JSON": (b"{", "cannot be read"),
    "no object": (b"[1]", "cannot be read"),
    "nothing": ({}, "None"),
    "another type": (CONFIG | {"peft_type": "ADALORA"}, "ADALORA"),
    "another file's": (CONFIG | {"r": 8}, "another file"),
    "a rank in words": (CONFIG | {"r": "two"}, "rank"),
    "no rank": ({"peft_type": "LORA", "lora_alpha": 4}, "another file"),
    "no alpha": ({"peft_type": "LORA", "r": 2}, "no alpha"),
    "NaN": (b'{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', "not a number"),
    "another kind": (CONFIG | {"use_qalora": True}, "use_qalora"),
} | {
    start: (CONFIG | {"init_lora_weights": start}, "path_initial_model_for_weight_conversion")
    for start in ("pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga", "loftq")
}


@pytest.mark.parametrize(("config", "words"), REFUSED.values(), ids=REFUSED)
def test_a_configuration_that_is_not_understood_is_refused(
    model: Pipeline, tmp_path: Path, config: object, words: str
) -> None:
    message = refusal(model, write(tmp_path / "a", peft_lora()), config)

    assert "adapter_config.json" in message
    assert words in message


@pytest.mark.parametrize("start", ["gaussian", "eva", "orthogonal", True])
def test_other_beginnings_of_a_training_leave_the_base_model(
    model: Pipeline, tmp_path: Path, start: object
) -> None:
    config = json.dumps(CONFIG | {"init_lora_weights": start}).encode()

    assert read(model, write(tmp_path / "a", peft_lora()), config=config).modules == {"unet": 3}


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_header_that_names_a_changed_base_model_is_refused(
    model: Pipeline, tmp_path: Path, start: str
) -> None:
    from safetensors.torch import save_file

    fields = {"unet.lora_alpha": 2, "unet.r": 2, "unet.init_lora_weights": start}
    tensors: Tensors = peft_lora()
    save_file(tensors, tmp_path / "a", metadata={"lora_adapter_metadata": json.dumps(fields)})

    with pytest.raises(LoraMismatch, match=f"{start}.*path_initial_model_for_weight_conversion"):
        read(model, tmp_path / "a")
