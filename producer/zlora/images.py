"""Fetches the images of a result: exactly the bytes that the result names, or an error."""

import base64
import hashlib
import http.client
import time
from collections.abc import Collection, Generator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from zlora import config
from zlora.errors import ImageUnavailable
from zlora.files import open_regular, write_atomically
from zlora.redaction import printable, without_secrets
from zlora.schema import CONTENT_TYPES, GenerateResult, ImageRef, check_job_id

if TYPE_CHECKING:  # urllib.request takes 40 ms to import, and most programs fetch no images
    from urllib.request import OpenerDirector

_CHUNK: Final = 65_536  # bytes


def save(
    result: GenerateResult, folder: Path, *, hosts: Collection[str] | None = None
) -> list[Path]:
    """Write the images to `<folder>/<job id>-<index>.<format>` and return the files in order.

    The contact sheet of a sweep follows them, as `<folder>/<job id>-sheet.jpeg`. `hosts` are those
    of `read`. Makes the folder, replaces files, and writes each file whole or not at all. Raises
    `ImageUnavailable`, and `OSError` if the folder cannot be written.
    """
    files = paths(result, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for path, image in zip(files, _all_images(result).values(), strict=True):
        try:
            data = read(image, hosts=hosts)
        except ImageUnavailable as error:
            error.add_details(job_id=result.job_id)
            raise
        write_atomically(path, data)
    return files


def paths(result: GenerateResult, folder: Path) -> list[Path]:
    """Return the files that `save` writes; raise `ImageUnavailable` for an unknown media type."""
    job_id = check_job_id(result.job_id)  # it becomes a part of a path
    found = []
    for name, image in _all_images(result).items():
        if image.content_type not in CONTENT_TYPES:
            key, content_type = printable(image.key), printable(image.content_type)
            raise _unavailable(image, f"{key} is not an image but {content_type}")
        found.append(folder / f"{job_id}-{name}.{CONTENT_TYPES[image.content_type]}")
    return found


def _all_images(result: GenerateResult) -> dict[str, ImageRef]:
    """Return the images, and the contact sheet of a sweep, by the last part of their names."""
    found = {str(index): image for index, image in enumerate(result.images)}
    return found if result.sheet is None else {**found, "sheet": result.sheet}


def read(
    image: ImageRef,
    *,
    timeout: float = 30.0,
    deadline: float = 300.0,
    hosts: Collection[str] | None = None,
) -> bytes:
    """Return the bytes of an image from its `data_uri`, else from its `url`.

    The URL may be `http`, `https`, `file` or `data`; the first two use the proxies of the
    environment. With `hosts`, each a `host` or `host:port` in lower case, no other host is opened,
    also by a redirect. A server may be silent for `timeout` seconds; the whole image may take
    `deadline` seconds. Raises `ImageUnavailable`, also if the bytes do not have the size and the
    sha256 that the result names.
    """
    end = time.monotonic() + deadline
    address = image.data_uri or image.url
    if address is None:
        key = printable(image.key)
        raise _unavailable(image, f"{key} has no URL: the request or the operator chose keys only")
    shown = without_secrets(address)
    if address.startswith("data:"):
        shown = "the inline image"
    data = bytearray()
    try:
        with closing(_chunks(address, timeout, hosts)) as chunks:
            for chunk in chunks:
                data += chunk
                if len(data) > image.size or time.monotonic() > end:
                    break
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _unavailable(image, f"{shown}: {_reason(error)}") from None
    if len(data) != image.size or hashlib.sha256(data).hexdigest() != image.sha256:
        reason = "the bytes there are not those of the image"
        if time.monotonic() > end:
            reason = f"takes more than {deadline:g} s"
        raise _unavailable(image, f"{shown}: {reason}")
    return bytes(data)


def decode_data_uri(uri: str) -> bytes:
    """Return the bytes of a data URI (RFC 2397); raise `ValueError` for wrong base64.

    White space in base64 is left out, as browsers do.
    """
    media_type, _, data = uri.partition(",")
    if media_type.endswith(";base64"):
        return base64.b64decode("".join(data.split()), validate=True)
    return unquote_to_bytes(data)


def _chunks(address: str, timeout: float, hosts: Collection[str] | None) -> Generator[bytes]:
    match urlsplit(address).scheme:
        case "data":
            yield decode_data_uri(address)
        case "file":
            with open_regular(Path(unquote(urlsplit(address).path))) as file:
                while chunk := file.read(_CHUNK):
                    yield chunk
        case "http" | "https":
            with _opener(hosts).open(address, timeout=timeout) as answer:
                while chunk := answer.read1(_CHUNK):  # `read` would wait for a full chunk
                    yield chunk
        case scheme:
            raise OSError(None, f"images are not fetched by {printable(scheme)}")


def _opener(hosts: Collection[str] | None) -> "OpenerDirector":
    """Return an opener of http and https only; `build_opener` would open files and FTP too."""
    from urllib import request

    class AllowedHosts(request.BaseHandler):
        """Sees each request before it is sent."""

        def http_request(self, sent: request.Request) -> request.Request:
            parts = urlsplit(sent.full_url)
            host = (parts.hostname or "", parts.netloc.rpartition("@")[2].lower())
            if hosts is not None and not set(host) & set(hosts):
                raise OSError(None, f"{config.IMAGE_HOSTS} does not list its host")
            return sent

        https_request = http_request

    opener = request.OpenerDirector()
    for handler in (
        AllowedHosts,
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
    """Return a phrase for an error without its address, which may be signed."""
    from urllib.error import HTTPError

    if isinstance(error, HTTPError):
        error.close()
        return f"the server answers {error.code}"
    if isinstance(error, FileNotFoundError):
        return "there is no such file on this machine"
    reason = getattr(error, "strerror", None) or getattr(error, "reason", None)  # of `URLError`
    return str(getattr(reason, "strerror", None) or reason or type(error).__name__)


def _unavailable(image: ImageRef, message: str) -> ImageUnavailable:
    return ImageUnavailable(message, {"key": image.key})
