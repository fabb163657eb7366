"""Find the embeddings (textual inversions) of a safetensors file by its header, without torch.

A file has a tensor of shape [vectors, width] for each text encoder of its base model: SDXL has two,
SD 1.x and 2.x have one.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Final, NamedTuple
from urllib.parse import unquote

from zlora.errors import EmbeddingMismatch
from zlora.lora import key_names
from zlora.lora.base_model import SD1, SD2, SDXL
from zlora.lora.safetensors_header import Header, TensorInfo
from zlora.schema import is_token

_TEXT_ENCODERS: Final = ("text_encoder", "text_encoder_2")  # SD 1.x and 2.x have the first one
MAX_VECTORS: Final = 75  # of one embedding; a window of CLIP has room for as many
_MAX_EMBEDDINGS: Final = 16  # in one file
_SEARCHED: Final = 100  # names of a file of another kind, which may have megabytes of names
_FLOATS: Final = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Names of tensors for two text encoders, by A1111, ComfyUI and kohya, and by diffusers' scripts.
_PARTS: Final = {
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
# Embeddings inside a LoRA's file, by kohya's trainer and OneTrainer.
_BUNDLED: Final = re.compile(
    r"bundle_emb\.(.+?)\.((?:clip_[lg]|emb_params)(?:_out)?|string_to_param\..+)", re.DOTALL
)
# Names of a tensor for the only text encoder, by A1111 and kohya. diffusers names it by its word.
_ONE_ENCODER: Final = re.compile(r"emb_params|string_to_param\b.*", re.DOTALL)
_IN_BRACKETS: Final = re.compile(r"<.{1,100}>", re.DOTALL)
_FAMILIES: Final = {768: SD1, 1024: SD2}  # by the width of the only text encoder
# The last part of an address, which may have a revision of Hugging Face behind it.
_FILE_NAME: Final = re.compile(r"([^/]+)\.safetensors(?:@[^/]*)?", re.IGNORECASE)
# Several words such as `<s0><s1>`: one for each vector.
_WORDS: Final = re.compile(r"<[^<>]+>")


class HeaderEmbedding(NamedTuple):
    """An embedding in a header: its words, its vectors, and its tensors by text encoder.

    With one word all vectors are in the place of that word, with more each has a word of its own.
    """

    words: tuple[str, ...]
    vectors: int
    tensors: dict[str, str]


class EmbeddingFile(NamedTuple):
    """Embeddings that the header of a file has; `format` is that of receipts."""

    format: str
    embeddings: tuple[HeaderEmbedding, ...]


def is_embedding(name: str) -> bool:
    """Return whether a tensor of a LoRA's file belongs to an embedding beside the LoRA."""
    if not name.startswith("bundle_emb."):
        return name in _PARTS
    return _BUNDLED.fullmatch(name) is not None


def family_of(header: Header) -> str | None:
    """Return the family of base models that embeddings are for; None if no family has their width.

    A file whose tensors are not known counts as one for SDXL.
    """
    for name, info in header.tensors.items():
        if _for_one_encoder(header, name):
            return _FAMILIES.get(info.shape[-1]) if info.shape else None
    return SDXL


