"""What images are drawn from: a request with nothing left out, its LoRAs, embeddings and image."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from msgspec import structs
from zlora.errors import naming_file
from zlora.lora import recipes
from zlora.lora.catalogue import CatalogueEntry, Resolved
from zlora.schema import (
    Asset,
    EmbeddingReceipt,
    GenerateRequest,
    LoraReceipt,
    Phase,
    require_drawn_steps,
    require_steps_of_loras,
    require_upscaled_size,
    used_loras,
)
from zlora.sweeps import naming_image

from zlora_worker.child import Child
from zlora_worker.delivery.progress import Progress
from zlora_worker.embedding_in_use import EmbeddingInUse, embeddings_in_use
from zlora_worker.image_in_use import ImageInUse, read_files
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora_in_use import LoraInUse, asset_of, unused_receipt
from zlora_worker.results.provenance import pinned

if TYPE_CHECKING:  # imports torch, which a child with a fake engine is without
    from zlora_worker.model.text_encoding import Embedding


@dataclass(frozen=True, kw_only=True)
class JobInputs:
    """The checked inputs of the images of a job, or of one image of a sweep.

    `images` are their indices. `request` has what the catalogue and recipes say, and its defaults
    written out. `entries` has that of the catalogue for each of its LoRAs, `loras` those with a
    weight, `warnings` what their recipes say against the request. `recipe_fields` are the fields
    that recipes have set.
    """

    request: GenerateRequest
    images: range
    entries: tuple[CatalogueEntry | None, ...] = ()
    loras: list[LoraInUse] = field(default_factory=list)
    embeddings: list[EmbeddingInUse] = field(default_factory=list)
    image: ImageInUse | None = None
    warnings: list[tuple[str, ...]] = field(default_factory=list)
    recipe_fields: dict[str, Any] = field(default_factory=dict)
    adds_words: bool = False  # whether the job's own request asks for trigger words in the prompt
    is_guided: bool = True  # whether its guidance scale has an effect

    @property
    def weighted_loras(self) -> list[WeightedLora]:
        """The LoRAs with the weights of this job."""
        return [lora.weighted for lora in self.loras]

    @property
    def lora_key(self) -> tuple[object, ...]:
        """Everything that the merged weights depend on."""
        return tuple((lora.key, lora.schedule) for lora in self.weighted_loras)

    @property
    def text_key(self) -> tuple[object, ...]:
        """Everything that the encoded prompts depend on."""
        request = self.request
        return (
            (request.prompt, request.negative_prompt, request.prompt_syntax, request.clip_skip),
            self.is_guided,  # else no negative prompt is encoded
            tuple((each.file.sha256, each.tokens) for each in self.embeddings),
            tuple(
                (lora.parsed.digest, lora.weighted.text_encoder_weight)
                for lora in self.loras
                if any(name.startswith("text_encoder") for name in lora.parsed.modules)
            ),
        )

    @property
    def vectors(self) -> "list[Embedding]":
        """The embeddings of all files, in order."""
        return [each for file in self.embeddings for each in file.embeddings]

    @property
    def pinned_request(self) -> GenerateRequest:
        """The request with each file pinned, and without secrets."""
        files = [lora.file for lora in self.loras]
        return pinned(
            self.request,
            [(file.source, file.sha256, file.config_sha256) for file in files],
            [
                (found.file.source, found.file.sha256, found.only_token)
                for found in self.embeddings[: len(self.request.embeddings)]
            ],
            self.image.receipts if self.image else {},
        )

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


def read_inputs(
    child: Child,
    asked: GenerateRequest,
    *,
    since: float,
    progress: Progress,
    end_phase: Callable[[Phase], None],
) -> list[JobInputs]:
    """Fetch and parse what a request names; return the inputs of each image of a sweep.

    Without a sweep there are only those of all images. `since` is when the job was submitted.
    Calls `end_phase` after each phase. Raises a `ZloraError` for what cannot be drawn, if possible
    before anything is fetched.
    """
    given = asked.cells
    resolved = _resolved(child, asked)
    cells = [request for request, _ in resolved]
    first = cells[0]  # whose embeddings and image are those of all

    # fetch
    assets = [asset_of(spec) for spec in used_loras(cells)]
    assets += [spec.file for spec in first.embeddings]
    places: dict[Asset, dict[str, Any]] = {}
    for index, embedding in enumerate(first.embeddings):
        places.setdefault(embedding.file, {"index": index, "field": "embeddings"})
    for cell in cells:
        for index, spec in enumerate(cell.loras):
            if spec.is_used:
                places.setdefault(asset_of(spec), {"index": index})
    opened = child.lora_files.files(
        assets,
        images=first.fetched_images,
        places=places,
        since=since,
        on_bytes=lambda received, expected: progress(Phase.FETCH, received, expected),
    )
    with opened as files:
        image_files = read_files(child, first, files[len(assets) :])
        end_phase(Phase.FETCH)
        # parse
        progress(Phase.PARSE, 0, len(assets))
        by_asset = dict(zip(assets, files, strict=False))
        parsed: dict[tuple[Asset, float | None], LoraInUse] = {}
        loras: list[list[LoraInUse]] = []  # of each cell
        embeddings: list[list[EmbeddingInUse]] = []
        known: dict[tuple[str, ...], list[EmbeddingInUse]] = {}  # by the LoRAs that have some
        for index, (request, entries) in enumerate(resolved):
            of_cell: list[LoraInUse] = []
            with naming_image(asked.sweep, index):
                for place, (spec, entry) in enumerate(zip(request.loras, entries, strict=True)):
                    if not spec.is_used:
                        continue
                    key = (spec.file, spec.alpha)
                    with naming_file(index=place):
                        if key not in parsed:
                            file = by_asset[asset_of(spec)]
                            parsed[key] = LoraInUse.read(child, spec, file, entry=entry)
                        of_cell.append(parsed[key].with_spec(spec, entry=entry))
            loras.append(of_cell)
            beside = tuple(lora.file.sha256 for lora in of_cell if lora.parsed.has_embeddings)
            if beside not in known:
                of_words = [by_asset[spec.file] for spec in first.embeddings]
                known[beside] = embeddings_in_use(child, first.embeddings, of_words, of_cell)
            embeddings.append(known[beside])

    image = ImageInUse.decode(child, first, image_files) if image_files else None
    inputs = []
    for index, (request, entries) in enumerate(resolved):
        with naming_image(asked.sweep, index):
            filled = _with_nothing_left_out(child, request, loras[index], image)
        inputs.append(
            JobInputs(
                request=filled.request,
                images=range(index, index + 1) if asked.sweep else range(request.num_images),
                entries=entries,
                loras=loras[index],
                embeddings=embeddings[index],
                image=image,
                warnings=filled.warnings,
                recipe_fields=filled.fields,
                adds_words=given[index].trigger_words == "add",
                is_guided=child.model.is_guided(filled.request),
            )
        )
    for index, each in enumerate(inputs if asked.sweep else ()):  # before the first is drawn
        with naming_image(asked.sweep, index):
            child.model.require_text(each.request, each.vectors)
    end_phase(Phase.PARSE)
    return inputs


def _resolved(child: Child, asked: GenerateRequest) -> list[Resolved]:
    """Resolve the names of each image's request; raise for what shows without any file."""
    resolved: list[Resolved] = []
    for index, cell in enumerate(asked.cells):
        with naming_image(asked.sweep, index):
            found = child.catalogue.resolve(cell)
            request, has_loras = found.request, any(spec.is_used for spec in found.request.loras)
            may_have_recipe = has_loras and request.recipes == "auto"
            if request.scheduler or not may_have_recipe:
                child.model.scheduler_name(request)  # else a recipe may set it
            if not may_have_recipe:
                whole = child.model.with_defaults(request)
                require_drawn_steps(whole)
                require_steps_of_loras(whole)
            child.model.require_honoured(request)
            resolved.append(found)
    return resolved


