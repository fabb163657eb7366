"""Prefixes and suffixes of names in LoRA files of all tools, and the kinds of LoRA they show."""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from functools import lru_cache, wraps
from typing import Final, NamedTuple, TypeVar

# Prefixes of a component's modules, dots as underscores; "" is for files of one network only.
PREFIXES: Final[dict[str, tuple[str, ...]]] = {
    "unet": ("unet", "lora_unet", "lycoris", "diffusion_model", "model_diffusion_model", ""),
    "transformer": (
        "transformer",
        "lora_transformer",
        "lora_unet",
        "lora_unet_",  # two underscores follow
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
DENOISERS: Final = ("unet", "transformer")  # which share prefixes
SINGLE_TEXT_ENCODER: Final = "lora_te"  # kohya's prefix for models with one text encoder

# Suffixes of tensor names, and the part that the tensor is; "" is the suffix itself. peft may
# leave the name of its adapter in, which is `\.\w+` here.
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
        (r"(?:\.lora|\.lora_linear_layer|_lora)\.up\.bias", "up_bias"),
        (r"\.alpha", "alpha"),
        (r"\.dora_scale", "dora_scale"),
        (r"\.(?:diff|w_norm)", "diff"),
        (r"\.(?:diff_b|b_norm)", "diff_b"),
        (r"\.(hada_(?:w[12]_[ab]|t[12]))", ""),
        (r"\.(lokr_(?:w[12](?:_[ab])?|t2))", ""),
    )
)

# Kinds that are refused by name: they rotate or scale activations instead of adding to weights.
_UNSUPPORTED: Final = (
    (re.compile(r"\.(?:oft_\w+|oft_R\b.*)"), "OFT"),
    (re.compile(r"\.boft_\w+"), "BOFT"),
    (re.compile(r"\.(?:ia3_l\b|on_input$)"), "IA3"),
    (re.compile(r"\.(?:a1|a2|b1|b2|bm1|bm2)\.weight$"), "GLoRA"),
    (re.compile(r"\.(?:vera_lambda_\w+|lora_embedding_[AB])\b"), "VeRA or an embedding's LoRA"),
    (re.compile(r"\.(?:[pq]_layer\.weight|lambda_layer|base_lambda)$"), "T-LoRA"),
    (re.compile(r"\.lora_diag\b"), "KaSA"),
    (re.compile(r"\.lora_monteclora_sampler\b"), "MonteCLoRA"),
    (re.compile(r"\.lora_E\b"), "AdaLoRA"),
    (re.compile(r"\.(?:reshape_weight|set_weight)$"), "a weight's replacement"),
    (
        re.compile(r"^base_model\.model\.(?!.*(?:lora|hada|lokr)_).+\.(?:weight|bias)$"),
        "LoRA with whole layers beside it (peft's `modules_to_save` or `bias`)",
    ),
)

# Files that are no LoRAs, by names that they have; the first match counts.
_OTHER_FILES: Final = (
    (re.compile(r"control_model\.|controlnet_|zero_convs\.|input_hint_block\."), "a ControlNet"),
    (re.compile(r"^lllite_"), "a ControlNet-LLLite"),
    (re.compile(r"^(?:ip_adapter|image_proj)\b"), "an IP-Adapter"),
    (
        re.compile(r"^(?:model\.diffusion_model|conditioner\.embedders)\."),
        "a checkpoint",
    ),
    (re.compile(r"^(?:first_stage_model\.)?(?:decoder|encoder|(?:post_)?quant_conv)\b"), "a VAE"),
    (
        re.compile(r"^(?:unet\.)?(?:down_blocks|mid_block|up_blocks)\..+\.(?:weight|bias)$"),
        "a whole UNet",
    ),
    (re.compile(r"(?:^|\.)text_model\..+\.(?:weight|bias)$"), "a text encoder"),
    (
        re.compile(r"^(?:emb_params|clip_[lg]|text_encoders_[01]|string_to_param\b.*|<.{1,100}>)$"),
        "an embedding (textual inversion), which is for `embeddings`",
    ),
)

PEFT_PREFIX: Final = "base_model.model."  # of the names of modules
_PEFT: Final = re.compile(r"\.lora_(?:[AB]|magnitude_vector)\b|^base_model\.model\.")
# The tool that names tensors so; the first match counts. Only for receipts.
_FORMATS: Final = (
    (re.compile(r"^lycoris_"), "lycoris"),
    (re.compile(r"^(?:diffusion_model|model\.diffusion_model|text_encoders)\."), "comfyui"),
    (_PEFT, "peft"),
    (re.compile(r"(?:\.lora|\.lora_linear_layer|_lora)\.(?:up|down)\.weight$"), "diffusers"),
    (re.compile(r"^lora_(?:unet|te\d?|transformer)_\w+\."), "kohya"),
    (re.compile(r"^(?:lora_)?(?:unet|transformer|te\d|clip_[lg])\."), "onetrainer"),
)

