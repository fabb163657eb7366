"""Before a job is queued: whether its LoRAs exist and what they are, by a ranged read of their headers alone.

What only a worker can open is left to it: `s3://`, `cozy://` and `file://`, and what asks for a token, which a worker
may have. What the packages of the extra `preflight` do is imported where it is used, so that a producer stays light.
"""

import os
import re
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypeVar
from urllib.parse import urlsplit

from zlora import config
from zlora.errors import (
    InvalidSetting,
    LoraError,
    LoraForbidden,
    LoraMismatch,
    LoraNotAllowed,
    LoraUnreachable,
    NotSafetensors,
)
from zlora.lora import base_model
from zlora.lora.addresses import (
    CIVITAI,
    HUGGING_FACE,
    MAX_LISTING,
    PUBLIC,
    civitai_url,
    hub_file,
    reference,
)
from zlora.lora.base_model import LoraInfo
from zlora.lora.safetensors_header import MAX_HEADER, Arriving, Header
from zlora.redaction import without_secrets
from zlora.schema import Asset, GenerateRequest

if TYPE_CHECKING:
    from requests import Response

    from zlora.http.client import HttpClient

T = TypeVar("T")

_OPENED: Final = ("https", "http", "hf", "civitai")
_WORKERS: Final = ("s3", "cozy", "file")  # by its own settings and credentials
_PACKAGES: Final = ("requests", "ssrfguard", "huggingface_hub")
_SECONDS: Final = 30.0  # for one LoRA, redirects and further tries included
_FIRST_RANGE: Final = 2**18  # bytes; few headers have more
_MAX_RANGES: Final = 8  # of one header; two are enough where a server gives what it is asked for
_PIECE: Final = 2**16  # bytes; as much may be read beyond a header
_CONTENT_RANGE: Final = re.compile(r"bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18}|\*)")
_ANSWERS: Final = (
    HTTPStatus.OK,
    HTTPStatus.PARTIAL_CONTENT,
    HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
)
_TOKENS: Final = (
    HTTPStatus.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN,
)  # what a server answers to those who have none


class Preflight:
    """Looks at LoRAs from here, with a worker's guard and without its tokens. For any number of threads."""

    def __init__(
        self,
        allow_hosts: Iterable[str] = (),
        *,
        certificates: str = "",
        hub: str = HUGGING_FACE,
        civitai: str = CIVITAI,
    ) -> None:
        """`allow_hosts` and `certificates` are as in `zlora.http.ssrf_guard`, `hub` and `civitai` are base URLs.

        Raises `InvalidSetting` where the packages for it are not installed, `ValueError` where one is no base URL.
        """
        if missing := [name for name in _PACKAGES if not find_spec(name)]:
            advice = "pip install 'z-image-lora[preflight]'"
            raise InvalidSetting(
                f"preflight: {', '.join(missing)} not installed: {advice}", {"name": "preflight"}
            )
        self._hosts, self._certificates = frozenset(allow_hosts), certificates
        self._hub, self._civitai = config.web_url(hub), config.web_url(civitai)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] = os.environ) -> Self:
        """Read a worker's variables for LoRA sources; raises `InvalidSetting` that names the variable."""
        return cls(
            config.read_first(environ, config.ALLOW_HOSTS, parse=config.hosts),
            certificates=config.read_first(
                environ, config.CERTIFICATES, parse=config.existing_file
            ),
            hub=config.read_first(environ, *config.HUGGING_FACE, parse=config.web_url)
            or HUGGING_FACE,
            civitai=config.read_first(environ, config.CIVITAI, parse=config.web_url) or CIVITAI,
        )

    def inspect(self, lora: Asset | str) -> LoraInfo:
        """What the LoRA at an address is.

        Raises a `LoraError` of the kind that fits: `LoraNotAllowed` also for what only a worker opens, `LoraMismatch`
        for a file that no worker reads. What it says holds no query and no credentials.
        """
        address = lora if isinstance(lora, str) else lora.address
        name = without_secrets(address)
        found = self._look(address)
        base_model.require_lora(found.header, name)
        return base_model.describe(found.header, source=name, size=found.size)

    def check(self, request: GenerateRequest) -> None:
        """Raise a `LoraError`, with the `index` of the LoRA in its details, where one is not there or not fit.

        Another base than SDXL, by its tensors or by its own word, is a `LoraMismatch`.
        """
        for index, spec in enumerate(request.loras):
            try:
                self._require_fit(spec.file.address)
            except LoraError as error:
                error.add_details(index=index)
                raise

    def _require_fit(self, address: str) -> None:
        if _scheme(address) in _WORKERS:
            return
        try:
            header = self._look(address).header
        except LoraForbidden as error:
            if error.details.get("status") in _TOKENS:
                return
            raise
        name = without_secrets(address)
        base_model.require_lora(header, name)
        if (origin := base_model.told(header)) and origin.family != base_model.SDXL:
            raise LoraMismatch(
                f"{name}: {origin.clause}; the queue draws with {base_model.SDXL}",
                {"base": origin.family},
            )

    def _look(self, address: str) -> "_Found":
        """The header behind an address and the size of its file."""
        from zlora.http.client import HttpClient, with_retries

        name = without_secrets(address)
        address = self._reference(address, name)
        web = HttpClient(self._allowed(address), certificates=self._certificates)
        try:
            return with_retries(
                web,
                lambda: _read(web, self._url(web, address, name), name),
                name=name,
                seconds=_SECONDS,
                on_pause=lambda: None,
            )
        finally:
            web.session.close()

    def _reference(self, address: str, name: str) -> str:
        """The address, or the reference that it is a page of."""
        scheme = _scheme(address)
        if scheme in _WORKERS:
            raise LoraNotAllowed(f"{name}: only a worker opens {scheme}://")
        if scheme not in _OPENED or not address.isprintable():
            raise LoraNotAllowed(f"{name}: not a URL of {', '.join(_OPENED + _WORKERS)}")
        return reference(address, hub=self._hub, civitai=self._civitai)

    def _allowed(self, address: str) -> frozenset[str]:
        """The hosts that may be private: for a reference also the operator's own mirror of its site."""
        mirrors = {"hf": self._hub, "civitai": self._civitai}
        site = mirrors.get(_scheme(address), HUGGING_FACE)
        return self._hosts if site in PUBLIC else self._hosts | {urlsplit(site).netloc.lower()}

    def _url(self, web: "HttpClient", address: str, name: str) -> str:
        """Where the bytes are; a repository that is named without a file is asked for its list."""
        scheme = _scheme(address)
        if scheme == "civitai":
            return civitai_url(address, site=self._civitai)
        if scheme != "hf":
            return address
        file = hub_file(address, endpoint=self._hub)
        if not file.path:
            file = file.sole(
                web.text(file.listing_url(self._hub), name=name, max_bytes=MAX_LISTING), name=name
            )
        return file.url(self._hub)