def _with_nothing_left_out(
    child: Child, request: GenerateRequest, loras: Sequence[LoraInUse], image: ImageInUse | None
) -> recipes.FilledRequest:
    """Return the request with what recipes say, its defaults, and the size of its image.

    Raises `InvalidRequest` if that leaves no step to draw, or if a second pass would be too large.
    """
    filled = recipes.fill(request, [lora.recipe for lora in loras], draws_with=child.draws_with)
    whole = child.model.with_defaults(filled.request)
    require_drawn_steps(whole)
    require_steps_of_loras(whole)
    if image is not None:
        width, height = image.start.image.size
        whole = structs.replace(whole, width=width, height=height)
    if whole.upscale is not None:  # the size of the first pass, which the images do not show
        width, height = child.model.size(whole)
        whole = structs.replace(whole, width=width, height=height)
        require_upscaled_size(whole)
        child.model.require_honoured(whole)
    return filled._replace(request=whole)


def strongest_receipts(
    cells: Sequence[JobInputs], receipts: Sequence[Sequence[LoraReceipt]]
) -> tuple[LoraReceipt, ...]:
    """Return a receipt for each LoRA of a job: of a sweep, that of its greatest relative norm.

    `receipts` has those of each cell.
    """
    found: dict[tuple[Asset, int], LoraReceipt] = {}
    for cell, of_cell in zip(cells, receipts, strict=True):
        times = Counter[Asset]()  # a request may name a file twice
        for spec, receipt in zip(cell.request.loras, of_cell, strict=True):
            key = (spec.file, times[spec.file])
            times[spec.file] += 1
            known = found.get(key)
            if known is None or (receipt.relative_norm or 0) > (known.relative_norm or 0):
                found[key] = receipt
    return tuple(found.values())
