"""What a picture was drawn from: all that draws it again, and nothing that is secret."""

from collections.abc import Iterable
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct
from zlora.redaction import label
from zlora.schema import JOB_ID, MAX_SEED, Asset, GenerateRequest, GenerateResult, TolerantRequest

_LONGEST: Final = 2**22  # bytes of a recipe's JSON; the longest request has about a tenth


class Provenance(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One picture: the `index`th of a job, by its own `seed`.

    Of `request` the addresses have no query, and each LoRA is pinned to the file that was used. `pixels_sha256` is of
    the RGB bytes as they were drawn. The other fields are those of `GenerateResult`.
    """

    job_id: Annotated[str, Meta(pattern=rf"^{JOB_ID.pattern}\Z")]
    index: Annotated[int, Meta(ge=0)] = 0
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)]
    width: Annotated[int, Meta(ge=1)]
    height: Annotated[int, Meta(ge=1)]
    pixels_sha256: str | None = None
    request: GenerateRequest
    model: str
    base_sha256: str
    model_sha256: str | None = None
    scheduler: str
    device: str
    dtype: str
    threads: int | None = None
    tiled: bool = False
    versions: dict[str, str]


_OWN: Final = ("seed", "width", "height", "pixels_sha256", "tiled")  # of a picture
# Of a job.
_SHARED: Final = (
    "job_id", "seed", "request", "model", "base_sha256", "model_sha256", "scheduler", "device", "dtype", "threads",
    "versions",
)  # fmt: skip


def pinned(request: GenerateRequest, files: Iterable[tuple[str, str]]) -> GenerateRequest:
    """The request with each LoRA replaced by its source without secrets, and its sha256."""
    loras = [
        msgspec.structs.replace(
            spec, file=_pinned(source, sha256), adapter_name=label(spec.adapter_name)
        )
        for spec, (source, sha256) in zip(request.loras, files, strict=True)
    ]
    return msgspec.structs.replace(request, loras=tuple(loras))


def _pinned(source: str, sha256: str) -> Asset:
    """By its digest alone where its source is no address: nothing was left of it, or spelling it out was too long."""
    try:
        return msgspec.convert({"url": source, "sha256": sha256}, Asset)
    except msgspec.ValidationError:
        return Asset(url=f"sha256:{sha256}", sha256=sha256)


def shared(recipe: Provenance) -> dict[str, Any]:
    """What a result says too, for all of its pictures together."""
    return {name: getattr(recipe, name) for name in _SHARED}


def provenances(result: GenerateResult) -> list[Provenance]:
    """What the pictures of a manifest were drawn from; raises `ValueError` for one of before there were recipes."""
    if result.request is None or result.base_sha256 is None:
        raise ValueError("the manifest does not say what its pictures were drawn from")
    common: dict[str, Any] = {name: getattr(result, name) for name in _SHARED}
    return [
        Provenance(**common | {name: getattr(image, name) for name in _OWN}, index=index)
        for index, image in enumerate(result.images)
    ]


class _LaterRecipe(Provenance, frozen=True, kw_only=True):
    request: TolerantRequest


def parse_provenance(document: bytes | str) -> Provenance:
    """From its JSON, which anyone may have written; what a later version has added is passed over.

    Raises `msgspec.DecodeError` for what is no JSON or too long, and its kind `msgspec.ValidationError` for a field
    that is absent or out of its bounds.
    """
    try:
        data = document.encode() if isinstance(document, str) else document
        if len(data) > _LONGEST:
            raise msgspec.DecodeError(f"{len(data)} bytes are no recipe")
        found = msgspec.json.decode(data, type=_LaterRecipe)
    except (RecursionError, UnicodeError) as error:
        raise msgspec.DecodeError(str(error)) from None
    return msgspec.convert(msgspec.to_builtins(found), Provenance)
