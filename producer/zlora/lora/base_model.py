"""Describe a LoRA by the header of its file: base model, kinds, ranks, trigger words."""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Final, NamedTuple

import msgspec
from msgspec import Struct

from zlora.errors import LoraMismatch
from zlora.lora import key_names
from zlora.lora.recipes import recipe_of_address, recipe_of_header
from zlora.lora.safetensors_header import Header, TensorInfo

# A LoRA of all of SDXL's modules has up to 7,000 tensors, with names of up to 150 characters. Each
# name is searched for the words of many formats: 15 MB of names would take 20 s.
_MAX_TENSORS: Final = 20_000
_MAX_NAME: Final = 300  # characters
# Families of base models that workers may have.
SD1, SD2, SDXL, Z_IMAGE = "SD 1.x", "SD 2.x", "SDXL", "Z-Image"
FAMILIES: Final = (SDXL, SD1, SD2, Z_IMAGE)
LUMINA: Final = "Lumina 2"
LUMINA_OR_Z_IMAGE: Final = f"{LUMINA} or {Z_IMAGE}"  # whose layers have the same names
# Family by the width of cross-attention, which is the width of the text encoders' output.
WIDTHS: Final = {768: SD1, 1024: SD2, 2048: SDXL}
CROSS_ATTENTION: Final = re.compile(r"attn2[._]to_[kv]$")
# Parts whose second dimension is the input width of their layer.
_INPUT_WIDTH_PARTS: Final = frozenset({"down", "hada_w1_b", "diff"})
# Names of layers that no UNet has, dots as underscores and numbers as 0, and the families that have
# them; the first match counts. Many families share their names with others.
_SIMILAR: Final = "or a similar model"
_ROOT: Final = (
    r"^(?:base_model_model_)?(?:(?:model_)?diffusion_model_|(?:lora_)?transformer_|lora_unet_"
    r"|lycoris_|unet_)?"
)
_NEXT_DIT_BLOCK: Final = r"_?(?:layers|context_refiner|noise_refiner)_\d+_"
_LAYERS: Final = tuple(
    (re.compile(pattern), family)
    for pattern, family in (
        (r"joint_transformer_blocks_\d", "AuraFlow"),
        (r"joint_blocks_\d", "Stable Diffusion 3"),
        (r"transformer_blocks_\d+_(?:img|txt)_(?:mlp|mod)_", f"Qwen-Image {_SIMILAR}"),
        (r"token_refiner", f"HunyuanVideo {_SIMILAR}"),
        (r"(?:double|single)_blocks_\d|single_transformer_blocks_\d", f"Flux {_SIMILAR}"),
        (
            r"transformer_blocks_\d+_(?:attn_(?:add_[qkv]_proj|to_add_out)|ff_context)",
            f"Stable Diffusion 3, Flux, Qwen-Image {_SIMILAR}",
        ),
        (
            rf"{_ROOT}(?:transformer_)?blocks_\d+_(?:attn\d|ff)_",
            f"PixArt, Sana, LTX, Wan {_SIMILAR}",
        ),
        (r"adaln_single|caption_projection", f"PixArt, Sana, LTX {_SIMILAR}"),
        (rf"{_ROOT}blocks_\d+_(?:self_attn|cross_attn|ffn)_", f"Wan {_SIMILAR}"),
        (rf"{_ROOT}transformer_blocks_\d+_attn_", f"Stable Diffusion 3, Flux {_SIMILAR}"),
        (
            rf"{_ROOT}{_NEXT_DIT_BLOCK}(?:attn_|feed_forward_linear_)",
            f"Lumina {_SIMILAR}",
        ),
        (rf"{_ROOT}{_NEXT_DIT_BLOCK}(?:attention|feed_forward|adaLN)_", LUMINA_OR_Z_IMAGE),
        (rf"{_ROOT}cap_embedder_", LUMINA_OR_Z_IMAGE),
    )
)
# Input widths of layers of Z-Image and of Lumina 2, which have the same names in single files.
_NEXT_DIT_WIDTHS: Final = tuple(
    (re.compile(rf"{_ROOT}{layer}$"), widths)
    for layer, widths in (
        (
            rf"{_NEXT_DIT_BLOCK}(?:attention_(?:qkv|out)|feed_forward_w[13])",
            {3840: Z_IMAGE, 2304: LUMINA},
        ),
        (r"cap_embedder_\d+", {2560: Z_IMAGE, 2304: LUMINA}),
        (rf"{_NEXT_DIT_BLOCK}adaLN_modulation_\d+", {256: Z_IMAGE, 1024: LUMINA}),
    )
)
# Names of diffusers that only the transformer of Z-Image has.
_Z_IMAGE_LAYER: Final = re.compile(
    rf"{_ROOT}(?:{_NEXT_DIT_BLOCK}attention_to_(?:[qkv]$|out)|all_(?:x_embedder|final_layer)_)"
)
# UNet blocks that have attention in SD 1.x or 2.x, and not in SDXL.
_OLDER: Final = "SD 1.x or 2.x"  # one of two families that share these blocks
_OLDER_BLOCKS: Final = re.compile(
    r"(?:down_blocks_0|up_blocks_3)_attentions_\d|input_blocks_[12]_1_|output_blocks_(?:9|1[01])_1_"
)
_ATTENTION: Final = re.compile(r"attn1[._]to_[qkv]$|ff[._]net[._]0[._]proj$")
_OLDER_WIDTHS: Final = (  # of blocks that SDXL has with another width
    (re.compile(""), 320),
    (re.compile(r"up_blocks[._]1[._]|output_blocks[._][345][._]"), 1280),
)
# Words in `ss_base_model_version` (kohya) and `modelspec.architecture` (Stability's Model Spec).
_WORDS: Final = (
    (re.compile(r"sdxl|stable-diffusion-xl"), SDXL),
    (re.compile(r"^sd_?v?1|stable-diffusion-v1"), SD1),
    (re.compile(r"^sd_?v?2|stable-diffusion-v2"), SD2),
    (re.compile(r"^sd_?3|stable-diffusion-3"), "Stable Diffusion 3"),
    (re.compile(r"flux"), "Flux"),
    (re.compile(r"z[-_ ]?image"), Z_IMAGE),
    (re.compile(r"lumina"), LUMINA),
)
EMBEDDING: Final = "embedding"  # kind of a file that has no LoRA
_DIGITS: Final = re.compile(r"\d+")
_FIELDS: Final = ("modelspec.architecture", "ss_base_model_version")
_MAX_TRIGGERS: Final = 10  # trigger words
_TRIGGER_LENGTH: Final = 100  # characters of one trigger word


