"""The ASGI application.

A request passes the middleware of `make_app`, and its route leads to an `_EndpointApp`, which finds
out whom the request comes from, calls the handler, and answers its error in the form of the API.
"""

import asyncio
import base64
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import cache
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
from starlette.types import Receive, Scope, Send

from zlora.async_client import AsyncClient
from zlora.broker.uploads import Uploads
from zlora.errors import InternalError, ZloraError
from zlora.server import metrics, openapi, page, problems
from zlora.server.a1111 import A1111
from zlora.server.endpoint import CLOSING, Api, Call, Endpoint, NoOptions, json_answer
from zlora.server.fal import FAL
from zlora.server.fal import HEADERS as FAL_HEADERS
from zlora.server.job_owners import JobOwners
from zlora.server.middleware import Headers, LocalOnly
from zlora.server.native import NATIVE
from zlora.server.open_requests import OpenRequest, OpenRequests
from zlora.server.openai_images import OPENAI
from zlora.server.rate_limits import RateLimits
from zlora.server.service import Caller, Service
from zlora.server.settings import ServerSettings
from zlora.server.tenants import LOCAL, ApiKeys, Tenant

APIS: Final[tuple[Api, ...]] = (NATIVE, FAL, OPENAI, A1111)
_ANONYMOUS: Final = Caller("", Tenant(), "")  # no job is this tenant's
_CLIENT_GONE: Final = 499  # nginx's status for its log; no client reads the answer

logger = logging.getLogger(__name__)


def make_app(settings: ServerSettings) -> Starlette:
    """Return the application of these settings."""
    server = Server(settings)
    routes = [
        Route(endpoint.path, _EndpointApp(server, api, endpoint), methods=[endpoint.method])
        for api in (*APIS, SERVER)
        for endpoint in api.endpoints
    ]
    routes += page.routes()
    middleware = [Middleware(Headers)]
    if settings.keys is None:
        middleware.append(Middleware(LocalOnly, origins=settings.origins))
    if settings.origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=sorted(settings.origins),
                allow_methods=["GET", "POST", "PUT", "DELETE"],
                allow_headers=["*"],  # clients of OpenAI's and fal's have a dozen of their own
                expose_headers=["Location", "Retry-After", *FAL_HEADERS],
            )
        )
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={HTTPException: _http_error},
        lifespan=server.lifespan,
    )
    app.router.redirect_slashes = False  # its redirect goes to whatever the header Host says
    return app


class _EndpointApp:
    """An endpoint as an ASGI application."""

    def __init__(self, server: "Server", api: Api, endpoint: Endpoint) -> None:
        self._server, self._api, self._endpoint = server, api, endpoint
        self._labels = (api.name, endpoint.path, endpoint.method)
        for status in (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE):
            # An alert counts these: increase() does not see a first answer that begins a series.
            metrics.REQUESTS.labels(*self._labels, status.value)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start, endpoint = time.perf_counter(), self._endpoint
        with self._server.open_requests.request() as opened:
            request = Request(scope, opened.bounded(scope, receive, endpoint.max_body))
            answer = await self._answer(request, opened)
            metrics.SECONDS.labels(*self._labels).observe(time.perf_counter() - start)
            metrics.REQUESTS.labels(*self._labels, answer.status_code).inc()
            await answer(scope, receive, opened.in_pieces(send))

    async def _answer(self, request: Request, opened: OpenRequest) -> Response:
        server, caller = self._server, _ANONYMOUS
        try:
            if not self._endpoint.is_public:
                server.open_requests.require_room()
                caller = await server.caller(self._api, request, opened)
            call = Call(request, caller, server.service, opened.hold)
            if self._endpoint.query is None and not self._endpoint.is_public:
                call.query(NoOptions)
            answer = await self._endpoint.handler(call)
            opened.hold_answer(answer)
        except ZloraError as error:
            return self._api.error(problems.public(error))
        except ClientDisconnect:
            return Response(status_code=_CLIENT_GONE)
        except Exception:  # process boundary: one request must not end the others
            logger.exception("cannot answer %s %s", request.method, self._endpoint.path)
            return self._api.error(InternalError("the server failed; its log has the reason"))
        return answer


