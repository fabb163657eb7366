"""What all APIs do with jobs, each for one tenant."""

import asyncio
import math
import time
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar, Unpack

from zlora import images
from zlora.async_client import AsyncClient, AsyncJobHandle
from zlora.broker import uploads
from zlora.broker.uploads import Uploads
from zlora.client import Options, job_id_of
from zlora.errors import BrokerUnavailable, Conflict, InvalidRequest, JobUnknown, ZloraError
from zlora.lora.base_model import LoraInfo
from zlora.lora.preflight import Preflight
from zlora.queue_info import QueueInfo
from zlora.schema import (
    Asset,
    Cancellation,
    GenerateRequest,
    GenerateResult,
    ImageRef,
    check_job_id,
    invalid,
    parse_request,
)
from zlora.server.job_index import Entry, JobIndex, Page
from zlora.server.problems import BodyTooLarge, TooManyJobs
from zlora.server.tenants import Tenant, allowed_info, require_allowed

T = TypeVar("T")

_THREADS: Final = 8  # for the index; a call takes less than a millisecond
_READY_SECONDS: Final = 1.0  # for which an answer of Redis counts
_SLOW_THREADS: Final = 8  # for the bytes of images and the headers of LoRAs, from other servers


class Caller(NamedTuple):
    """Whom an API works for."""

    name: str
    tenant: Tenant
    api: str


