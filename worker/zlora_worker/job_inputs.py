"""What a job draws with: its request with nothing left out, its LoRAs, embeddings and image."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from msgspec import structs
from zlora.lora import recipes
from zlora.lora.catalogue import CatalogueEntry
from zlora.schema import (
    EmbeddingReceipt,
    GenerateRequest,
    LoraReceipt,
    Phase,
    require_drawn_steps,
    require_steps_of_loras,
    require_upscaled_size,
)

from zlora_worker.child import Child
from zlora_worker.delivery.progress import Progress
from zlora_worker.embedding_in_use import EmbeddingInUse, embeddings_in_use
from zlora_worker.image_in_use import ImageInUse, read_files
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora_in_use import LoraInUse, asset_of, unused_receipt

if TYPE_CHECKING:  # imports torch, which a child with a fake engine is without
    from zlora_worker.model.text_encoding import Embedding


@dataclass(frozen=True, kw_only=True)
class JobInputs:
    """The checked inputs of a job.

    `request` has what the catalogue and recipes say, and its defaults written out. `entries` has
    that of the catalogue for each of its LoRAs, `loras` those with a weight, `warnings` what their
    recipes say against the request. `recipe_fields` are the fields that recipes have set.
    """

    request: GenerateRequest
    entries: tuple[CatalogueEntry | None, ...] = ()
    loras: list[LoraInUse] = field(default_factory=list)
    embeddings: list[EmbeddingInUse] = field(default_factory=list)
    image: ImageInUse | None = None
    warnings: list[tuple[str, ...]] = field(default_factory=list)
    recipe_fields: dict[str, Any] = field(default_factory=dict)
    adds_words: bool = False  # whether the job's own request asks for trigger words in the prompt

    @classmethod
    def read(
        cls,
        child: Child,
        asked: GenerateRequest,
        *,
        since: float,
        progress: Progress,
        end_phase: Callable[[Phase], None],
    ) -> Self:
        """Fetch and parse what a request names; `since` is when its job was submitted.

        Calls `end_phase` after each phase. Raises a `ZloraError` for what cannot be drawn, if
        possible before anything is fetched.
        """
        request, entries = child.catalogue.resolve(asked)
        used = [pair for pair in zip(request.loras, entries, strict=True) if pair[0].is_used]
        if request.scheduler or request.recipes == "off" or not used:  # else a recipe may set it
            child.model.scheduler_name(request)
        child.model.require_blocks(request)

        # fetch
        assets = [asset_of(spec) for spec, _ in used]
        assets += [spec.file for spec in request.embeddings]
        opened = child.lora_files.files(
            assets,
            images=request.fetched_images,
            since=since,
            on_bytes=lambda received, expected: progress(Phase.FETCH, received, expected),
        )
        with opened as files:
            image_files = read_files(child, request, files[len(assets) :])
            end_phase(Phase.FETCH)
            # parse
            progress(Phase.PARSE, 0, len(assets))
            lora_files, embedding_files = files[: len(used)], files[len(used) : len(assets)]
            loras = [
                LoraInUse.read(child, spec, file, entry=entry)
                for (spec, entry), file in zip(used, lora_files, strict=True)
            ]
            embeddings = embeddings_in_use(child, request.embeddings, embedding_files, loras)
        request, fields, warnings = recipes.fill(request, [lora.recipe for lora in loras])
        request = request.with_defaults()
        require_drawn_steps(request)
        require_steps_of_loras(request)
        image = None
        if image_files:
            image = ImageInUse.decode(child, request, image_files)
            request = image.request
        if request.upscale is not None:  # the size of the first pass, which the images do not show
            width, height = child.model.size(request)
            request = structs.replace(request, width=width, height=height)
            require_upscaled_size(request)
        end_phase(Phase.PARSE)
        return cls(
            request=request,
            entries=entries,
            loras=loras,
            embeddings=embeddings,
            image=image,
            warnings=warnings,
            recipe_fields=fields,
            adds_words=asked.trigger_words == "add",
        )

    @property
    def weighted_loras(self) -> list[WeightedLora]:
        """The LoRAs with the weights of this job."""
        return [lora.weighted for lora in self.loras]

    @property
    def vectors(self) -> "list[Embedding]":
        """The embeddings of all files, in order."""
        return [each for file in self.embeddings for each in file.embeddings]

    def lora_receipts(self, relative_norms: Sequence[float]) -> tuple[LoraReceipt, ...]:
        """Return what was used of each LoRA; `relative_norms` are those of the merged changes."""
        used = iter(
            lora.receipt(
                norm,
                steps=self.request.drawn_steps,
                warned=warned,
                adds_words=self.adds_words,
            )
            for lora, norm, warned in zip(self.loras, relative_norms, self.warnings, strict=True)
        )
        return tuple(
            next(used) if spec.is_used else unused_receipt(spec, entry)
            for spec, entry in zip(self.request.loras, self.entries, strict=True)
        )

    def embedding_receipts(self, uses: Sequence[int]) -> tuple[EmbeddingReceipt, ...]:
        """Return what was used of each file; `uses` counts how often the prompts have each word."""
        counts: Iterator[int] = iter(uses)
        return tuple(file.receipt(counts) for file in self.embeddings)
