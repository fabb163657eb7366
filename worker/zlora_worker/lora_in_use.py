"""One LoRA of a running job: its spec, its file, its parsed weights, its receipt."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Self

import msgspec
from zlora import config
from zlora.errors import InvalidSetting, LoraError
from zlora.lora.catalogue import CatalogueEntry
from zlora.lora.recipes import Recipe, recipe_named, recipe_of_address
from zlora.redaction import label, without_secrets
from zlora.schema import NO_CONFIG, Asset, LoraReceipt, LoraSpec, LoraTier, Phase
from zlora.unet_blocks import canonical

from zlora_worker.child import Child
from zlora_worker.fetch.cache import CachedFile
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.reader import Lora, require_whole

_UNMATCHED_NAMES: Final = 20  # in a receipt, which travels with each look at the result
_NAME_LENGTH: Final = 200  # characters of a tensor's name, which the author of the file chose
_ALPHA_ASSUMED: Final = "alpha: assumed equal to rank"
_NOT_USED: Final = "weight 0: the file was not fetched"
_NO_WORDS: Final = "trigger_words: none are added, since the LoRA is not one of the catalogue"


@dataclass(frozen=True, kw_only=True)
class LoraInUse:
    """A LoRA of a job, from its spec to its receipt."""

    spec: LoraSpec
    file: CachedFile
    parsed: Lora
    tier: LoraTier  # the nearest place that had it
    seconds: float  # that parsing took
    entry: CatalogueEntry | None = None  # of the catalogue, if it is one

    @classmethod
    def read(
        cls,
        child: Child,
        spec: LoraSpec,
        file: CachedFile,
        *,
        entry: CatalogueEntry | None = None,
    ) -> Self:
        """Parse the file, or take the parsed LoRA from memory.

        Raises `NotSafetensors`, and `LoraMismatch` if the file does not fit the base model, or
        changes text encoders with a strength that changes over the steps.
        """
        start = time.perf_counter()
        parsed, from_memory = parse(child, spec, file)
        if from_memory and child.bases:  # it may have been read for another base
            child.model.reader.require_effect(parsed, source=file.source)
        tier: LoraTier = file.tier
        if from_memory and tier == "disk":
            tier = "memory"
        found = cls(
            spec=spec,
            file=file,
            parsed=parsed,
            tier=tier,
            seconds=time.perf_counter() - start,
        )
        return found.with_spec(spec, entry=entry)

    def with_spec(self, spec: LoraSpec, *, entry: CatalogueEntry | None) -> Self:
        """Return the LoRA as another image of the job uses it; raise `LoraMismatch` as `read`."""
        if spec.strict:
            require_whole(self.parsed, source=self.file.source)
        spec.require_constant_text(self.parsed.modules, self.file.source)
        return replace(self, spec=spec, entry=entry)

    @property
    def weighted(self) -> WeightedLora:
        """The LoRA with the weights of this job."""
        unet, text = self.spec.component_weights
        blocks = self.spec.blocks or {}
        return WeightedLora(
            lora=self.parsed,
            unet_weight=unet,
            text_encoder_weight=text,
            schedule=self.spec.unet_weights if self.spec.has_schedule else (),
            blocks=tuple(sorted((canonical(name), factor) for name, factor in blocks.items())),
            source=self.file.source,
        )

    @property
    def recipe(self) -> Recipe | None:
        """Recipe of a few-step LoRA: by the catalogue, else by the file's header or address."""
        if self.entry is not None and self.entry.recipe is not None:
            return recipe_named(self.entry.recipe)
        return self.parsed.recipe or recipe_of_address(self.file.source)

    def receipt(
        self,
        relative_norm: float,
        *,
        steps: int,
        warned: Sequence[str] = (),
        adds_words: bool = False,
    ) -> LoraReceipt:
        """Return what was used; `relative_norm` is that of the merged change.

        `steps` are those of an image. `warned` says what in the request contradicts the LoRA's
        recipe. `adds_words` says that the request asks for trigger words in the prompt.
        """
        parsed, entry = self.parsed, self.entry
        warnings = [_ALPHA_ASSUMED, *warned] if parsed.alpha_assumed else [*warned]
        if adds_words and entry is None:
            warnings.append(_NO_WORDS)
        unet, text = self.spec.component_weights
        return LoraReceipt(
            source=self.file.source,
            sha256=self.file.sha256,
            size=self.file.size,
            format=parsed.format,
            ranks=parsed.ranks,
            unet_weight=unet,
            text_encoder_weight=text,
            modules=parsed.modules,
            tier=self.tier,
            milliseconds={
                Phase.FETCH: round(1000 * self.file.seconds, 3),
                Phase.PARSE: round(1000 * self.seconds, 3),
            },
            adapter_name=label(self.spec.adapter_name),
            kinds=parsed.kinds,
            unmatched=parsed.unmatched_counts(),
            unmatched_names=tuple(
                name[:_NAME_LENGTH] for name in parsed.unmatched[:_UNMATCHED_NAMES]
            ),
            relative_norm=round(relative_norm, 6),
            tensors_sha256=parsed.tensors_sha256,
            config_sha256=self.file.config_sha256,
            warnings=tuple(warnings),
            catalogue=entry.name if entry else None,
            trigger_words=_words(entry, parsed),
            unet_weights=self.spec.weights_by_step(steps) if self.spec.has_schedule else (),
            blocks=self.spec.blocks or {},
            recipe=self.recipe.name if self.recipe else None,
        )