# Parts of each kind of change, in the order in which messages name them.
FACTORS: Final = {
    "lora": frozenset({"down", "up", "mid"}),
    "loha": frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}),
    "lokr": frozenset(
        {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}
    ),
    "full": frozenset({"diff"}),
}
# Parts whose first dimension is the rank; the first that exists counts.
RANK_PARTS: Final = {
    "lora": ("down",),
    "loha": ("hada_w1_b",),
    "lokr": ("lokr_w1_b", "lokr_w2_b"),
    "full": (),
}
MAGNITUDES: Final = frozenset({"magnitude", "dora_scale"})  # DoRA; every kind may have one
# Names whose patterns are remembered, for files of the same tool: a LoRA of SDXL has 3,000.
_REMEMBERED: Final = 8192
_REMEMBERED_LENGTH: Final = 200  # characters; a file can have names of megabytes
_SHOWN: Final = 3  # names in a message
_SHOWN_START, _SHOWN_END = 20, 40  # characters of a name in a message; its end tells more


_Found = TypeVar("_Found")


def _remembered(function: Callable[[str], _Found]) -> Callable[[str], _Found]:
    """Remember what a function returns for the last names that are not long."""
    cached = lru_cache(_REMEMBERED)(function)

    @wraps(function)
    def call(name: str) -> _Found:
        return cached(name) if len(name) <= _REMEMBERED_LENGTH else function(name)

    return call


class Key(NamedTuple):
    """Parsed name of a tensor: the module as the file names it, and the part of the change."""

    module: str
    part: str


@_remembered
def parse_key(name: str) -> Key | None:
    """Return the module and the part of a tensor's name; None if no known tool writes it."""
    for pattern, part in _PARTS:
        if found := pattern.match(name):
            return Key(found[1], part or found[2])
    return None


@_remembered
def is_peft(name: str) -> bool:
    """Return whether a tensor is named as peft does, which keeps alpha in another place."""
    return _PEFT.search(name) is not None


@_remembered
def unsupported_kind(name: str) -> str | None:
    """Return the kind of change of a tensor if it is a known kind that is not supported."""
    return next((kind for pattern, kind in _UNSUPPORTED if pattern.search(name)), None)


def kinds_of(parts: AbstractSet[str]) -> list[str]:
    """Return the kinds that the parts of one module belong to; a valid module has at most one."""
    return [kind for kind, factors in FACTORS.items() if factors & parts]


def kind_of(parts: AbstractSet[str]) -> str:
    """Return the kind of change of one module, as receipts name it, from its parts."""
    kind = next(iter(kinds_of(parts)), "full")
    return f"dora-{kind}" if MAGNITUDES & parts else kind


def format_of(names: Iterable[str]) -> str:
    """Return the tool that names most of these tensors so; `unknown` if there is none."""
    tools = Counter(map(_tool, names))
    return tools.most_common(1)[0][0] if tools else "unknown"


@_remembered
def _tool(name: str) -> str:
    return next((tool for pattern, tool in _FORMATS if pattern.search(name)), "unknown")


def component_of(name: str) -> str:
    """Return the component of a tensor by the prefix of its name; `unknown` if it has no prefix."""
    flat = normalized(name)
    found, length = "unknown", 0
    for component, prefixes in (*PREFIXES.items(), ("text_encoder", (SINGLE_TEXT_ENCODER,))):
        for prefix in prefixes:
            if len(prefix) > length and flat.startswith(f"{prefix}_"):
                found, length = component, len(prefix)
    return found


def other_file(names: Iterable[str]) -> str:
    """Return what a file of these tensors is, which are not a LoRA's; empty if it is not known."""
    found = list(names)
    for pattern, kind in _OTHER_FILES:
        if any(map(pattern.search, found)):
            return kind
    return ""


def summary(names: Iterable[str]) -> str:
    """Return the number of tensors and some of their names, for a message."""
    found = sorted(names)
    if not found:
        return "no tensors"
    shown = ", ".join(map(shortened, found[:_SHOWN]))
    return f"{len(found)} tensors, such as {shown}"


def shortened(name: str) -> str:
    """Return a name for a message, without the middle if it is long."""
    if len(name) <= _SHOWN_START + _SHOWN_END:
        return name
    return f"{name[:_SHOWN_START]}...{name[-_SHOWN_END:]}"


def normalized(module: str) -> str:
    """Return a module's name for comparisons: dots as underscores, without peft's prefix."""
    return module.removeprefix(PEFT_PREFIX).replace(".", "_")