class Service:
    """Jobs of the queue, for callers who see their own only."""

    def __init__(
        self,
        client: AsyncClient,
        index: JobIndex,
        kept: Uploads,
        *,
        preflight: Callable[[], Preflight] = Preflight,
        image_hosts: frozenset[str] | None = None,
    ) -> None:
        self._client, self._index, self._uploads = client, index, kept
        self._looking, self._looked = asyncio.Lock(), -math.inf  # on the monotonic clock
        self._make_preflight, self._image_hosts = preflight, image_hosts
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="zlora-index")
        self._slow = ThreadPoolExecutor(_SLOW_THREADS, thread_name_prefix="zlora-fetch")

    async def close(self) -> None:
        """Give connections and threads back."""
        await self._client.close()
        self._threads.shutdown(wait=False)
        self._slow.shutdown(wait=False)
        self._index.close()
        self._uploads.close()

    async def submit(
        self,
        caller: Caller,
        request: GenerateRequest | dict[str, Any],
        *,
        idempotency_key: str | None = None,
        labels: Mapping[str, str] | None = None,
        **options: Unpack[Options],
    ) -> AsyncJobHandle:
        """Queue a request, and record whose it is.

        Raises the errors of `Client.submit`, those of `require_allowed`, and `TooManyJobs`.
        """
        info = None if caller.tenant.models is None else await self._client.queue_info()
        # In a thread, since a large sweep takes a second.
        checked = await self._run(partial(_checked, request, caller.tenant, info))
        for path, asset in checked.images.items():
            await self._require_own_image(caller, asset, path)
        job_id = str(uuid.uuid4())
        if idempotency_key is not None:  # two tenants, or two queues, may have the same key
            hashed = job_id_of(idempotency_key)
            job_id = job_id_of(f"{self._client.queue}/{caller.name}/{hashed}")
        entry = Entry(
            tenant=caller.name, api=caller.api, submitted=time.time(), labels=dict(labels or {})
        )
        most = caller.tenant.max_jobs
        found = await self._run(partial(self._index.reserve, job_id, entry, max_jobs=most))
        if found is False:
            message = f"{most} jobs of this API key are queued or running"
            raise TooManyJobs(message, {"max_jobs": most})
        if isinstance(found, Entry) and found.tenant != caller.name:
            raise Conflict.of(job_id)
        try:
            handle = await self._client.submit(checked, job_id=job_id, **options)
        except BrokerUnavailable:  # the job may run
            raise
        except ZloraError:
            if found is True:
                await self._run(partial(self._index.release, job_id, entry))
            raise
        if idempotency_key is not None:
            # The same request may have come twice at the same time, and one of the two have been
            # refused, and released.
            await self._run(partial(self._index.reserve, job_id, entry, max_jobs=None))
        return handle

    async def entry(self, caller: Caller, job_id: str) -> Entry:
        """Return what is known of a job; raise `JobUnknown` unless it is the caller's."""
        found = await self._run(partial(self._index.find, check_job_id(job_id)))
        if found is None or found.tenant != caller.name:
            raise JobUnknown(f"no job {job_id} is known", {"job_id": job_id})
        return found

    async def job(self, caller: Caller, job_id: str) -> AsyncJobHandle:
        """Return the handle of a job; raise `JobUnknown` unless it is the caller's."""
        await self.entry(caller, job_id)
        return self.handle(job_id)

    def handle(self, job_id: str) -> AsyncJobHandle:
        """Return the handle of a job that is the caller's by its entry."""
        return self._client.job(job_id)

    async def jobs(
        self, caller: Caller, *, labels: Mapping[str, str], limit: int, cursor: int
    ) -> Page:
        """Return a page of the caller's jobs, the newest first."""
        return await self._run(
            partial(self._index.page, caller.name, labels=labels, limit=limit, cursor=cursor)
        )

    async def result(self, caller: Caller, job_id: str, *, wait: float = 0) -> GenerateResult:
        """Wait up to `wait` seconds for a result; raise the errors of `JobHandle.result`."""
        handle = await self.job(caller, job_id)
        return await handle.result(timeout=wait)

    async def cancel(self, caller: Caller, job_id: str) -> Cancellation:
        """Cancel a job."""
        return await (await self.job(caller, job_id)).cancel()

    async def image_bytes(self, image: ImageRef) -> bytes:
        """Return the bytes of an image; raise `ImageUnavailable`."""
        read = partial(images.read, image, hosts=self._image_hosts)
        return await asyncio.get_running_loop().run_in_executor(self._slow, read)

    async def upload(self, caller: Caller, data: bytes) -> Asset:
        """Keep an image of the caller for a day, for the `image` and `mask` of requests.

        Raises `BodyTooLarge` beyond 8 MiB, and `InvalidRequest` for no bytes.
        """
        if not data:
            raise invalid("$", "no bytes", "Expected the bytes of an image")
        if len(data) > uploads.MAX_BYTES:
            message = f"the image has more than {uploads.MAX_BYTES} bytes"
            raise BodyTooLarge(message, {"max_bytes": uploads.MAX_BYTES})
        sha256 = await self._run(partial(self._uploads.add, caller.name, data))
        return Asset(url=f"upload:{sha256}")

    async def inspect(self, caller: Caller, file: object) -> LoraInfo:
        """Describe the LoRA at an address, an `Asset`, by its header.

        Raises `InvalidRequest`, with a `path` below `$.file`, or a `LoraError`.
        """
        try:
            request = parse_request({"prompt": "", "loras": [{"file": file}]})
        except InvalidRequest as error:
            path = str(error.details["path"]).replace("$.loras[0].file", "$.file")
            raise InvalidRequest(error.message, {**error.details, "path": path}) from None
        require_allowed(request, caller.tenant, None)

        def inspect() -> LoraInfo:
            return self._make_preflight().inspect(request.loras[0].file)

        return await asyncio.get_running_loop().run_in_executor(self._slow, inspect)

    async def queue_info(self, caller: Caller) -> QueueInfo | None:
        """Return what the queue serves and the caller may use, None if that is not known."""
        info = await self._client.queue_info()
        return None if info is None else allowed_info(info, caller.tenant)

    async def unfinished(self) -> int:
        """Return the number of jobs in the queue, of all tenants, that have not ended."""
        return await self._run(self._index.unfinished)

    async def require_broker(self) -> None:
        """Raise `BrokerUnavailable` unless Redis answers, or has answered within a second."""
        async with self._looking:
            if time.monotonic() - self._looked >= _READY_SECONDS:
                await self.unfinished()
                self._looked = time.monotonic()

    async def _require_own_image(self, caller: Caller, asset: Asset, path: str) -> None:
        """Raise `InvalidRequest` for an image of another tenant's job or upload."""
        if asset.upload is not None:
            if not await self._run(partial(self._uploads.has, caller.name, asset.upload)):
                expected = "Expected an image that you have uploaded in the last day"
                raise invalid(f"$.{path}", asset.address, expected)
        elif (found := asset.job_image) is not None:
            try:
                await self.entry(caller, found[0])
            except JobUnknown:
                expected = "Expected an image of your jobs"
                raise invalid(f"$.{path}", asset.address, expected) from None

    async def _run(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _checked(
    request: GenerateRequest | dict[str, Any], tenant: Tenant, info: QueueInfo | None
) -> GenerateRequest:
    found = parse_request(request)
    require_allowed(found, tenant, info)
    return found
