"""One file of embeddings of a running job: its spec, its vectors, its receipt."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from zlora.errors import EmbeddingMismatch, naming_file
from zlora.schema import EmbeddingReceipt, EmbeddingSpec

from zlora_worker.child import Child
from zlora_worker.fetch.cache import CachedFile
from zlora_worker.lora_in_use import LoraInUse

if TYPE_CHECKING:  # imports torch, which a child with a fake engine is without
    from zlora_worker.model.text_encoding import Embedding


@dataclass(frozen=True, kw_only=True)
class EmbeddingInUse:
    """A file of embeddings, from its spec or its LoRA to its receipt."""

    file: CachedFile
    format: str
    embeddings: "tuple[Embedding, ...]"

    @classmethod
    def read(
        cls,
        child: Child,
        file: CachedFile,
        *,
        token: str | None = None,
        beside_lora: bool = False,
    ) -> Self:
        """Read the file; raise as `EmbeddingReader.read`."""
        found = child.model.embedding_reader.read(
            file.path, source=file.source, token=token, beside_lora=beside_lora
        )
        return cls(file=file, format=found.format, embeddings=found.embeddings)

    @property
    def tokens(self) -> tuple[str, ...]:
        """The words that stand for the embeddings."""
        return tuple(embedding.token for embedding in self.embeddings)

    @property
    def only_token(self) -> str | None:
        """The word of a file of one embedding, which may be the name of the file."""
        return self.tokens[0] if len(self.tokens) == 1 else None

    def receipt(self, uses: Iterator[int]) -> EmbeddingReceipt:
        """Return what was used; the next numbers of `uses` count how often the prompts have it."""
        used = {embedding.token: next(uses) for embedding in self.embeddings}
        return EmbeddingReceipt(
            source=self.file.source,
            sha256=self.file.sha256,
            size=self.file.size,
            format=self.format,
            vectors={
                embedding.token: len(next(iter(embedding.vectors.values())))
                for embedding in self.embeddings
            },
            used=used,
            tier=self.file.tier,
            warnings=tuple(
                f"{token}: in no prompt that was read" for token in used if not used[token]
            ),
        )


def embeddings_in_use(
    child: Child,
    specs: Sequence[EmbeddingSpec],
    files: Sequence[CachedFile],
    loras: Iterable[LoraInUse],
) -> list[EmbeddingInUse]:
    """Read the embeddings of a job: those of the request, then those beside its LoRAs.

    Raises as `EmbeddingReader.read`, and `EmbeddingMismatch` for a word of two embeddings.
    """
    found = []
    for index, (spec, file) in enumerate(zip(specs, files, strict=True)):
        with naming_file(index=index, field="embeddings"):
            found.append(EmbeddingInUse.read(child, file, token=spec.token))
    found += [
        EmbeddingInUse.read(child, lora.file, beside_lora=True)
        for lora in loras
        if lora.parsed.has_embeddings
    ]
    sources: dict[str, str] = {}  # by word, whose capitals CLIP's tokenizer does not know
    for each in found:
        for embedding in each.embeddings:
            token, source = embedding.token, each.file.source
            if (other := sources.get(token.lower())) is not None:
                raise EmbeddingMismatch(
                    f"{source}: the word {token} also stands for an embedding of {other}",
                    {"token": token},
                )
            sources[token.lower()] = source
    return found