def read_embeddings(
    header: Header,
    source: str,
    *,
    base: str = SDXL,
    token: str | None = None,
    widths: Mapping[str, int] | None = None,
    beside_lora: bool = False,
) -> EmbeddingFile:
    """Return the embeddings of a file, named by `token` if that is given.

    `source` is the file's address without secrets. `base` is the family of the base model, and
    `widths` are those of its text encoders, if they are known. Only in a LoRA's file
    (`beside_lora`) other tensors are left out. Raises `EmbeddingMismatch` if anything in the file
    cannot be used.
    """
    if base not in (SD1, SD2, SDXL):
        raise EmbeddingMismatch(
            f"{source}: an embedding, which is for text encoders of CLIP; the base model is of "
            f"{base}, which reads none"
        )
    found, others = _by_own_name(header, source, base=base, beside_lora=beside_lora)
    if base == SDXL:
        _require_two_encoders(header, others, source)
    else:
        _require_one_encoder(others, source, base)
    if others and beside_lora:
        raise EmbeddingMismatch(
            f"{source}: an embedding of a kind that is not used: {key_names.summary(others)}"
        )
    if others or not found:
        raise EmbeddingMismatch(f"{source}: {_other_file(header, others)}")
    if len(found) > _MAX_EMBEDDINGS:
        raise EmbeddingMismatch(f"{source}: {len(found)} embeddings, at most {_MAX_EMBEDDINGS}")
    if token is not None and len(found) > 1:
        raise EmbeddingMismatch(
            f"{source}: {len(found)} embeddings, and one `token`: without it they have the words "
            "of the file"
        )
    embeddings = []
    for own_name, tensors in found.items():
        vectors = _vector_count(header, tensors, source, base, widths)
        if token is None and not own_name and "text_encoders_0" in tensors.values():
            words = tuple(f"<s{index}>" for index in range(vectors))
        else:
            words = _words(token or own_name or _file_name(source), vectors, source)
        embeddings.append(HeaderEmbedding(words, vectors, tensors))
    return EmbeddingFile(_format(embeddings[0]), tuple(embeddings))


