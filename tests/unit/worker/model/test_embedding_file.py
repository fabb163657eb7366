"""Embeddings in files: what each spelling means, and what is refused."""

from pathlib import Path

import pytest
import torch
from support.embedding_files import bundle, pivotal, sdxl, vectors, write_embedding
from support.fakes import Tensors, kohya_lora, load_pipeline
from zlora.errors import EmbeddingMismatch, NotSafetensors
from zlora_worker.model.embedding_file import EmbeddingReader, FileEmbeddings

SOURCE = "https://files.invalid/folder/zebrafish.safetensors"


@pytest.fixture(scope="module")
def reader(model_home: Path) -> EmbeddingReader:
    return load_pipeline(model_home).embedding_reader


def read(
    reader: EmbeddingReader,
    folder: Path,
    tensors: Tensors,
    *,
    source: str = SOURCE,
    token: str | None = None,
    beside_lora: bool = False,
) -> FileEmbeddings:
    path = write_embedding(folder, tensors)
    return reader.read(path, source=source, token=token, beside_lora=beside_lora)


def counts(found: FileEmbeddings) -> dict[str, int]:
    return {one.token: len(one.vectors["text_encoder"]) for one in found.embeddings}


@pytest.mark.parametrize(
    ("tensors", "token", "expected"),
    [
        (sdxl(), None, {"zebrafish": 2}),
        (sdxl(), "<zebra>", {"<zebra>": 2}),
        (sdxl(), "<zebra><fish>", {"<zebra>": 1, "<fish>": 1}),
        (pivotal(), None, {"<s0>": 1, "<s1>": 1}),
        (pivotal(), "TOKEN", {"TOKEN": 2}),
        (pivotal(3), "<x><y><z>", {"<x>": 1, "<y>": 1, "<z>": 1}),
        (bundle("zebra.fish"), None, {"zebra.fish": 2}),
        (bundle("zebra"), "fish42", {"fish42": 2}),
    ],
)
def test_a_file_has_the_words_that_its_tool_gives_it(
    reader: EmbeddingReader,
    tmp_path: Path,
    tensors: Tensors,
    token: str | None,
    expected: dict[str, int],
) -> None:
    assert counts(read(reader, tmp_path, tensors, token=token)) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_vectors_are_those_of_the_file(
    reader: EmbeddingReader, tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in sdxl(3).items()}

    (found,) = read(reader, tmp_path, tensors).embeddings

    for encoder, expected in zip(("text_encoder", "text_encoder_2"), tensors.values(), strict=True):
        assert torch.equal(found.vectors[encoder], expected.float())


def test_each_word_of_a_pivotal_file_has_its_own_vector(
    reader: EmbeddingReader, tmp_path: Path
) -> None:
    first, second = read(reader, tmp_path, pivotal()).embeddings

    for encoder, rows in vectors(2).items():
        assert torch.equal(torch.cat([first.vectors[encoder], second.vectors[encoder]]), rows)


def test_a_vector_may_have_no_dimension_for_its_number(
    reader: EmbeddingReader, tmp_path: Path
) -> None:
    tensors = {name: tensor[0] for name, tensor in sdxl(1).items()}

    assert counts(read(reader, tmp_path, tensors)) == {"zebrafish": 1}


def test_embeddings_beside_a_lora_are_found_in_its_file(
    reader: EmbeddingReader, tmp_path: Path
) -> None:
    tensors = kohya_lora() | bundle("zebra", "fish42")

    found = read(reader, tmp_path, tensors, beside_lora=True)

    assert (found.format, counts(found)) == ("bundle", {"zebra": 2, "fish42": 2})


def nan(tensors: Tensors) -> Tensors:
    tensors["clip_g"][1, 5] = torch.nan
    return tensors


