"""A result with nothing drawn, for tests: every field as a worker's would be."""

import hashlib
import time
from typing import Final

import msgspec

from zlora.redaction import label, without_secrets
from zlora.schema import (
    Asset,
    GenerateRequest,
    GenerateResult,
    ImageRef,
    LoraReceipt,
    LoraSpec,
    digest_of,
    seed_of,
)

_NOTHING: Final = hashlib.sha256(b"").hexdigest()
_SIDE: Final = 1024  # pixels: the native size of SDXL


def fake_result(job_id: str, request: GenerateRequest) -> GenerateResult:
    """A result with nothing drawn, every field as a worker's would be: pictures of no bytes, and a receipt a LoRA.

    URLs are below `https://pictures.invalid/`, a name that is nobody's (RFC 2606).
    """
    from importlib.metadata import version

    now = time.time()
    loras = tuple(msgspec.structs.replace(spec, file=_pinned(spec.file)) for spec in request.loras)
    seed = seed_of(job_id) if request.seed is None else request.seed
    return GenerateResult(
        job_id=job_id,
        images=tuple(
            _picture(job_id, request, index, seed + index) for index in range(request.num_images)
        ),
        loras=tuple(map(_receipt, request.loras)),
        seed=seed,
        timings=dict.fromkeys(
            ("queued", "fetch", "parse", "apply", "denoise", "restore", "tail"), 0.0
        ),
        base_intact=True,
        model="zlora.testing",
        versions={"z-image-lora": version("z-image-lora")},
        started_at=now,
        finished_at=now,
        request_sha256=digest_of(request),
        request=msgspec.structs.replace(request, loras=loras),
        base_sha256=_NOTHING,
        scheduler=request.scheduler or "none",
        device="none",
        dtype="none",
    )


def _picture(job_id: str, request: GenerateRequest, index: int, seed: int) -> ImageRef:
    key = f"runs/{job_id}/outputs/{index}.{request.output_format}"
    content_type = f"image/{request.output_format}"
    return ImageRef(
        key=key,
        width=request.width or _SIDE,
        height=request.height or _SIDE,
        content_type=content_type,
        size=0,
        sha256=_NOTHING,
        seed=seed,
        url=None if request.url_policy == "key" else f"https://pictures.invalid/{key}",
        pixels_sha256=_NOTHING,
        data_uri=f"data:{content_type};base64," if request.inline else None,
    )


def _pinned(file: Asset) -> Asset:
    return Asset(url=without_secrets(file.address), sha256=file.sha256 or _NOTHING)


def _receipt(spec: LoraSpec) -> LoraReceipt:
    return LoraReceipt(
        source=without_secrets(spec.file.address),
        sha256=spec.file.sha256 or _NOTHING,
        size=0,
        format="unknown",
        ranks=(),
        unet_weight=spec.weight if spec.unet_weight is None else spec.unet_weight,
        text_encoder_weight=spec.weight
        if spec.text_encoder_weight is None
        else spec.text_encoder_weight,
        modules={},
        tier="memory",
        milliseconds={"fetch": 0.0, "parse": 0.0},
        adapter_name=label(spec.adapter_name),
    )
