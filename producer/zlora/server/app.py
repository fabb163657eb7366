"""The ASGI application: routes of all APIs, API keys, and what holds for all answers."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Final

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zlora.async_client import AsyncClient
from zlora.broker.uploads import Uploads
from zlora.errors import BrokerUnavailable, InternalError, ZloraError
from zlora.server import metrics, openapi, page, problems
from zlora.server.endpoint import Api, Call, Endpoint, bounded, json_answer
from zlora.server.job_index import JobIndex
from zlora.server.native import NATIVE
from zlora.server.rate_limits import RateLimits
from zlora.server.service import Caller, Service
from zlora.server.settings import ServerSettings, is_local_name
from zlora.server.tenants import LOCAL, ApiKeys, Tenant

APIS: Final[tuple[Api, ...]] = (NATIVE,)
_CLIENT_GONE: Final = 499  # nginx's status for its log; nobody reads the answer
_HEADERS: Final = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}

logger = logging.getLogger(__name__)


class Server:
    """What the routes share."""

    def __init__(self, settings: ServerSettings) -> None:
        """Take the settings; raise `InvalidSetting` if the file of API keys cannot be read."""
        self.settings = settings
        connection = settings.connection
        self.keys = ApiKeys(settings.keys) if settings.keys else None
        self.rates = RateLimits(connection.broker_url, connection.queue)
        client = AsyncClient.from_url(
            connection.broker_url,
            result_backend=connection.result_backend,
            queue=connection.queue,
            prompts=connection.prompts,
            wait_replicas=connection.wait_replicas,
            preflight=settings.preflight,
        )
        self.service = Service(
            client,
            JobIndex(connection.broker_url, connection.queue),
            Uploads(connection.broker_url, connection.queue),
            preflight=settings.preflight,
            image_hosts=settings.image_hosts,
        )

    async def caller(self, api: Api, request: Request) -> Caller:
        """Return whom a request comes from.

        Raises `Unauthorized`, or `TooManyRequests`.
        """
        if self.keys is None:
            return Caller(LOCAL, Tenant(), api.name)
        kind, _, key = request.headers.get("Authorization", "").partition(" ")
        found = None
        if kind.lower() in ("bearer", "key") and key:
            found = await asyncio.to_thread(self.keys.find, key.strip())
        if found is None:
            message = "expected the header `Authorization: Bearer <API key>`, with a valid key"
            raise problems.Unauthorized(message)
        name, tenant = found
        if tenant.requests_per_minute is not None:
            await self.rates.require(name, tenant.requests_per_minute)
        return Caller(name, tenant, api.name)


def make_app(settings: ServerSettings) -> Starlette:
    """Return the application of these settings."""
    server = Server(settings)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncGenerator[None, None]:
        yield
        await server.service.close()
        server.rates.close()

    routes = [
        Route(endpoint.path, _Entry(server, api, endpoint), methods=[endpoint.method])
        for api in APIS
        for endpoint in api.endpoints
    ]
    routes += [
        *page.routes(),
        Route("/health/live", _live),
        Route("/health/ready", _ready(server)),
        Route("/metrics", _metrics),
        Route("/openapi.json", _openapi(APIS)),
    ]
    middleware = [Middleware(_Headers)]
    if settings.keys is None:
        middleware.append(Middleware(_LocalOnly, origins=settings.origins))
    if settings.origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=sorted(settings.origins),
                allow_methods=["GET", "POST", "PUT", "DELETE"],
                allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
                expose_headers=["Location", "Retry-After"],
            )
        )
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: _http_error, ZloraError: _zlora_error},
        lifespan=lifespan,
    )


class _Entry:
    """An endpoint as an ASGI application."""

    def __init__(self, server: Server, api: Api, endpoint: Endpoint) -> None:
        self._server, self._api, self._endpoint = server, api, endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, endpoint = time.perf_counter(), self._endpoint
        request = Request(scope, bounded(receive, endpoint.max_body))
        answer = await self._answer(request)
        labels = (self._api.name, endpoint.path, endpoint.method)
        metrics.SECONDS.labels(*labels).observe(time.perf_counter() - start)
        metrics.REQUESTS.labels(*labels, answer.status_code).inc()
        await answer(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        try:
            caller = await self._server.caller(self._api, request)
            return await self._endpoint.handler(Call(request, caller, self._server.service))
        except ZloraError as error:
            return self._api.error(error)
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        except Exception:  # process boundary: one request must not end the others
            logger.exception("cannot answer %s %s", request.method, self._endpoint.path)
            return self._api.error(InternalError("the server failed; its log has the reason"))


class _Headers:
    """Adds headers to all answers that do not have their own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.encode(), value.encode())
                        for name, value in _HEADERS.items()
                        if name.encode() not in own
                    ),
                ]
            await send(message)

        await self._app(scope, receive, send_with_headers)


class _LocalOnly:
    """Refuses requests that a web page of another site may have sent."""

    def __init__(self, app: ASGIApp, *, origins: frozenset[str]) -> None:
        self._app, self._origins = app, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Request(scope).headers
            origin = headers.get("Origin")
            is_known = (
                origin is None
                or is_local_name(origin.partition("://")[2])
                or bool({origin.lower(), "*"} & self._origins)
            )
            if not is_known or not is_local_name(headers.get("Host", "")):
                message = "without API keys only local names of this server may be used"
                await problems.answer(problems.Forbidden(message))(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _live(_request: Request) -> Response:
    return json_answer({"status": "ok"})


def _ready(server: Server) -> Callable[[Request], Awaitable[Response]]:
    async def ready(_request: Request) -> Response:
        try:
            await server.service.queue_info()
        except BrokerUnavailable as error:
            return problems.answer(error)
        return json_answer({"status": "ok"})

    return ready


async def _metrics(_request: Request) -> Response:
    return Response(generate_latest(metrics.REGISTRY), media_type=CONTENT_TYPE_LATEST)


def _openapi(apis: Sequence[Api]) -> Callable[[Request], Awaitable[Response]]:
    body = msgspec.json.encode(openapi.document(apis))

    async def document(_request: Request) -> Response:
        return Response(body, media_type="application/json")

    return document


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer for a path or a method that no endpoint has."""
    assert isinstance(error, HTTPException)  # noqa: S101 - this handler is for that class
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{request.method} is not possible here, but {allowed}"
        return problems.answer(problems.MethodNotAllowed(message, {"allowed": allowed}))
    return problems.answer(problems.NotFound(f"there is nothing at {request.url.path[:200]}"))


async def _zlora_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ZloraError)  # noqa: S101 - this handler is for that class
    return problems.answer(error)