def parse(child: Child, spec: LoraSpec, file: CachedFile) -> tuple[Lora, bool]:
    """Return the parsed LoRA, and whether it was in memory; raise as `LoraInUse.read`."""
    digest = file.sha256  # of everything that the deltas depend on
    if file.config is not None:
        digest += f" {file.config_sha256}"
    if spec.alpha is not None:
        digest += f" {spec.alpha}"
    return child.loras.get(
        digest,
        lambda: child.model.reader.read(
            file.path, digest=digest, source=file.source, config=file.config, alpha=spec.alpha
        ),
    )


def _words(entry: CatalogueEntry | None, parsed: Lora) -> tuple[str, ...]:
    """Return the trigger words of the catalogue, else those of the file's header."""
    if entry is None or entry.trigger_words is None:
        return parsed.trigger_words
    return entry.trigger_words


def hold_pinned(child: Child) -> None:
    """Parse the pinned LoRAs of the catalogue, and keep them in memory and on disk.

    Raises `InvalidSetting` if one cannot be used, or if memory has no room for all.
    """
    for entry in child.catalogue.entries.values():
        if not entry.pinned:
            continue
        start = f"{config.CATALOGUE}: the pinned LoRA {entry.name}"
        spec = LoraSpec(file=entry.asset)
        try:
            (file,) = child.pinned_files.enter_context(child.lora_files.files([spec.file]))
            parsed, _ = parse(child, spec, file)
        except LoraError as error:
            raise InvalidSetting(f"{start}: {error}", {"name": config.CATALOGUE}) from None
        if not child.loras.pin(parsed.digest):
            raise InvalidSetting(
                f"{start} has {parsed.nbytes:,} bytes, and ZLORA_LORA_MEMORY_BYTES leaves no room "
                f"for them beside {child.loras.pinned_bytes:,} bytes of other pinned LoRAs",
                {"name": config.CATALOGUE},
            )


def unused_receipt(spec: LoraSpec, entry: CatalogueEntry | None = None) -> LoraReceipt:
    """Return the receipt of a LoRA with the weight 0, whose file is not known."""
    return LoraReceipt(
        source=without_secrets(spec.file.address),
        sha256=spec.file.sha256 or "",
        size=0,
        format="unknown",
        ranks=(),
        unet_weight=0.0,
        text_encoder_weight=0.0,
        modules={},
        tier="memory",
        milliseconds={},
        adapter_name=label(spec.adapter_name),
        relative_norm=0.0,
        warnings=(_NOT_USED,),
        catalogue=entry.name if entry else None,
        trigger_words=entry.words if entry else (),
    )


def asset_of(spec: LoraSpec) -> Asset:
    """Return the file to open; an alpha of the request replaces the configuration beside it."""
    if spec.alpha is None:
        return spec.file
    return msgspec.structs.replace(spec.file, config_sha256=NO_CONFIG)
