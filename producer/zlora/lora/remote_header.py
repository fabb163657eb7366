"""Reads the header of a safetensors file on a server by HTTP ranges, without its tensors."""

import re
from http import HTTPStatus
from typing import Final, NamedTuple

from zlora.errors import NotSafetensors
from zlora.http.client import HttpClient, HttpError, byte_count
from zlora.lora.safetensors_header import MAX_HEADER, Header, SafetensorsStream

_FIRST_RANGE: Final = 2**18  # bytes; few headers have more
_MAX_RANGES: Final = 8  # of one header; two are enough if a server sends what is requested
_CHUNK: Final = 2**16  # bytes; as much may be read beyond the header
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")
_STATUSES: Final = (
    HTTPStatus.OK,
    HTTPStatus.PARTIAL_CONTENT,
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
)


class RemoteHeader(NamedTuple):
    """Header of a remote file, and the file's size in bytes."""

    header: Header
    size: int


def read_remote_header(client: HttpClient, url: str, *, name: str) -> RemoteHeader:
    """Return the header of the file at `url`; `name` stands for the URL in messages.

    Uses one range or few. If the server ignores ranges, the connection is closed after the header.
    Raises `HttpError`, and `NotSafetensors` with the reason.
    """
    stream = SafetensorsStream()
    try:
        for _ in range(_MAX_RANGES):
            size = _read_range(client, url, stream)
            if stream.header is not None:
                break
        else:
            raise HttpError("the server sends less than requested")
    except NotSafetensors as error:
        raise NotSafetensors(f"{name}: {error}", error.details) from None
    if size not in (None, stream.total):
        raise NotSafetensors(
            f"{name}: damaged safetensors file: {size} bytes, but its header names {stream.total}"
        )
    return RemoteHeader(stream.header, stream.total)


def _read_range(client: HttpClient, url: str, stream: SafetensorsStream) -> int | None:
    """Feed the next range to `stream`; return the size of the whole file if the server says it."""
    first = stream.received
    last = _FIRST_RANGE - 1
    if first:
        last = MAX_HEADER + 7
    with client.open(
        url, headers={"Range": f"bytes={first}-{last}"}, statuses=_STATUSES
    ) as response:
        if response.status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise stream.incomplete()
        response.require_identity()
        content_range = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        is_whole = response.status == HTTPStatus.OK
        if is_whole and not first:
            size = response.content_length
        elif not is_whole and content_range and int(content_range[1]) == first:
            size = byte_count(content_range[2])  # RFC 9110, 14.4
        else:
            raise HttpError("the server answers with another range than requested")
        while stream.header is None and (chunk := response.read(_CHUNK)):
            stream.feed(chunk)
    if stream.header is not None:
        return size
    received = stream.received - first
    length = response.content_length
    if length is not None and received < length:
        raise HttpError(f"broken off after {received} of {length} bytes", transient=True)
    if is_whole or stream.received == size:
        raise stream.incomplete()
    if not received:
        raise HttpError("the server answers with an empty range")
    return size
