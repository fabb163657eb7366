"""Find the embeddings (textual inversions) of a safetensors file by its header, without torch.

A file for SDXL has a tensor of shape [vectors, width] for each of the two text encoders.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Final, NamedTuple
from urllib.parse import unquote

from zlora.errors import EmbeddingMismatch
from zlora.lora import key_names
from zlora.lora.safetensors_header import Header
from zlora.schema import is_token

TEXT_ENCODERS: Final = ("text_encoder", "text_encoder_2")
MAX_VECTORS: Final = 75  # of one embedding; a window of CLIP has room for as many
_MAX_EMBEDDINGS: Final = 16  # in one file
_SEARCHED: Final = 100  # names of a file of another kind, which may have megabytes of names
_FLOATS: Final = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
# Tensor names of A1111, ComfyUI and kohya, and of diffusers' training scripts.
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
_ONE_ENCODER: Final = re.compile(r"emb_params|string_to_param\b.*|<.{1,100}>", re.DOTALL)
_FAMILIES: Final = {768: "SD 1.x", 1024: "SD 2.x"}
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


def read_embeddings(
    header: Header,
    source: str,
    *,
    token: str | None = None,
    widths: Mapping[str, int] | None = None,
    beside_lora: bool = False,
) -> EmbeddingFile:
    """Return the embeddings of a file, named by `token` if that is given.

    `source` is the file's address without secrets. `widths` are those of the base model's text
    encoders, if they are known. Only in a LoRA's file (`beside_lora`) other tensors are left out.
    Raises `EmbeddingMismatch` if anything in the file cannot be used.
    """
    found, others = _by_own_name(header, source, beside_lora=beside_lora)
    _require_two_encoders(header, others, source)
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
        vectors = _vector_count(header, tensors, source, widths)
        if token is None and not own_name and "text_encoders_0" in tensors.values():
            words = tuple(f"<s{index}>" for index in range(vectors))
        else:
            words = _words(token or own_name or _file_name(source), vectors, source)
        embeddings.append(HeaderEmbedding(words, vectors, tensors))
    if "" not in found:
        kind = "bundle"
    else:
        kind = "pivotal" if "text_encoders_0" in header.tensors else "sdxl"
    return EmbeddingFile(kind, tuple(embeddings))


def _by_own_name(
    header: Header, source: str, *, beside_lora: bool
) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Return tensor names by the embedding's own name and text encoder, and those not known."""
    found: dict[str, dict[str, str]] = defaultdict(dict)  # "" is a file's only embedding
    others = []
    for name in header.tensors:
        bundled = _BUNDLED.fullmatch(name)
        part = bundled[2] if bundled else name
        if part in _PARTS:
            tensors = found[bundled[1] if bundled else ""]
            if _PARTS[part] in tensors:
                raise EmbeddingMismatch(f"{source}: two tensors for {_PARTS[part]}")
            tensors[_PARTS[part]] = name
        elif bundled or not beside_lora:
            others.append(name)
    return found, others


def _require_two_encoders(header: Header, others: Iterable[str], source: str) -> None:
    """Raise `EmbeddingMismatch` for a file of a model with one text encoder."""
    for name in others:
        bundled, shape = _BUNDLED.fullmatch(name), header.tensors[name].shape
        is_alone = len(header.tensors) == 1 and 1 <= len(shape) <= 2  # noqa: PLR2004 - [n, width]
        if is_alone or _ONE_ENCODER.fullmatch(bundled[2] if bundled else name):
            width = shape[-1] if shape else 0
            family = f", as of {_FAMILIES[width]}" if width in _FAMILIES else ""
            raise EmbeddingMismatch(
                f"{source}: an embedding for one encoder only: {key_names.shortened(name)} is "
                f"{width} wide{family}; SDXL has two, `clip_l` and `clip_g`"
            )


def _other_file(header: Header, others: Iterable[str]) -> str:
    """Return why a file with these tensors is not used."""
    if any(map(key_names.parse_key, islice(header.tensors, _SEARCHED))):
        return "a LoRA: name it in `loras`, which use the embeddings of their files, too"
    if kind := key_names.other_file(others):
        return f"not an embedding but {kind}: {key_names.summary(others)}"
    return f"not an embedding that a worker reads: {key_names.summary(others)}"


def _vector_count(
    header: Header, tensors: Mapping[str, str], source: str, widths: Mapping[str, int] | None
) -> int:
    """Return the number of vectors of an embedding, after a check of its tensors."""
    names = ", ".join(map(key_names.shortened, tensors.values()))
    if missing := [encoder for encoder in TEXT_ENCODERS if encoder not in tensors]:
        raise EmbeddingMismatch(
            f"{source}: an embedding for one encoder only: it has {names}, "
            f"and nothing for {missing[0]}"
        )
    counts = set()
    for encoder, name in tensors.items():
        info = header.tensors[name]
        count, width = (1, *info.shape)[-2:] if 1 <= len(info.shape) <= 2 else (0, 0)  # noqa: PLR2004
        expected = width if widths is None else widths[encoder]
        if not width or width != expected:
            shape = " x ".join(map(str, info.shape)) or "a number"
            raise EmbeddingMismatch(
                f"{source}: wrong width: {key_names.shortened(name)} is {shape}, the base "
                f"model's {encoder} reads vectors of {expected or 'SDXL'}"
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