class _Found(NamedTuple):
    header: Header
    size: int  # bytes of the file


def _scheme(address: str) -> str:
    return address.partition("://")[0].lower()


def _read(web: "HttpClient", url: str, name: str) -> _Found:
    """The header, in one range or few; a server that knows no ranges is left as soon as the header is there."""
    arriving, told, ranges = Arriving(), None, 0
    try:
        while arriving.header is None:
            if ranges == _MAX_RANGES:
                raise LoraUnreachable(f"{name}: the server gives less than it is asked for")
            told, ranges = _feed(arriving, web, url, name), ranges + 1
    except NotSafetensors as error:
        raise NotSafetensors(f"{name}: {error}", error.details) from None
    if told not in (None, arriving.total):
        reason = f"damaged safetensors file: {told} bytes where its header names {arriving.total}"
        raise NotSafetensors(f"{name}: {reason}")
    return _Found(arriving.header, arriving.total)


def _feed(arriving: Arriving, web: "HttpClient", url: str, name: str) -> int | None:
    """Read the next range, or its part up to the header's end; the bytes of the whole file, where the server tells.

    Raises `NotSafetensors` where the file is over before its header is.
    """
    from zlora.http.client import require_plain

    first = arriving.received
    last = (MAX_HEADER + 8 if first else _FIRST_RANGE) - 1
    with web.open(
        url, name=name, headers={"Range": f"bytes={first}-{last}"}, statuses=_ANSWERS
    ) as response:
        if response.status_code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise arriving.missing()
        require_plain(response, name)
        total = _told_total(response, first, name)
        _take(arriving, response, name)
        whole = response.status_code == HTTPStatus.OK or arriving.received == total
    if arriving.header is None and whole:
        raise arriving.missing()
    if arriving.received == first:
        raise LoraUnreachable(f"{name}: the server answers with an empty range")
    return total


def _take(arriving: Arriving, response: "Response", name: str) -> None:
    """The body up to the header's end; raises `TransientError` where it breaks off before."""
    from zlora.http.client import TransientError, number

    before, announced = arriving.received, number(response.headers.get("Content-Length", ""))
    while arriving.header is None and (piece := response.raw.read1(_PIECE, decode_content=False)):
        arriving.feed(piece)
    came = arriving.received - before
    if arriving.header is None and announced is not None and came < announced:
        raise TransientError(
            LoraUnreachable(f"{name}: broken off after {came} of {announced} bytes")
        )


def _told_total(response: "Response", first: int, name: str) -> int | None:
    """Bytes of the whole file (RFC 9110, 14.4); raises `LoraUnreachable` where the answer is another range."""
    from zlora.http.client import number

    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if response.status_code == HTTPStatus.PARTIAL_CONTENT and found and int(found[1]) == first:
        return number(found[2])
    if response.status_code == HTTPStatus.OK and not first:
        return number(response.headers.get("Content-Length", ""))
    raise LoraUnreachable(f"{name}: the server answers with another range than it was asked for")
