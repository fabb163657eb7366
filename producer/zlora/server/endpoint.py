"""A request as handlers see it, and the table from which routes and OpenAPI are made."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from typing import Any, Final, NamedTuple, TypeVar, get_origin

import msgspec
from msgspec import Struct, structs
from starlette.datastructures import FormData
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from zlora.async_client import AsyncJobHandle
from zlora.errors import InvalidRequest, ZloraError
from zlora.images import decode_data_uri
from zlora.queue_info import QueueInfo
from zlora.schema import Asset, GenerateResult, invalid
from zlora.server import problems
from zlora.server.service import Caller, Service

S = TypeVar("S", bound=Struct)
T = TypeVar("T")

MAX_BODY: Final = 2**20  # bytes; the largest request that the queue accepts has half of it
MAX_IMAGE_BODY: Final = 24 * 2**20  # bytes: two images of 8 MiB in base64, and other fields
CLOSING: Final = "closing"  # name of an event in the state of the application (ASGI lifespan)
_MARKS: Final = (b",", b"[", b"{")  # before each value of a JSON document, or before its name
_MAX_MARKS: Final = 65_536  # in a JSON document; a large sweep has thousands
_MARK_SIZE: Final = 256  # bytes in memory of a name and its value, an empty object, at most
_WIDE: Final = 4  # bytes of each letter of a text with one letter beyond 65,535
_MAX_HEADER: Final = 1000  # characters of a header that is an idempotency key or an event's id


class Call:
    """One request to an endpoint, for its caller."""

    def __init__(
        self, request: Request, caller: Caller, service: Service, hold: Callable[[int], None]
    ) -> None:
        """Take `hold`, which counts bytes in memory until the request ends."""
        self.request, self.caller, self.service, self._hold = request, caller, service, hold

    @property
    def job_id(self) -> str:
        """The job in the path."""
        return str(self.request.path_params["job_id"])

    @property
    def base_url(self) -> str:
        """URL of this server, as the operator or else the request names it."""
        return self.service.base_url or str(self.request.base_url).rstrip("/")

    async def queue_info(self) -> QueueInfo:
        """Return what the queue serves and the caller may use; raise `NotFound` if unknown."""
        if (info := await self.service.queue_info(self.caller)) is None:
            raise problems.NotFound("no worker of this queue has run in the last hour")
        return info

    async def result(self, handle: AsyncJobHandle) -> GenerateResult:
        """Wait for the result of a job; raise the errors of `JobHandle.result`.

        If the client goes before that, the job is cancelled, and `ClientDisconnect` raised.
        """
        try:
            return await self.unless_gone(handle.result())
        except ClientDisconnect:
            await handle.cancel()
            raise

    async def body(self) -> bytes:
        """Return the body, once.

        Raises `BodyTooLarge`, `BodyTimeout`, `Overloaded` or `TooManyRequests`.
        """
        # `Request.body` would keep all of it while the request waits for a job.
        return b"".join([piece async for piece in self.request.stream()])

    async def form(self, *, max_files: int, max_fields: int) -> FormData:
        """Return the form in the body, once; raise the errors of `body`."""
        return await self.request.form(max_files=max_files, max_fields=max_fields)

    async def document(self) -> Any:
        """Return the JSON body; raise `InvalidRequest`, and the errors of `body`."""
        body = await self.body()
        try:
            return self.decoded(body, "$")
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            details = {"path": "$", "expected": "a JSON document"}
            raise InvalidRequest(f"$: Expected a JSON document: {error}", details) from None

    def decoded(self, data: bytes, path: str) -> Any:
        """Return the JSON document in a part of the body, and count its memory.

        An empty object takes three bytes there, and a hundred times as many here. Raises
        `InvalidRequest` for too many values, `Overloaded`, `TooManyRequests`, and what msgspec
        raises for what is not JSON.
        """
        marks = sum(map(data.count, _MARKS))
        if marks > _MAX_MARKS:
            expected = f"Expected at most {_MAX_MARKS} commas and opening brackets"
            raise invalid(path, f"a text with {marks}", expected)
        is_wide = not data.isascii() or rb"\u" in data
        self._hold(marks * _MARK_SIZE + (_WIDE * len(data) if is_wide else 0))
        return msgspec.json.decode(data)

    async def upload(self, text: str, path: str, expected: str) -> Asset:
        """Keep the image of `decoded_image`; raise its errors and those of `Service.upload`."""
        data = await asyncio.to_thread(decoded_image, text, path, expected)
        return await self.service.upload(self.caller, data, path=path)

    @property
    def closing(self) -> asyncio.Event:
        """Event that is set when the server is about to end, and nothing must wait any longer."""
        found: asyncio.Event = self.request.scope["state"][CLOSING]
        return found

    async def unless_gone(self, waiting: Awaitable[T]) -> T:
        """Return the result of `waiting`.

        Raises `ClientDisconnect` if the client leaves first, `Overloaded` if the server ends.
        """
        gone = asyncio.ensure_future(self._gone())
        closing = asyncio.ensure_future(self.closing.wait())
        found = asyncio.ensure_future(waiting)
        tasks: set[asyncio.Future[Any]] = {found, gone, closing}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if found.done():
                return found.result()
            if gone.done():
                gone.result()  # raises for a body that is too large or too slow
                raise ClientDisconnect
            raise problems.Overloaded("the server ends: ask again")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _gone(self) -> None:
        """Return once the client has left; a body that nobody has read is dropped."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass

    def query(self, kind: type[S]) -> S:
        """Return the query of the URL; raise `InvalidRequest` for an unknown or wrong parameter."""
        given = self.request.query_params
        document: dict[str, Any] = {}
        for field in structs.fields(kind):
            values = given.getlist(field.name)
            if _is_list(field.type):
                document[field.name] = values
            elif len(values) > 1:
                raise invalid(f"?{field.name}", values, "Expected one value")
            elif values:
                document[field.name] = values[0]
        if unknown := set(given) - {field.name for field in structs.fields(kind)}:
            name, names = min(unknown), ", ".join(field.name for field in structs.fields(kind))
            expected = f"Expected no parameter but {names}" if names else "Expected no parameter"
            raise invalid(f"?{name[:80]}", given[name], expected)
        try:
            return msgspec.convert(document, kind, strict=False)
        except msgspec.ValidationError as error:
            expected, _, place = str(error).partition(" - at `$.")
            name = place.rstrip("`").partition("[")[0]
            raise invalid(f"?{name}", document[name], expected) from None

    def header(self, name: str) -> str | None:
        """Return a header of up to 1,000 characters; raise `InvalidRequest` for a longer one."""
        value = self.request.headers.get(name)
        if value is not None and len(value) > _MAX_HEADER:
            expected = f"Expected at most {_MAX_HEADER} characters"
            raise invalid(name, f"{len(value)} characters", expected)
        return value


