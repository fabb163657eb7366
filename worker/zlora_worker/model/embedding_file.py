"""Reading of embeddings (textual inversions) from safetensors files, for one base model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from zlora.errors import EmbeddingMismatch, NotSafetensors
from zlora.lora import embedding_header
from zlora.lora.embedding_header import HeaderEmbedding
from zlora.lora.safetensors_header import Header, read_header

from zlora_worker.lora.tensor_file import read_tensor
from zlora_worker.model.family import Family
from zlora_worker.model.text_encoding import Embedding


class FileEmbeddings(NamedTuple):
    """Embeddings of a file, each with its word, and the naming scheme of the tensors."""

    format: str
    embeddings: tuple[Embedding, ...]


class EmbeddingReader:
    """Reader of embeddings for the text encoders of one base model."""

    def __init__(self, pipeline: Any, family: Family) -> None:
        """Take the widths and data types of the encoders, and the words of the tokenizers."""
        self._base: Final = family.name
        encoders = {name: getattr(pipeline, name) for name in family.text_encoders}
        self._widths: Final = {
            name: int(encoder.get_input_embeddings().weight.shape[1])
            for name, encoder in encoders.items()
        }
        self._dtypes: Final = {name: encoder.dtype for name, encoder in encoders.items()}
        self._tokenizers: Final = [
            getattr(pipeline, name) for name in family.text_encoders.values()
        ]

    def read(
        self, path: Path, *, source: str, token: str | None = None, beside_lora: bool = False
    ) -> FileEmbeddings:
        """Read the embeddings of the file at `path`; `source` is its name in messages.

        `token` replaces the word that the file says. With `beside_lora` the file is a LoRA's, whose
        other tensors are left out. Raises `NotSafetensors`, and `EmbeddingMismatch` for what
        `zlora.lora.embedding_header` refuses, NaN and Inf, and a word that the tokenizers know.
        """
        try:
            header = read_header(path)
            found = embedding_header.read_embeddings(
                header,
                source,
                base=self._base,
                token=token,
                widths=self._widths,
                beside_lora=beside_lora,
            )
            embeddings = [
                embedding
                for each in found.embeddings
                for embedding in self._embeddings(path, header, source, each)
            ]
        except NotSafetensors as error:
            raise NotSafetensors(f"{source}: {error}", error.details) from None
        return FileEmbeddings(found.format, tuple(embeddings))

    def _embeddings(
        self, path: Path, header: Header, source: str, found: HeaderEmbedding
    ) -> Iterator[Embedding]:
        vectors = {}
        for encoder, name in found.tensors.items():
            tensor = read_tensor(path, header, name).to(self._dtypes[encoder])
            if not tensor.float().isfinite().all():
                raise EmbeddingMismatch(f"{source}: NaN or Inf in {name[:100]}")
            vectors[encoder] = tensor.view(found.vectors, -1)
        for word in found.words:
            if any(is_known(tokenizer, word) for tokenizer in self._tokenizers):
                raise EmbeddingMismatch(
                    f"{source}: {word} is a word that the base model knows: name another `token`",
                    {"token": word},
                )
        if len(found.words) == 1:
            yield Embedding(token=found.words[0], vectors=vectors)
            return
        for index, word in enumerate(found.words):
            rows = {encoder: tensor[index : index + 1] for encoder, tensor in vectors.items()}
            yield Embedding(token=word, vectors=rows)


def is_known(tokenizer: Any, word: str) -> bool:
    """Return whether a word is one token of the vocabulary, or none at all."""
    return len(tokenizer.tokenize(word)) < 2  # noqa: PLR2004