@pytest.mark.parametrize(
    ("tensors", "token", "reason"),
    [
        ({"emb_params": torch.ones(4, 768)}, None, "one encoder only: emb_params is 768 wide, as"),
        ({"string_to_param.*": torch.ones(4, 768)}, None, "one encoder only.*SD 1.x"),
        ({"<zebra>": torch.ones(1024)}, None, "one encoder only.*SD 2.x"),
        ({"clip_l": torch.ones(1, 32)}, None, "one encoder only.*nothing for text_encoder_2"),
        ({"clip_g": torch.ones(1, 48)}, None, "one encoder only.*nothing for text_encoder$"),
        (sdxl() | {"clip_g": torch.ones(2, 1280)}, None, "wrong width: clip_g is 2 x 1280"),
        (sdxl() | {"clip_l": torch.ones(2, 2, 32)}, None, "wrong width: clip_l is 2 x 2 x 32"),
        (sdxl() | {"clip_l": torch.ones(3, 32)}, None, "have 2 and 3 vectors"),
        (sdxl(76), None, "have 76 vectors"),
        (sdxl(0), None, "have 0 vectors"),
        (sdxl() | {"clip_l": torch.ones(2, 32, dtype=torch.int8)}, None, "of the type I8"),
        (nan(sdxl()), None, "NaN or Inf in clip_g"),
        (sdxl() | {"t5xxl": torch.ones(2, 4096)}, None, "not an embedding that a worker reads"),
        (sdxl() | {"text_encoders_0": torch.ones(2, 32)}, None, "two tensors for text_encoder"),
        (kohya_lora(), None, "a LoRA: name it in `loras`"),
        (kohya_lora() | bundle("zebra"), None, "a LoRA: name it in `loras`"),
        (bundle("zebra", "fish42"), "one", "2 embeddings, and one `token`"),
        (pivotal(3), "<x><y>", "2 words and 3 vectors"),
        (sdxl(), "city", "city is a word that the base model knows"),
        (sdxl(), "<|endoftext|>", "is a word that the base model knows"),
        (bundle("two words"), None, "one printable word without spaces"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused(
    reader: EmbeddingReader, tmp_path: Path, tensors: Tensors, token: str | None, reason: str
) -> None:
    with pytest.raises(EmbeddingMismatch, match=reason) as caught:
        read(reader, tmp_path, tensors, token=token)

    assert str(caught.value).startswith(SOURCE)


@pytest.mark.parametrize(
    ("name", "reason"), [("zebra.clip_l_out", "not used"), ("zebra.emb_params", "one encoder")]
)
def test_an_embedding_beside_a_lora_that_cannot_be_used_is_refused(
    reader: EmbeddingReader, tmp_path: Path, name: str, reason: str
) -> None:
    tensors = kohya_lora() | bundle("fish42") | {f"bundle_emb.{name}": torch.ones(2, 32)}

    with pytest.raises(EmbeddingMismatch, match=reason):
        read(reader, tmp_path, tensors, beside_lora=True)


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("hf://owner/repo/folder/zebra.safetensors@main", "zebra"),
        ("file:///folder/zebra%2Dfish.safetensors", "zebra-fish"),
    ],
)
def test_the_word_is_the_name_of_the_file(
    reader: EmbeddingReader, tmp_path: Path, source: str, word: str
) -> None:
    assert counts(read(reader, tmp_path, sdxl(), source=source)) == {word: 2}


@pytest.mark.parametrize(
    "source", ["civitai://12", "hf://owner/repo", "https://files.invalid/two%20words.safetensors"]
)
def test_an_address_without_a_word_needs_a_token(
    reader: EmbeddingReader, tmp_path: Path, source: str
) -> None:
    with pytest.raises(EmbeddingMismatch, match="`token` must be one printable word"):
        read(reader, tmp_path, sdxl(), source=source)


def test_a_file_of_another_kind_is_refused_with_its_source(
    reader: EmbeddingReader, tmp_path: Path
) -> None:
    path = tmp_path / "page.safetensors"
    path.write_text("<!doctype html>" + 100 * " ")

    with pytest.raises(NotSafetensors, match=f"{SOURCE}: not a safetensors file but a web page"):
        reader.read(path, source=SOURCE)


def test_the_words_of_clip_are_refused_in_any_spelling() -> None:
    """The real vocabulary, which the tiny model has not."""
    from transformers import CLIPTokenizer
    from zlora_worker.model import embedding_file
    from zlora_worker.model.families.sdxl import CONFIG

    tokenizer = CLIPTokenizer.from_pretrained(CONFIG / "tokenizer", local_files_only=True)

    known = ("cat", "Cat", "sks", "!", "<|endoftext|>", "</w>")
    assert [embedding_file.is_known(tokenizer, word) for word in known] == [True] * 5 + [False]
    for word in ("easynegative", "<s0>", "sks1", "TOK42", "ünïcode", "猫"):
        assert not embedding_file.is_known(tokenizer, word), word
