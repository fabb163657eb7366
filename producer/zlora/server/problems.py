"""Errors as HTTP answers: status codes, and problem documents (RFC 9457)."""

import json
import logging
import math
from http import HTTPStatus
from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct, UnsetType
from starlette.responses import Response

from zlora import errors
from zlora.errors import BrokerUnavailable, InvalidSetting, ZloraError

_TYPE: Final = "urn:zlora:error:"
_RETRY_AFTER: Final = 2  # seconds, for errors that do not say

logger = logging.getLogger(__name__)


class Unauthorized(ZloraError):
    """The API key is missing or unknown."""

    code = "unauthorized"


class Forbidden(ZloraError):
    """A web page of another site may have sent this request."""

    code = "forbidden"


class NotFound(ZloraError):
    """There is nothing at this address."""

    code = "not_found"


class MethodNotAllowed(ZloraError):
    """This address has other methods."""

    code = "method_not_allowed"


class NotHttp(ZloraError):
    """The request is not HTTP/1.1."""

    code = "not_http"


class HeadersTooLarge(ZloraError):
    """The address and the headers of the request have too many bytes."""

    code = "headers_too_large"


class NotSupported(ZloraError):
    """This service has nothing that could do this."""

    code = "not_supported"


class BodyTooLarge(ZloraError):
    """The body of the request has too many bytes."""

    code = "body_too_large"


class BodyTimeout(ZloraError):
    """The body of the request did not arrive in time."""

    code = "body_timeout"


class TooManyRequests(ZloraError):
    """This API key has made too many requests in the last minute, or has too many open ones.

    Details: `retry_after` in seconds, for the former.
    """

    code = "too_many_requests"
    retryable = True


class TooManyJobs(ZloraError):
    """This API key has too many jobs that have not ended.

    Details: `max_jobs`.
    """

    code = "too_many_jobs"
    retryable = True


class Overloaded(ZloraError):
    """The server has too many requests to answer, or their bodies take too much memory."""

    code = "overloaded"
    retryable = True


class Misconfigured(ZloraError):
    """A setting of the server, or its rights in Redis, are wrong: its log has the reason."""

    code = "misconfigured"
    retryable = True


STATUS: Final[dict[type[ZloraError], HTTPStatus]] = {
    errors.InvalidRequest: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.LoraError: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.LoraNotAllowed: HTTPStatus.FORBIDDEN,
    errors.OutOfMemory: HTTPStatus.UNPROCESSABLE_ENTITY,
    errors.LoraUnreachable: HTTPStatus.BAD_GATEWAY,
    errors.ImageUnavailable: HTTPStatus.BAD_GATEWAY,
    errors.CacheFull: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.StoreFailed: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.BrokerUnavailable: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.JobVanished: HTTPStatus.SERVICE_UNAVAILABLE,
    errors.ResultTimeout: HTTPStatus.CONFLICT,
    errors.Conflict: HTTPStatus.CONFLICT,
    errors.JobUnknown: HTTPStatus.NOT_FOUND,
    errors.JobRevoked: HTTPStatus.GONE,
    errors.JobExpired: HTTPStatus.GONE,
    errors.JobTimeout: HTTPStatus.GATEWAY_TIMEOUT,
    Unauthorized: HTTPStatus.UNAUTHORIZED,
    Forbidden: HTTPStatus.FORBIDDEN,
    NotFound: HTTPStatus.NOT_FOUND,
    MethodNotAllowed: HTTPStatus.METHOD_NOT_ALLOWED,
    NotHttp: HTTPStatus.BAD_REQUEST,
    HeadersTooLarge: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    NotSupported: HTTPStatus.NOT_IMPLEMENTED,
    BodyTooLarge: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    BodyTimeout: HTTPStatus.REQUEST_TIMEOUT,
    TooManyRequests: HTTPStatus.TOO_MANY_REQUESTS,
    TooManyJobs: HTTPStatus.TOO_MANY_REQUESTS,
    Overloaded: HTTPStatus.SERVICE_UNAVAILABLE,
    Misconfigured: HTTPStatus.SERVICE_UNAVAILABLE,
}
"""Statuses by class; a class that is not here has that of its parent, else 500."""


class Problem(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as a problem (RFC 9457), with the members of this project's errors."""

    type: str
    """`urn:zlora:error:` and the code."""
    title: str
    """What such errors are, in one sentence."""
    status: int
    """Status of the answer."""
    detail: str
    """What is wrong, for people."""
    code: str
    """Word for programs, which never changes."""
    retryable: bool
    """Whether the same request may succeed later."""
    path: str | UnsetType = UNSET
    """Place of the wrong value in the request, such as `$.loras[0].weight`."""
    value: Any = UNSET
    """The wrong value, without secrets."""
    expected: str | UnsetType = UNSET
    """Values that are possible there."""
    details: dict[str, Any] = {}
    """Other facts, by the code."""


def status_of(error: ZloraError) -> HTTPStatus:
    """Return the status of an error."""
    found = (STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)
    return next(found, HTTPStatus.INTERNAL_SERVER_ERROR)


def public(error: ZloraError) -> ZloraError:
    """Return what clients may know of an error, and log the rest.

    Errors of the connection to Redis and of settings name addresses, files and users of the server.
    """
    if isinstance(error, BrokerUnavailable):
        logger.warning("%s", error)
        known = {name: error.details[name] for name in ("job_id",) if name in error.details}
        return BrokerUnavailable("the queue does not answer", known)
    if isinstance(error, InvalidSetting):
        logger.error("%s", error)
        return Misconfigured()
    return error


def problem_of(error: ZloraError) -> Problem:
    """Return the document of an error."""
    details = dict(error.details)
    return Problem(
        type=_TYPE + error.code,
        title=type(error).summary(),
        status=status_of(error),
        detail=error.message,
        code=error.code,
        retryable=error.retryable,
        path=details.pop("path", UNSET),
        value=details.pop("value", UNSET),
        expected=details.pop("expected", UNSET),
        details=details,
    )


def headers_of(error: ZloraError) -> dict[str, str]:
    """Return the headers with which any API answers an error."""
    headers = {"Cache-Control": "no-store"}
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = str(error.details.get("allowed", ""))
    if status_of(error) in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
        headers["Retry-After"] = str(math.ceil(error.retry_after) or _RETRY_AFTER)
    return headers


def answer(error: ZloraError) -> Response:
    """Return the answer of the API `/v1` to an error."""
    return Response(
        encoded(problem_of(error)),
        status_of(error),
        headers_of(error),
        media_type="application/problem+json",
    )


def encoded(document: object) -> bytes:
    """Return a document as JSON.

    msgspec refuses half a surrogate pair, which the name of a file in an error may have.
    """
    try:
        return msgspec.json.encode(document)
    except UnicodeEncodeError:
        return json.dumps(msgspec.to_builtins(document)).encode()
