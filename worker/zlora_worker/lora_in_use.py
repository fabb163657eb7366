"""One LoRA of a running job: its spec, its file, its parsed weights, its receipt."""

import time
from dataclasses import dataclass
from typing import Final, Self

import msgspec
from zlora.redaction import label, without_secrets
from zlora.schema import NO_CONFIG, Asset, LoraReceipt, LoraSpec, LoraTier, Phase

from zlora_worker.child import Child
from zlora_worker.fetch.cache import CachedFile
from zlora_worker.lora.merge import WeightedLora
from zlora_worker.lora.reader import Lora, require_whole

_UNMATCHED_NAMES: Final = 20  # in a receipt, which travels with each look at the result
_NAME_LENGTH: Final = 200  # characters of a tensor's name, which the author of the file chose
_ALPHA_ASSUMED: Final = "alpha: assumed equal to rank"
_NOT_USED: Final = "weight 0: the file was not fetched"


@dataclass(frozen=True, kw_only=True)
class LoraInUse:
    """A LoRA of a job, from its spec to its receipt."""

    spec: LoraSpec
    file: CachedFile
    parsed: Lora
    tier: LoraTier  # the nearest place that had it
    seconds: float  # that parsing took

    @classmethod
    def read(cls, child: Child, spec: LoraSpec, file: CachedFile) -> Self:
        """Parse the file, or take the parsed LoRA from memory.

        Raises `NotSafetensors`, and `LoraMismatch` if the file does not fit the base model.
        """
        start = time.perf_counter()
        parsed, from_memory = parse(child, spec, file)
        if spec.strict:
            require_whole(parsed, source=file.source)
        tier: LoraTier = file.tier
        if from_memory and tier == "disk":
            tier = "memory"
        return cls(
            spec=spec, file=file, parsed=parsed, tier=tier, seconds=time.perf_counter() - start
        )

    @property
    def weighted(self) -> WeightedLora:
        """The LoRA with the weights of this job."""
        unet, text = self.spec.component_weights
        return WeightedLora(
            lora=self.parsed,
            unet_weight=unet,
            text_encoder_weight=text,
            source=self.file.source,
        )

    def receipt(self, relative_norm: float) -> LoraReceipt:
        """Return what was used; `relative_norm` is that of the merged change."""
        parsed = self.parsed
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
            warnings=(_ALPHA_ASSUMED,) if parsed.alpha_assumed else (),
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


def unused_receipt(spec: LoraSpec) -> LoraReceipt:
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
    )


def asset_of(spec: LoraSpec) -> Asset:
    """Return the file to open; an alpha of the request replaces the configuration beside it."""
    if spec.alpha is None:
        return spec.file
    return msgspec.structs.replace(spec.file, config_sha256=NO_CONFIG)