class Server:
    """The client, the API keys and the limits that all endpoints share."""

    def __init__(self, settings: ServerSettings) -> None:
        """Take the settings; raise `InvalidSetting` if the file of API keys cannot be read."""
        self.open_requests, self._origins = OpenRequests(), settings.origins
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
            JobOwners(connection.broker_url, connection.queue),
            Uploads(connection.broker_url, connection.queue),
            preflight=settings.preflight,
            image_hosts=settings.image_hosts,
            base_url=settings.base_url,
            needs_keys=settings.keys is not None,
        )

    @asynccontextmanager
    async def lifespan(self, _app: Starlette) -> AsyncGenerator[dict[str, asyncio.Event], None]:
        """Give requests the event that announces the end, and close all connections after it."""
        yield {CLOSING: asyncio.Event()}
        await self.service.close()
        self.rates.close()

    async def caller(self, api: Api, request: Request, opened: OpenRequest) -> Caller:
        """Return whom a request comes from.

        Raises `Unauthorized`, `TooManyRequests`, and the errors of `ApiKeys.find`.
        """
        if self.keys is None:
            return Caller(LOCAL, Tenant(), api.name)
        key = self._key(api, request)
        found = await asyncio.to_thread(self.keys.find, key) if key else None
        if found is None:
            message = "expected the header `Authorization: Bearer <API key>`, with a valid key"
            raise problems.Unauthorized(message)
        name, tenant = found
        opened.count_for(name)
        if tenant.requests_per_minute is not None:
            await self.rates.require(name, tenant.requests_per_minute)
        return Caller(name, tenant, api.name)

    def _key(self, api: Api, request: Request) -> str | None:
        """Return the API key of a request, None if it has none in a form that the API takes."""
        kind, _, given = request.headers.get("Authorization", "").partition(" ")
        if kind.lower() in ("bearer", "key"):
            return given.strip()
        # Browsers send what they know for Basic by themselves, also for pages of other sites.
        origin = request.headers.get("Origin")
        is_own = origin is None or origin.lower() in self._origins
        if kind.lower() != "basic" or not api.takes_basic or not is_own:
            return None
        try:
            return base64.b64decode(given.strip(), validate=True).decode().partition(":")[2]
        except ValueError:  # no base64, or no UTF-8
            return None


async def live(_call: Call) -> Response:
    """Say that the process answers."""
    return json_answer({"status": "ok"})


async def ready(call: Call) -> Response:
    """Say that the queue answers, else 503."""
    await call.service.require_broker()
    return json_answer({"status": "ok"})


async def show_metrics(_call: Call) -> Response:
    """Return metrics for Prometheus: nothing in them names a tenant, a job or a prompt."""
    return Response(generate_latest(metrics.REGISTRY), media_type=CONTENT_TYPE_LATEST)


async def show_openapi(_call: Call) -> Response:
    """Return this document."""
    return Response(_openapi(), media_type="application/json")


@cache
def _openapi() -> bytes:
    return msgspec.json.encode(openapi.document_of((*APIS, SERVER)))


SERVER: Final = Api(
    "server",
    (
        Endpoint("GET", "/health/live", live, is_public=True),
        Endpoint("GET", "/health/ready", ready, is_public=True),
        Endpoint("GET", "/metrics", show_metrics, is_public=True, media_type="text/plain"),
        Endpoint("GET", "/openapi.json", show_openapi, is_public=True),
    ),
)


async def _http_error(request: Request, error: Exception) -> Response:
    """Answer for a path or a method that no endpoint has."""
    assert isinstance(error, HTTPException)  # noqa: S101 - this handler is for that class
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{request.method} is not possible here, but {allowed}"
        return problems.answer(problems.MethodNotAllowed(message, {"allowed": allowed}))
    return problems.answer(problems.NotFound(f"there is nothing at {request.url.path[:200]}"))
