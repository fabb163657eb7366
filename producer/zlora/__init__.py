"""z-image-lora: queue SDXL pictures with LoRAs, get pictures and a receipt back.

from zlora import Client

with Client.from_env() as client:
    result = client.submit({"prompt": "a portrait in anime style"}).result(timeout=600)
print(result.images[0].url)
"""

from zlora import errors
from zlora.async_client import AsyncClient, AsyncJobHandle
from zlora.client import Client, Options, Priority, job_id_of
from zlora.handle import JobHandle
from zlora.job import (
    Asset,
    Cancellation,
    GenerateRequest,
    GenerateResult,
    ImageRef,
    JobState,
    JobStatus,
    LoraReceipt,
    LoraSpec,
)
from zlora.origins import LoraInfo
from zlora.preflight import Preflight

__all__ = [
    "Asset",
    "AsyncClient",
    "AsyncJobHandle",
    "Cancellation",
    "Client",
    "GenerateRequest",
    "GenerateResult",
    "ImageRef",
    "JobHandle",
    "JobState",
    "JobStatus",
    "LoraInfo",
    "LoraReceipt",
    "LoraSpec",
    "Options",
    "Preflight",
    "Priority",
    "errors",
    "job_id_of",
]
