"""Queue images with LoRAs; each result has the images and a receipt.

from zlora import Client

with Client.from_env() as client:
    result = client.submit({"prompt": "a portrait in anime style"}).result(timeout=600)
print(result.images[0].url)
"""

from zlora import errors
from zlora.async_client import AsyncClient, AsyncJobHandle
from zlora.client import Client, Options, Priority, job_id_of
from zlora.handle import JobHandle
from zlora.lora.base_model import LoraInfo
from zlora.lora.preflight import Preflight
from zlora.queue_info import QueueInfo
from zlora.schema import (
    Asset,
    Cancellation,
    EmbeddingReceipt,
    EmbeddingSpec,
    GenerateRequest,
    GenerateResult,
    ImageRef,
    JobState,
    JobStatus,
    LoraReceipt,
    LoraSpec,
    PromptReceipt,
)

__all__ = [
    "Asset",
    "AsyncClient",
    "AsyncJobHandle",
    "Cancellation",
    "Client",
    "EmbeddingReceipt",
    "EmbeddingSpec",
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
    "PromptReceipt",
    "QueueInfo",
    "errors",
    "job_id_of",
]