class LoraInfo(Struct, frozen=True, kw_only=True):
    """Description of a LoRA by its header.

    `source` has no query and no credentials. `size` is in bytes. `format` is the tool that names
    tensors so, `kinds` are the kinds of change, `ranks` are ascending. `base` is the family of
    models that the LoRA was made for, None if nothing says so. `modules` counts the changed
    modules by component, as far as their names show it. `recipe` is that of a few-step LoRA.
    """

    source: str
    size: int
    format: str
    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    base: str | None
    trigger_words: tuple[str, ...]
    modules: dict[str, int]
    recipe: str | None = None


class DetectedBase(NamedTuple):
    """A family of base models, and a clause for messages that says how it was detected."""

    family: str
    clause: str


def is_for(family: str, base: str | None) -> bool:
    """Return whether a file that was made for `family`, as it is detected, may be for `base`."""
    if family == _OLDER:
        return base in (SD1, SD2)
    if family == LUMINA_OR_Z_IMAGE:
        return base == Z_IMAGE
    return base == family


def require_lora(header: Header, name: str) -> None:
    """Raise `LoraMismatch` for a file that no worker reads, whatever its base model."""
    if (count := len(header.tensors)) > _MAX_TENSORS:
        raise LoraMismatch(f"{name}: {count} tensors, at most {_MAX_TENSORS} are read")
    if (longest := max(map(len, header.tensors), default=0)) > _MAX_NAME:
        raise LoraMismatch(
            f"{name}: a tensor has a name of {longest} characters, at most {_MAX_NAME} are read"
        )
    for tensor in header.tensors:
        if kind := key_names.unsupported_kind(tensor):
            raise LoraMismatch(f"{name}: a LoRA of the kind {kind}, which is not supported")
    if not any(map(key_names.parse_key, header.tensors)):
        raise LoraMismatch(f"{name}: {not_a_lora(header)}")


def not_a_lora(header: Header) -> str:
    """Return what a file is that is not a LoRA, for a message."""
    summary = key_names.summary(header.tensors)
    if kind := key_names.other_file(header.tensors):
        return f"not a LoRA but {kind}: {summary}"
    return f"not a LoRA that a worker reads: {summary}"


def describe(header: Header, *, source: str, size: int) -> LoraInfo:
    """Return the description of a file of `size` bytes."""
    modules: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in header.tensors.items():
        if key := key_names.parse_key(name):
            modules[key.module][key.part] = info
    ranks: set[int] = set()
    for parts in modules.values():
        rank_parts = [part for kind in key_names.RANK_PARTS.values() for part in kind]
        shapes = [parts[part].shape for part in rank_parts if part in parts and parts[part].shape]
        if shapes and shapes[0][0]:
            ranks.add(shapes[0][0])
    detected = detect_base_model(header)
    # Trainers of transformers write the prefixes of a UNet, too.
    denoiser = "transformer" if detect_by_layer_names(header) else "unet"
    components = Counter(
        denoiser if component in key_names.DENOISERS else component
        for component in map(key_names.component_of, modules)
    )
    recipe = recipe_of_header(header.metadata) or recipe_of_address(source)
    return LoraInfo(
        source=source,
        size=size,
        format=key_names.format_of(header.tensors),
        kinds=tuple(sorted({key_names.kind_of(parts.keys()) for parts in modules.values()})),
        ranks=tuple(sorted(ranks)),
        base=detected.family if detected else None,
        trigger_words=trigger_words(header.metadata),
        recipe=recipe.name if recipe else None,
        modules=dict(components),
    )