class NoOptions(Struct, frozen=True, kw_only=True):
    """A query without parameters."""


Handler = Callable[[Call], Awaitable[Response]]


class Endpoint(NamedTuple):
    """One method of one path."""

    method: str
    path: str
    handler: Handler
    query: type[Struct] | None = None
    """Type of the query; None for one without parameters."""
    body: Any = None
    """Type of the JSON body; None for none."""
    takes: str = ""
    """Media type of a body that is not JSON."""
    answer: Any = None
    """Type of the JSON answer; None for any document, or another media type."""
    statuses: tuple[int, ...] = (HTTPStatus.OK,)
    """Statuses of answers that are no error; those above 202 have no body."""
    headers: tuple[str, ...] = ()
    """Headers of the request that have a meaning only here."""
    media_type: str = "application/json"
    is_public: bool = False
    """True if no API key is needed."""
    max_body: int = MAX_BODY


class Api(NamedTuple):
    """Endpoints that answer errors in one way."""

    name: str
    endpoints: Sequence[Endpoint]
    error: Callable[[ZloraError], Response] = problems.answer
    takes_basic: bool = False
    """True if an API key may also be the password of HTTP Basic (RFC 7617)."""


def decoded_image(text: str, path: str, expected: str) -> bytes:
    """Return the bytes of an image in a data URI or in bare base64; raise `InvalidRequest`."""
    try:
        data = decode_data_uri(text if text.startswith("data:") else f"data:;base64,{text}")
    except ValueError:  # also for letters that ASCII lacks
        data = b""
    if not data:
        raise invalid(path, f"a text of {len(text)} characters", expected)
    return data


def json_answer(
    document: object, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Return an answer with a JSON document, which no cache keeps."""
    return Response(
        problems.encoded(document),
        status,
        {"Cache-Control": "no-store", **(headers or {})},
        media_type="application/json",
    )


def _is_list(kind: Any) -> bool:
    return get_origin(kind) is tuple
