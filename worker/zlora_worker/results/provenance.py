"""Provenance: everything needed to draw an image again, without secrets."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct
from zlora.redaction import label, without_secrets, without_secrets_in
from zlora.schema import (
    JOB_ID,
    MAX_SEED,
    Asset,
    BatchSize,
    GenerateRequest,
    GenerateResult,
    ImageReceipt,
    SweepCell,
    TolerantRequest,
)

_MAX_BYTES: Final = 2**22  # of a JSON document; that of the longest request has about a tenth


class JobProvenance(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What all images of a job share; each field is also a field of `GenerateResult`.

    `seed` is that of the first image. In `request` the addresses have no query, and each LoRA,
    embedding and image is pinned to the file that was used. Of a sweep, this holds for the requests
    of `cells`, one for each image.
    """

    job_id: Annotated[str, Meta(pattern=rf"^{JOB_ID.pattern}\Z")]
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)]
    request: GenerateRequest
    cells: tuple[SweepCell, ...] = ()
    model: str
    base: str | None = None
    base_sha256: str
    model_sha256: str | None = None
    scheduler: str
    device: str
    dtype: str
    threads: int | None = None
    compile: str = "off"
    versions: dict[str, str]

    def request_of(self, index: int) -> GenerateRequest:
        """Request of an image: of a sweep, that of the image alone."""
        return self.cells[index].request if self.cells else self.request

    def seed_of(self, index: int) -> int:
        """Seed of an image."""
        if not self.cells:
            return self.seed + index
        return self.request_of(index).seed_for(self.job_id)

    def for_image(
        self,
        index: int,
        *,
        width: int,
        height: int,
        pixels_sha256: str | None,
        tiled: bool,
        batch_size: BatchSize,
    ) -> "ImageProvenance":
        """Return the provenance of one image of this job."""
        shared = msgspec.structs.asdict(self) | {
            "request": self.request_of(index),
            "cells": (),
            "seed": self.seed_of(index),
        }
        if self.cells:
            shared["scheduler"] = self.cells[index].scheduler
        return ImageProvenance(
            **shared,
            index=index,
            width=width,
            height=height,
            pixels_sha256=pixels_sha256,
            tiled=tiled,
            batch_size=batch_size,
        )


class ImageProvenance(JobProvenance, frozen=True, kw_only=True):
    """Provenance of the image with this `index` in its job, as its file's metadata has it.

    `seed` is the image's own. `pixels_sha256` is that of the RGB bytes as they were drawn. With a
    `batch_size` above 1 it was drawn together with its `batch`.
    """

    index: Annotated[int, Meta(ge=0)] = 0
    width: Annotated[int, Meta(ge=1)]
    height: Annotated[int, Meta(ge=1)]
    pixels_sha256: str | None = None
    tiled: bool = False
    batch_size: BatchSize = 1

    @property
    def batch(self) -> range:
        """Indices of the images that were drawn together with this one, and its own."""
        first = self.index - self.index % self.batch_size
        end = min(first + self.batch_size, self.request.num_images)
        return range(first, max(end, self.index + 1))


def pinned(
    request: GenerateRequest,
    files: Iterable[tuple[str, str, str | None]],
    embeddings: Iterable[tuple[str, str, str | None]] = (),
    images: Mapping[str, ImageReceipt] | None = None,
) -> GenerateRequest:
    """Return the request with each LoRA, embedding and image pinned to its file.

    `files` has the source without secrets, the sha256, and that of the configuration beside it, of
    each LoRA with a weight in the request's order. Others keep their address. `embeddings` has the
    source, the sha256, and the word of a file with one embedding. `images` has the receipts of
    the image and the mask, by the name of the field.
    """
    used, loras = iter(files), []
    for spec in request.loras:
        source, sha256 = without_secrets(spec.file.address), spec.file.sha256
        config_sha256 = spec.file.config_sha256
        if spec.is_used:
            source, sha256, config_sha256 = next(used)
        asset = _pinned_file(source, sha256, config_sha256)
        loras.append(
            msgspec.structs.replace(spec, file=asset, adapter_name=label(spec.adapter_name))
        )
    specs = tuple(
        msgspec.structs.replace(spec, file=_pinned_file(source, sha256), token=spec.token or token)
        for spec, (source, sha256, token) in zip(request.embeddings, embeddings, strict=True)
    )
    inputs = {
        name: _pinned_file(found.source, found.sha256) for name, found in (images or {}).items()
    }
    return msgspec.structs.replace(request, loras=tuple(loras), embeddings=specs, **inputs)


def unpinned(request: GenerateRequest) -> GenerateRequest:
    """Return the request of a sweep without secrets; which files were used is in its cells."""
    return msgspec.convert(without_secrets_in(msgspec.to_builtins(request)), GenerateRequest)


def _pinned_file(source: str, sha256: str | None, config_sha256: str | None = None) -> Asset:
    pins = {"sha256": sha256, "config_sha256": config_sha256}
    try:
        return msgspec.convert({"url": source} | pins, Asset)
    except msgspec.ValidationError:  # nothing is left of the address, or too long when quoted
        return msgspec.convert({"url": f"sha256:{sha256}"} | pins, Asset)


def image_provenances(result: GenerateResult) -> list[ImageProvenance]:
    """Return the provenance of each image of a result.

    Raises `ValueError` if a field is absent, as in manifests of the first versions, or invalid.
    """
    try:
        job = msgspec.convert(result, JobProvenance, from_attributes=True)
    except msgspec.ValidationError as error:
        raise ValueError(
            f"the manifest does not say what its images were drawn from: {error}"
        ) from None
    if job.request.sweep is not None and len(job.cells) != len(result.images):
        raise ValueError("a sweep has as many cells as images")
    if job.request.sweep is None and job.cells:
        raise ValueError("only a sweep has cells")
    return [
        job.for_image(
            index,
            width=image.width,
            height=image.height,
            pixels_sha256=image.pixels_sha256,
            tiled=image.tiled,
            batch_size=image.batch_size,
        )
        for index, image in enumerate(result.images)
    ]


class _TolerantProvenance(ImageProvenance, frozen=True, kw_only=True):
    request: TolerantRequest


def parse_provenance(document: bytes | str) -> ImageProvenance:
    """Return the provenance in an untrusted JSON document; unknown fields are ignored.

    Raises `msgspec.DecodeError` if the document is not JSON or too long, and its subclass
    `msgspec.ValidationError` if a field is absent or out of its bounds.
    """
    try:
        data = document.encode() if isinstance(document, str) else document
        if len(data) > _MAX_BYTES:
            raise msgspec.DecodeError(f"provenance of {len(data)} bytes is too long")
        found = msgspec.json.decode(data, type=_TolerantProvenance)
    except (RecursionError, UnicodeError) as error:
        raise msgspec.DecodeError(str(error)) from None
    return msgspec.convert(msgspec.to_builtins(found), ImageProvenance)