def detect_base_model(header: Header) -> DetectedBase | None:
    """Return the base model of a file by its layers, else its shapes, else its metadata."""
    if detected := detect_by_layer_names(header):
        return detected
    width = text_width(header.tensors)
    if width is not None and (family := WIDTHS.get(width)):
        return DetectedBase(family, f"made for {family}: cross-attention width {width}")
    # Other families with a second text encoder are detected by their layers.
    if any(key_names.component_of(name) == "text_encoder_2" for name in header.tensors):
        return DetectedBase(SDXL, f"made for {SDXL}: it has a second text encoder")
    return detect_by_metadata(header) or detect_by_blocks(header.tensors)


def detect_by_layer_names(header: Header) -> DetectedBase | None:
    """Return the families that have layers of these names; None if a UNet may have them.

    The header decides between families that share them.
    """
    if detected := _detect_next_dit(header.tensors):
        return detected
    layers = {_DIGITS.sub("0", name.replace(".", "_")) for name in header.tensors}
    for pattern, family in _LAYERS:
        if any(map(pattern.search, layers)):
            named = detect_by_metadata(header)
            if named and named.family in family:
                return named
            return DetectedBase(family, f"made for {family}, by the names of its layers")
    return None


def _detect_next_dit(tensors: Mapping[str, TensorInfo]) -> DetectedBase | None:
    """Return Z-Image or Lumina 2, which share their layers, by a name or a width that shows it."""
    for name, info in tensors.items():
        key = key_names.parse_key(name)
        if key is None:
            continue
        module = key_names.normalized(key.module)
        if _Z_IMAGE_LAYER.search(module):
            return DetectedBase(Z_IMAGE, f"made for {Z_IMAGE}, by the names of its layers")
        for layer, widths in _NEXT_DIT_WIDTHS:
            family = widths.get(_input_width(key, info, re.compile("")) or 0)
            if family and layer.search(module):
                width = info.shape[1]
                return DetectedBase(family, f"made for {family}: width {width} of its layers")
    return None


def detect_by_blocks(tensors: Mapping[str, TensorInfo]) -> DetectedBase | None:
    """Return the family whose UNet has attention in these blocks, or of this width."""
    for name, info in tensors.items():
        key = key_names.parse_key(name)
        if key is None:
            continue
        if _OLDER_BLOCKS.search(key.module.replace(".", "_")):
            return DetectedBase(_OLDER, f"made for {_OLDER}, by its blocks")
        width = _input_width(key, info, _ATTENTION)
        if any(width == old and blocks.search(key.module) for blocks, old in _OLDER_WIDTHS):
            return DetectedBase(_OLDER, f"made for {_OLDER}, by the width {width} of a layer")
    return None


def detect_by_metadata(header: Header) -> DetectedBase | None:
    """Return the family that the file's trainer wrote down; None if there is no known word."""
    for field in _FIELDS:
        text = header.metadata.get(field, "")
        for words, family in _WORDS:
            if words.search(text.lower()):
                clause = f"made for {family}, by its header ({field}: {text[:60]})"
                return DetectedBase(family, clause)
    return None


def text_width(tensors: Mapping[str, TensorInfo]) -> int | None:
    """Return the width of the text that the file's cross-attention reads; None if it has none."""
    for name, info in tensors.items():
        key = key_names.parse_key(name)
        if key and (width := _input_width(key, info, CROSS_ATTENTION)):
            return width
    return None


def _input_width(key: key_names.Key, info: TensorInfo, layers: re.Pattern[str]) -> int | None:
    """Return the input width of a layer if the tensor shows it, and `layers` matches its name."""
    shows_width = key.part in _INPUT_WIDTH_PARTS and len(info.shape) >= 2  # noqa: PLR2004 - sides of a matrix
    return info.shape[1] if shows_width and layers.search(key.module) else None


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Return up to ten words for prompts.

    These are `modelspec.trigger_phrase`, or else the most frequent tags of kohya's
    `ss_tag_frequency`, which is JSON: folder -> tag -> count; none if it is damaged.
    """
    phrase = metadata.get("modelspec.trigger_phrase", "")
    if phrase.strip():
        words = [_printable(word) for word in phrase.split(",")]
    else:
        tags = metadata.get("ss_tag_frequency", "{}")
        try:
            folders = msgspec.json.decode(tags, type=dict[str, dict[str, int]])
        except (msgspec.DecodeError, ValueError):
            return ()
        counts: Counter[str] = Counter()
        for folder in folders.values():
            counts.update({_printable(tag): count for tag, count in folder.items()})
        words = [tag for tag, _ in counts.most_common(_MAX_TRIGGERS + 1)]  # one may be empty
    return tuple(dict.fromkeys(filter(None, words)))[:_MAX_TRIGGERS]


def _printable(text: str) -> str:
    printable = "".join(character for character in text if character.isprintable())
    return printable[:_TRIGGER_LENGTH].strip()
