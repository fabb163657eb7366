"""Bring a result's pictures here: their bytes as the result names them, or nothing."""

import base64
import hashlib
import http.client
import os
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from zlora.errors import ImageUnavailable
from zlora.redaction import printable, without_secrets
from zlora.schema import GenerateResult, ImageRef, check_job_id

if TYPE_CHECKING:  # 40 ms, and most programs leave pictures where they are
    from urllib.request import OpenerDirector

_ENDINGS: Final = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}
_PIECE: Final = 65_536  # bytes


def save(result: GenerateResult, folder: Path) -> list[Path]:
    """Write the pictures as `<folder>/<job id>-<index>.<format>`, each at once or not; returns the files in order.

    The folder is made where it is not there; what has such a name is replaced. Raises `ImageUnavailable`, and
    `OSError` where the folder cannot be written.
    """
    files = paths(result, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path, image in zip(files, result.images, strict=True):
        _write(path, _of(result, image))
    return files


def paths(result: GenerateResult, folder: Path) -> list[Path]:
    """Where `save` writes a result's pictures; raises `ImageUnavailable` where one is of no kind that is known."""
    name = check_job_id(result.job_id)  # it becomes a path
    return [
        folder / f"{name}-{index}.{_ending(image)}" for index, image in enumerate(result.images)
    ]


def _of(result: GenerateResult, image: ImageRef) -> bytes:
    try:
        return read(image)
    except ImageUnavailable as error:
        error.add_details(job_id=result.job_id)
        raise


def read(image: ImageRef, *, timeout: float = 30.0, deadline: float = 300.0) -> bytes:
    """The bytes of a picture: from its `data_uri`, else from its `url` (`http`, `https`, `file` or `data`).

    They have the size and the sha256 that the result names. A server may be silent for `timeout` seconds, and all of
    the picture may take `deadline` seconds. Raises `ImageUnavailable`.
    """
    end = time.monotonic() + deadline
    address = image.data_uri or image.url
    if address is None:
        raise _unavailable(
            image,
            f"{printable(image.key)} has no URL: its request or the operator asks for keys alone",
        )
    with closing(_pieces(image, address, timeout)) as pieces:
        data = b"".join(_up_to(image.size, pieces, end=end))
    if len(data) != image.size or hashlib.sha256(data).hexdigest() != image.sha256:
        late = time.monotonic() > end
        why = (
            f"it takes more than {deadline:g} s"
            if late
            else "the bytes there are not those of the picture"
        )
        raise _unavailable(image, f"{_shown(address)}: {why}")
    return data


def _pieces(image: ImageRef, address: str, timeout: float) -> Generator[bytes]:
    try:
        match urlsplit(address).scheme:
            case "data":
                yield _inline(address)
            case "file":
                with Path(unquote(urlsplit(address).path)).open("rb") as file:
                    yield from iter(lambda: file.read(_PIECE), b"")
            case "http" | "https":
                yield from _fetched(image, address, timeout)
            case scheme:
                raise _unavailable(
                    image, f"{_shown(address)}: no pictures come by {printable(scheme)}"
                )
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _unavailable(image, f"{_shown(address)}: {_reason(error)}") from None


def _fetched(image: ImageRef, address: str, timeout: float) -> Iterator[bytes]:
    from urllib.error import HTTPError

    try:
        with _web().open(address, timeout=timeout) as answer:
            yield from iter(
                lambda: answer.read1(_PIECE), b""
            )  # what has come: `read` waits for all of a piece
    except HTTPError as error:
        with error:
            raise _unavailable(
                image, f"{_shown(address)}: the server answers {error.code}"
            ) from None


def _up_to(size: int, pieces: Iterator[bytes], *, end: float) -> Iterator[bytes]:
    """The pieces until there are too many bytes, or it is too late."""
    for piece in pieces:
        size -= len(piece)
        yield piece
        if size < 0 or time.monotonic() > end:
            return


def _inline(address: str) -> bytes:
    """The bytes of a data URI (RFC 2397); raises `ValueError`."""
    kind, _, data = address.partition(",")
    return (
        base64.b64decode(data, validate=True)
        if kind.endswith(";base64")
        else unquote_to_bytes(data)
    )


def _web() -> "OpenerDirector":
    """What opens http and https alone, wherever it is sent on to; `build_opener` would open files and FTP too."""
    from urllib import request

    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPRedirectHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        request.UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def _reason(error: Exception) -> str:
    """Why, without an address, which may be signed; `URLError` is a kind of `OSError`."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file on this machine"
    reason = getattr(error, "strerror", None) or getattr(error, "reason", None)
    return str(getattr(reason, "strerror", None) or reason or type(error).__name__)


def _shown(address: str) -> str:
    return "the inline picture" if address.startswith("data:") else without_secrets(address)


def _unavailable(image: ImageRef, message: str) -> ImageUnavailable:
    return ImageUnavailable(message, {"key": image.key})


def _ending(image: ImageRef) -> str:
    if (ending := _ENDINGS.get(image.content_type)) is None:
        raise _unavailable(
            image, f"{printable(image.key)} is no picture but {printable(image.content_type)}"
        )
    return ending


def _write(path: Path, data: bytes) -> None:
    """All of it or nothing, with the rights that files of this user have."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_bytes(data)
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
