"""What all APIs do with jobs, each for one tenant."""

import asyncio
import base64
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Final, NamedTuple, TypeVar, Unpack

from msgspec import structs

from zlora import images
from zlora.async_client import AsyncClient, AsyncJobHandle
from zlora.broker.uploads import MAX_BYTES, Uploads
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
from zlora.server.job_owners import Entry, JobOwners, Page
from zlora.server.problems import BodyTooLarge, TooManyJobs, TooManyRequests
from zlora.server.tenants import Tenant, allowed_info, require_allowed, require_source

T = TypeVar("T")

_THREADS: Final = 8  # for Redis; a call takes less than a millisecond
_READY_SECONDS: Final = 1.0  # for which an answer of Redis counts
_FETCHES: Final = 8  # images whose bytes are fetched at the same time
_INSPECTIONS: Final = 8  # LoRAs whose headers are fetched at the same time, from any server
_INSPECTIONS_OF_TENANT: Final = 2
# How files of the formats that workers read begin.
_IMAGE: Final = re.compile(rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF.{4}WEBP", re.DOTALL)


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
        owners: JobOwners,
        uploads: Uploads,
        *,
        preflight: Callable[[], Preflight] = Preflight,
        image_hosts: frozenset[str] | None = None,
        base_url: str = "",
        needs_keys: bool = True,
    ) -> None:
        """Take `base_url` for links to the server, if requests do not name its host."""
        self.base_url, self._needs_keys = base_url, needs_keys
        self._client, self._owners, self._uploads = client, owners, uploads
        self._ready_lock, self._ready_at = asyncio.Lock(), -math.inf  # on the monotonic clock
        self._make_preflight, self._image_hosts = preflight, image_hosts
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="zlora-redis")
        # Apart, since a LoRA may be on a server that never answers, and images are not.
        self._fetching = ThreadPoolExecutor(_FETCHES, thread_name_prefix="zlora-fetch")
        self._inspecting = ThreadPoolExecutor(_INSPECTIONS, thread_name_prefix="zlora-inspect")
        self._inspections = Counter[str]()  # by tenant

    async def close(self) -> None:
        """Give connections and threads back."""
        await self._client.close()
        self._threads.shutdown(wait=False)
        self._fetching.shutdown(wait=False)
        self._inspecting.shutdown(wait=False)
        self._owners.close()
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
        found = await self._run(partial(self._owners.reserve, job_id, entry, max_jobs=most))
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
                await self._run(partial(self._owners.release, job_id, entry))
            raise
        if idempotency_key is not None:
            # The same request may have come twice at the same time, and one of the two have been
            # refused, and released.
            await self._run(partial(self._owners.reserve, job_id, entry, max_jobs=None))
        return handle

    async def entry(self, caller: Caller, job_id: str) -> Entry:
        """Return what is known of a job; raise `JobUnknown` unless it is the caller's."""
        found = await self._run(partial(self._owners.find, check_job_id(job_id)))
        if found is None or found.tenant != caller.name:
            raise JobUnknown(f"no job {job_id} is known", {"job_id": job_id})
        return found

    async def job(self, caller: Caller, job_id: str) -> AsyncJobHandle:
        """Return the handle of a job; raise `JobUnknown` unless it is the caller's."""
        await self.entry(caller, job_id)
        return self.handle(job_id)

    def handle(self, job_id: str) -> AsyncJobHandle:
        """Return a handle without a check: the caller has looked up the entry."""
        return self._client.job(job_id)

    async def jobs(
        self, caller: Caller, *, labels: Mapping[str, str], limit: int, cursor: int
    ) -> Page:
        """Return a page of the caller's jobs, the newest first."""
        return await self._run(
            partial(self._owners.page, caller.name, labels=labels, limit=limit, cursor=cursor)
        )

    async def result(self, caller: Caller, job_id: str, *, wait: float = 0) -> GenerateResult:
        """Wait up to `wait` seconds for a result; raise the errors of `JobHandle.result`."""
        handle = await self.job(caller, job_id)
        return await handle.result(timeout=wait)

    async def cancel(self, caller: Caller, job_id: str) -> Cancellation:
        """Cancel a job; raise `JobUnknown` unless it is the caller's."""
        return await (await self.job(caller, job_id)).cancel()

    async def image_bytes(self, image: ImageRef) -> bytes:
        """Return the bytes of an image; raise `ImageUnavailable`."""
        read = partial(images.read, image, hosts=self._image_hosts)
        return await asyncio.get_running_loop().run_in_executor(self._fetching, read)

    async def public_url(self, result: GenerateResult, index: int, *, base_url: str) -> str:
        """Return a URL of an image for clients that fetch without an API key.

        That is the result's own, else one of this server if it needs no keys, else a data URI.
        `base_url` is that of the server. Raises `ImageUnavailable`.
        """
        image = result.images[index]
        if (url := web_url(image)) is not None:
            return url
        if not self._needs_keys and image.url:
            return f"{base_url}/v1/jobs/{result.job_id}/images/{index}"
        return await self.data_uri(image)

    async def data_uri(self, image: ImageRef) -> str:
        """Return an image as a data URI; raise `ImageUnavailable`."""
        if image.data_uri is not None:
            return image.data_uri
        data = base64.b64encode(await self.image_bytes(image)).decode()
        return f"data:{image.content_type};base64,{data}"

    async def upload(self, caller: Caller, data: bytes, *, path: str = "$") -> Asset:
        """Keep an image of the caller for a day, for the `image` and `mask` of requests.

        Raises `BodyTooLarge` beyond 8 MiB, and `InvalidRequest`, with this `path`, for bytes of
        another format than workers read.
        """
        if len(data) > MAX_BYTES:
            message = f"the image has more than {MAX_BYTES} bytes"
            raise BodyTooLarge(message, {"max_bytes": MAX_BYTES})
        if not _IMAGE.match(data):
            raise invalid(path, f"{len(data)} bytes", "Expected the bytes of a PNG, JPEG or WebP")
        sha256 = await self._run(partial(self._uploads.add, caller.name, data))
        return Asset(url=f"upload:{sha256}")

    async def inspect(self, caller: Caller, file: object) -> LoraInfo:
        """Describe the LoRA at an address, an `Asset`, by its header.

        Raises `InvalidRequest`, with a `path` below `$.file`, a `LoraError`, or `TooManyRequests`.
        """
        try:
            request = parse_request({"prompt": "", "loras": [{"file": file}]})
        except InvalidRequest as error:
            path = str(error.details["path"]).replace("$.loras[0].file", "$.file")
            raise InvalidRequest(error.message, {**error.details, "path": path}) from None
        asset = request.loras[0].file
        require_source(asset, caller.tenant, "file")
        if self._inspections[caller.name] >= _INSPECTIONS_OF_TENANT:
            message = f"{_INSPECTIONS_OF_TENANT} inspections of this API key are going on"
            raise TooManyRequests(message)

        def inspect() -> LoraInfo:
            return self._make_preflight().inspect(asset)

        self._inspections[caller.name] += 1
        running = asyncio.get_running_loop().run_in_executor(self._inspecting, inspect)
        # Once the thread is free, which may be long after the client has left.
        running.add_done_callback(lambda _: self._inspections.subtract([caller.name]))
        return await asyncio.shield(running)

    async def queue_info(self, caller: Caller) -> QueueInfo | None:
        """Return what the queue serves and the caller may use, None if that is not known."""
        info = await self._client.queue_info()
        return None if info is None else allowed_info(info, caller.tenant)

    async def unfinished(self) -> int:
        """Return the number of jobs in the queue, of all tenants, that have not ended."""
        return await self._run(self._owners.unfinished)

    async def require_broker(self) -> None:
        """Raise `BrokerUnavailable` unless Redis answers, or has answered within a second."""
        async with self._ready_lock:
            if time.monotonic() - self._ready_at >= _READY_SECONDS:
                await self.unfinished()
                self._ready_at = time.monotonic()

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


def web_url(image: ImageRef) -> str | None:
    """Return the URL of an image, None for one that only this machine can open."""
    is_web = image.url is not None and image.url.startswith(("http://", "https://"))
    return image.url if is_web else None


def public_result(result: GenerateResult) -> GenerateResult:
    """Return a result without URLs such as `file:///...`, which name folders of the server."""
    images = tuple(structs.replace(image, url=web_url(image)) for image in result.images)
    sheet = result.sheet and structs.replace(result.sheet, url=web_url(result.sheet))
    return structs.replace(result, images=images, sheet=sheet)


def _checked(
    request: GenerateRequest | dict[str, Any], tenant: Tenant, info: QueueInfo | None
) -> GenerateRequest:
    found = parse_request(request)
    require_allowed(found, tenant, info)
    return found