def _by_own_name(
    header: Header, source: str, *, base: str, beside_lora: bool
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return tensor names by the embedding's own name and text encoder, and those not known."""
    found: dict[str, dict[str, str]] = defaultdict(dict)  # "" is a file's only embedding
    others = []
    for name in header.tensors:
        bundled = _BUNDLED.fullmatch(name)
        own_name, part = (bundled[1], bundled[2]) if bundled else ("", name)
        encoder = _PARTS.get(part) if base == SDXL else None
        if base != SDXL and _for_one_encoder(header, name):
            encoder = _TEXT_ENCODERS[0]
            if not bundled and not _ONE_ENCODER.fullmatch(name):
                own_name = name
        if encoder is not None:
            tensors = found[own_name]
            if encoder in tensors:
                raise EmbeddingMismatch(f"{source}: two tensors for {encoder}")
            tensors[encoder] = name
        elif bundled or not beside_lora:
            others.append(name)
    return found, others


def _for_one_encoder(header: Header, name: str) -> bool:
    """Return whether a tensor has the vectors of an embedding for the only text encoder.

    The name of a file's only tensor may be any word; weights of models have names with dots.
    """
    bundled = _BUNDLED.fullmatch(name)
    if bundled or _ONE_ENCODER.fullmatch(name):
        return _ONE_ENCODER.fullmatch(bundled[2] if bundled else name) is not None
    if _IN_BRACKETS.fullmatch(name):
        return True
    is_alone = len(header.tensors) == 1 and name not in _PARTS and "." not in name
    return is_alone and _is_table(header.tensors[name])


def _is_table(info: TensorInfo) -> bool:
    """Return whether a tensor has the form of one vector, or of several of the same width."""
    return 1 <= len(info.shape) <= 2  # noqa: PLR2004 - [n, width]


def _format(first: HeaderEmbedding) -> str:
    """Return the naming scheme of a file's tensors, as receipts have it."""
    name = next(iter(first.tensors.values()))
    if _BUNDLED.fullmatch(name):
        return "bundle"
    if name in _PARTS:
        return "pivotal" if name.startswith("text_encoders_") else "sdxl"
    return "sd" if _ONE_ENCODER.fullmatch(name) else "diffusers"


def _require_two_encoders(header: Header, others: Iterable[str], source: str) -> None:
    """Raise `EmbeddingMismatch` for a file of a model with one text encoder."""
    for name in others:
        if _for_one_encoder(header, name):
            shape = header.tensors[name].shape
            width = shape[-1] if shape else 0
            family = f", as of {_FAMILIES[width]}" if width in _FAMILIES else ""
            raise EmbeddingMismatch(
                f"{source}: an embedding for one encoder only: {key_names.shortened(name)} is "
                f"{width} wide{family}; SDXL has two, `clip_l` and `clip_g`"
            )


def _require_one_encoder(others: Iterable[str], source: str, base: str) -> None:
    """Raise `EmbeddingMismatch` for a file of a model with two text encoders."""
    for name in others:
        bundled = _BUNDLED.fullmatch(name)
        if (bundled[2] if bundled else name) in _PARTS:
            raise EmbeddingMismatch(
                f"{source}: an embedding for the two encoders of SDXL: it has "
                f"{key_names.shortened(name)}; the base model is of {base}, which has one encoder"
            )


def _other_file(header: Header, others: Iterable[str]) -> str:
    """Return why a file with these tensors is not used."""
    if any(map(key_names.parse_key, islice(header.tensors, _SEARCHED))):
        return "a LoRA: name it in `loras`, which use the embeddings of their files, too"
    if kind := key_names.other_file(others):
        return f"not an embedding but {kind}: {key_names.summary(others)}"
    return f"not an embedding that a worker reads: {key_names.summary(others)}"


def _vector_count(
    header: Header,
    tensors: Mapping[str, str],
    source: str,
    base: str,
    widths: Mapping[str, int] | None,
) -> int:
    """Return the number of vectors of an embedding, after a check of its tensors."""
    names = ", ".join(map(key_names.shortened, tensors.values()))
    encoders = _TEXT_ENCODERS if base == SDXL else _TEXT_ENCODERS[:1]
    if missing := [encoder for encoder in encoders if encoder not in tensors]:
        raise EmbeddingMismatch(
            f"{source}: an embedding for one encoder only: it has {names}, "
            f"and nothing for {missing[0]}"
        )
    counts = set()
    for encoder, name in tensors.items():
        info = header.tensors[name]
        count, width = (1, *info.shape)[-2:] if _is_table(info) else (0, 0)
        expected = width if widths is None else widths[encoder]
        if not width or width != expected:
            shape = " x ".join(map(str, info.shape)) or "a number"
            raise EmbeddingMismatch(
                f"{source}: wrong width: {key_names.shortened(name)} is {shape}, the base "
                f"model's {encoder} reads vectors of {expected or base}"
            )
        if base != SDXL and _FAMILIES.get(width, base) != base:
            raise EmbeddingMismatch(
                f"{source}: {key_names.shortened(name)} is {width} wide, as of "
                f"{_FAMILIES[width]}; the base model is of {base}"
            )
        if info.dtype not in _FLOATS:
            raise EmbeddingMismatch(
                f"{source}: {key_names.shortened(name)} is of the type {info.dtype}"
            )
        counts.add(count)
    if len(counts) > 1 or not 1 <= max(counts) <= MAX_VECTORS:
        raise EmbeddingMismatch(
            f"{source}: {names} have {' and '.join(map(str, sorted(counts)))} vectors; "
            f"expected the same number, from 1 to {MAX_VECTORS}"
        )
    return counts.pop()


def _words(name: str, vectors: int, source: str) -> tuple[str, ...]:
    """Return one word for all vectors, or one for each, such as `<s0><s1>`."""
    words = tuple(_WORDS.findall(name))
    if len(words) < 2 or "".join(words) != name:  # noqa: PLR2004
        words = (name,)
    if not all(map(is_token, words)):
        raise EmbeddingMismatch(
            f"{source}: its word is not known: `token` must be one printable word without spaces"
        )
    if 1 < len(words) != vectors:
        raise EmbeddingMismatch(
            f"{source}: {len(words)} words and {vectors} vectors: name one word, or one for each"
        )
    return words


def _file_name(source: str) -> str:
    """Return the name of a file without its extension; empty if the address has none."""
    found = _FILE_NAME.fullmatch(source.rpartition("/")[2])
    return unquote(found[1]) if found else ""
