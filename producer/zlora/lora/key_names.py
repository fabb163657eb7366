"""How LoRA files spell modules and the tensors of a change, told from names alone: the only tables of such names."""

import re
from collections import Counter
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Final, NamedTuple

# What tools write before a module's name, dots as underscores. An empty one is a file for one network alone.
PREFIXES: Final[dict[str, tuple[str, ...]]] = {
    "unet": ("unet", "lora_unet", "lycoris", "diffusion_model", "model_diffusion_model", ""),
    "transformer": (
        "transformer",
        "lora_transformer",
        "lycoris",
        "diffusion_model",
        "model_diffusion_model",
        "",
    ),
    "text_encoder": (
        "text_encoder",
        "lora_te1",
        "te1",
        "lycoris_te1",
        "clip_l",
        "text_encoders_clip_l_transformer",
    ),
    "text_encoder_2": (
        "text_encoder_2",
        "lora_te2",
        "te2",
        "lycoris_te2",
        "clip_g",
        "text_encoders_clip_g_transformer",
    ),
}
SOLE_TEXT_ENCODER: Final = "lora_te"  # kohya's for models that have one

# The end of a tensor's name, and what the tensor is. `\2` of peft's is the adapter's name, where it was left in.
_PARTS: Final = tuple(
    (re.compile(rf"^(.+?){pattern}$"), part)
    for pattern, part in (
        (r"\.lora_down\.weight", "down"),
        (r"\.lora_up\.weight", "up"),
        (r"\.lora_mid\.weight", "mid"),
        (r"\.lora_A(?:\.\w+)?\.weight", "down"),
        (r"\.lora_B(?:\.\w+)?\.weight", "up"),
        (r"\.lora_B(?:\.\w+)?\.bias", "up_bias"),
        (r"\.lora_magnitude_vector(?:\.\w+)?(?:\.weight)?", "magnitude"),
        (r"(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight", "down"),
        (r"(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight", "up"),
        (r"\.alpha", "alpha"),
        (r"\.dora_scale", "dora_scale"),
        (r"\.(?:diff|w_norm)", "diff"),
        (r"\.(?:diff_b|b_norm)", "diff_b"),
        (r"\.(hada_(?:w[12]_[ab]|t[12]))", ""),
        (r"\.(lokr_(?:w[12](?:_[ab])?|t2))", ""),
    )
)

# Kinds that are refused by name: they turn or scale activations, and are no change of a weight that could be added.
_UNSUPPORTED: Final = (
    (re.compile(r"\.(?:oft_\w+|oft_R\b.*)"), "OFT"),
    (re.compile(r"\.boft_\w+"), "BOFT"),
    (re.compile(r"\.(?:ia3_l\b|on_input$)"), "IA3"),
    (re.compile(r"\.(?:a1|a2|b1|b2|bm1|bm2)\.weight$"), "GLoRA"),
    (re.compile(r"\.(?:vera_lambda_\w+|lora_embedding_[AB])\b"), "VeRA or an embedding's LoRA"),
    (re.compile(r"\.(?:reshape_weight|set_weight)$"), "a weight's replacement"),
)

# Which tool writes so, by what a key looks like; the first that fits. Only for the receipt.
_FORMATS: Final = (
    (re.compile(r"^lycoris_"), "lycoris"),
    (re.compile(r"^(?:diffusion_model|model\.diffusion_model|text_encoders)\."), "comfyui"),
    (re.compile(r"\.lora_(?:[AB]|magnitude_vector)\b"), "peft"),
    (re.compile(r"(?:\.lora|\.lora_linear_layer|_lora)\.(?:up|down)\.weight$"), "diffusers"),
    (re.compile(r"^lora_(?:unet|te\d?|transformer)_\w+\."), "kohya"),
    (re.compile(r"^(?:lora_)?(?:unet|transformer|te\d|clip_[lg])\."), "onetrainer"),
)

# What the parts of a change make of it, in the order in which a mixture is told.
FACTORS: Final = {
    "lora": frozenset({"down", "up", "mid"}),
    "loha": frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}),
    "lokr": frozenset(
        {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
    ),
    "full": frozenset({"diff"}),
}
RANKED: Final = {  # whose first side is the rank, the first that is there
    "lora": ("down",), "loha": ("hada_w1_b",), "lokr": ("lokr_w1_b", "lokr_w2_b"), "full": (),
}  # fmt: skip
MAGNITUDES: Final = frozenset({"magnitude", "dora_scale"})  # any kind may have one: DoRA
_SHOWN: Final = 3  # names in a message


class Key(NamedTuple):
    """A tensor's name taken apart: the module as the file spells it, and what the tensor is of its change."""

    module: str
    part: str


def split(name: str) -> Key | None:
    """The parts of a tensor's name; None where no tool is known to write it."""
    for pattern, part in _PARTS:
        if found := pattern.match(name):
            return Key(found[1], part or found[2])
    return None


def unsupported_kind(name: str) -> str | None:
    """The kind of change that a tensor belongs to, where that is one which is known and not supported."""
    return next((kind for pattern, kind in _UNSUPPORTED if pattern.search(name)), None)


def factored(parts: AbstractSet[str]) -> list[str]:
    """The kinds whose factors are among the parts of one module; more than one is a mixture that nothing means."""
    return [kind for kind, factors in FACTORS.items() if factors & parts]


def kind_of(parts: AbstractSet[str]) -> str:
    """The kind of change that the parts of one module make, as a receipt has it."""
    kind = next(iter(factored(parts)), "full")
    return f"dora-{kind}" if MAGNITUDES & parts else kind


def format_of(names: Iterable[str]) -> str:
    """The tool that spells most of these tensors' names so; `unknown` for none."""
    tools = Counter(
        next((tool for pattern, tool in _FORMATS if pattern.search(name)), "unknown")
        for name in names
    )
    return tools.most_common(1)[0][0] if tools else "unknown"


def component_of(name: str) -> str:
    """The component that a tensor's name is meant for, by its prefix alone; `unknown` where it has none."""
    spelt = flat(name)
    prefixes = [
        (prefix, component) for component, group in PREFIXES.items() for prefix in group if prefix
    ]
    fitting = [pair for pair in prefixes if spelt.startswith(f"{pair[0]}_")]
    return max(fitting, key=lambda pair: len(pair[0]))[1] if fitting else "unknown"


def some(names: Iterable[str]) -> str:
    """How many tensors, and the first of their names, short: for a message."""
    found = sorted(names)
    return (
        f"{len(found)} tensors, such as {', '.join(name[:60] for name in found[:_SHOWN]) or 'none'}"
    )


def flat(spelling: str) -> str:
    """A module's name as it is compared: dots as underscores, and without peft's wrapping."""
    return spelling.removeprefix("base_model.model.").replace(".", "_")
