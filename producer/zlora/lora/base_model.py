"""What a LoRA file says of itself, by its header alone: its kinds and ranks, its base, its trigger words."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from zlora.errors import LoraMismatch
from zlora.lora import key_names
from zlora.lora.safetensors_header import Header, TensorInfo

SDXL: Final = "SDXL"
WIDTHS: Final = {
    768: "SD 1.x",
    1024: "SD 2.x",
    2048: SDXL,
}  # of cross-attention: the text encoders' output
CROSS_ATTENTION: Final = re.compile(r"attn2[._]to_[kv]$")
_BY_WIDTH: Final = frozenset(
    {"down", "hada_w1_b", "diff"}
)  # parts whose second side is what their layer reads
# Names of layers that only one family has, dots as underscores.
_LAYERS: Final = (
    (re.compile(r"double_blocks_\d|single_blocks_\d|single_transformer_blocks_\d"), "Flux"),
    (
        re.compile(r"joint_blocks_\d|transformer_blocks_\d+_attn_add_[qkv]_proj"),
        "Stable Diffusion 3",
    ),
    (re.compile(r"(?:^|_)blocks_\d+_(?:self|cross)_attn_"), "Wan"),
    (re.compile(r"layers_\d+_attention_(?:to_)?[qkv]"), "Lumina or Z-Image"),
    (re.compile(r"adaln_single|caption_projection"), "PixArt"),
)
# Words in `ss_base_model_version` (kohya) and `modelspec.architecture` (Stability's Model Spec).
_WORDS: Final = (
    (re.compile(r"sdxl|stable-diffusion-xl"), SDXL),
    (re.compile(r"^sd_?v?1|stable-diffusion-v1"), "SD 1.x"),
    (re.compile(r"^sd_?v?2|stable-diffusion-v2"), "SD 2.x"),
    (re.compile(r"^sd_?3|stable-diffusion-3"), "Stable Diffusion 3"),
    (re.compile(r"flux"), "Flux"),
)
_FIELDS: Final = ("modelspec.architecture", "ss_base_model_version")
_MAX_TRIGGERS: Final = 10  # trigger words
_TRIGGER_LENGTH: Final = 100  # characters; a stranger chose them


class LoraInfo(Struct, frozen=True, kw_only=True):
    """What the header of a LoRA tells. `size` is in bytes.

    `source` has no query and no credentials. `format` is the tool that spells tensors so, `kinds` are the kinds of
    change, `ranks` those found, ascending. `base` is the family of models that it was made for, None where nothing
    tells. `modules` counts those changed by component, as far as their names tell it.
    """

    source: str
    size: int
    format: str
    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    base: str | None
    trigger_words: tuple[str, ...]
    modules: dict[str, int]


class Origin(NamedTuple):
    """A family of models, and the clause that says by what it is told."""

    family: str
    clause: str


def require_lora(header: Header, name: str) -> None:
    """Raises `LoraMismatch` for what no worker reads, whatever its base."""
    if kind := next(filter(None, map(key_names.unsupported_kind, header.tensors)), None):
        raise LoraMismatch(f"{name}: a LoRA of the kind {kind}, which is not supported")
    if not any(map(key_names.split, header.tensors)):
        raise LoraMismatch(f"{name}: no LoRA that a worker reads: {key_names.some(header.tensors)}")


def describe(header: Header, *, source: str, size: int) -> LoraInfo:
    """All that the header of a file of `size` bytes tells."""
    tensors = header.tensors
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        if key := key_names.split(name):
            modules[key.module][key.part] = info
    origin = told(header)
    return LoraInfo(
        source=source,
        size=size,
        format=key_names.format_of(tensors),
        kinds=tuple(sorted({key_names.kind_of(parts.keys()) for parts in modules.values()})),
        ranks=tuple(sorted({rank for parts in modules.values() if (rank := _rank(parts))})),
        base=origin.family if origin else None,
        trigger_words=trigger_words(header.metadata),
        modules=dict(Counter(map(key_names.component_of, modules))),
    )


def _rank(parts: Mapping[str, TensorInfo]) -> int:
    """The inner size of one module's change; 0 for what has none."""
    shapes = [
        parts[part].shape
        for ranked in key_names.RANKED.values()
        for part in ranked
        if part in parts
    ]
    return next((shape[0] for shape in shapes if shape), 0)


def told(header: Header) -> Origin | None:
    """The base that a file was made for, by its layers, its shapes or its metadata; None where nothing tells."""
    by_layers = told_by_layers(header.tensors)
    return (
        by_layers
        or _told_by_width(header.tensors)
        or _told_by_encoder(header.tensors)
        or told_by_metadata(header)
    )


def told_by_layers(tensors: Iterable[str]) -> Origin | None:
    """The family that alone has layers of these names."""
    for name in tensors:
        spelt = name.replace(".", "_")
        if family := next((family for layer, family in _LAYERS if layer.search(spelt)), None):
            return Origin(family, f"made for {family}, by the names of its layers")
    return None


def told_by_metadata(header: Header) -> Origin | None:
    """The family that the file's trainer wrote down."""
    for field in _FIELDS:
        text = header.metadata.get(field, "")
        if family := next((family for words, family in _WORDS if words.search(text.lower())), None):
            return Origin(family, f"made for {family}, by its header ({field}: {text[:60]})")
    return None


def text_width(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Of the text that the file's cross-attention reads."""
    for name, info in tensors.items():
        key = key_names.split(name)
        if (
            key
            and key.part in _BY_WIDTH
            and len(info.shape) > 1
            and CROSS_ATTENTION.search(key.module)
        ):
            return info.shape[1]
    return None


def _told_by_width(tensors: Mapping[str, TensorInfo]) -> Origin | None:
    width = text_width(tensors)
    family = WIDTHS.get(width or 0)
    return Origin(family, f"made for {family}: cross-attention width {width}") if family else None


def _told_by_encoder(tensors: Iterable[str]) -> Origin | None:
    """A second text encoder beside a UNet is SDXL's; other families that have one are told by their layers."""
    second = any(key_names.component_of(name) == "text_encoder_2" for name in tensors)
    return Origin(SDXL, f"made for {SDXL}: it has a second text encoder") if second else None


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """What to write into a prompt: `modelspec.trigger_phrase`, else the tags that kohya counted most; at most ten."""
    phrase = metadata.get("modelspec.trigger_phrase", "")
    words = (
        [_printable(word) for word in phrase.split(",")] if phrase.strip() else _frequent(metadata)
    )
    return tuple(dict.fromkeys(filter(None, words)))[:_MAX_TRIGGERS]


def _frequent(metadata: Mapping[str, str]) -> list[str]:
    """The tags of `ss_tag_frequency`, JSON of counts by tag by folder; none where it is damaged."""
    try:
        folders = msgspec.json.decode(
            metadata.get("ss_tag_frequency", "{}"), type=dict[str, dict[str, int]]
        )
    except (msgspec.DecodeError, ValueError):
        return []
    counts: Counter[str] = Counter()
    for tags in folders.values():
        counts.update({_printable(tag): count for tag, count in tags.items()})
    return [tag for tag, _ in counts.most_common(_MAX_TRIGGERS + 1)]  # one of them may be empty


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())[
        :_TRIGGER_LENGTH
    ].strip()
