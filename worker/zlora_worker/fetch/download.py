"""One file on its way: what a source may use to bring it."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

from requests import Response
from zlora.errors import LoraCorrupt
from zlora.http.client import HttpClient

from zlora_worker.fetch.transfer import Fetched, Transfer, copy
from zlora_worker.s3_client import SourceBuckets
from zlora_worker.settings import Settings

_VERSION: Final = re.compile(
    r'(W/)?"[\x21\x23-\x7e]{0,200}"'
)  # an ETag (RFC 9110, 8.8.3) that can be sent back


@dataclass(frozen=True, kw_only=True)
class Download:
    """One file on its way. `known` is what its address had last, `have` tells a file that is here by its sha256."""

    settings: Settings
    web: HttpClient
    buckets: Callable[[], SourceBuckets]
    sink: Transfer
    known: Fetched | None
    have: Callable[[str], Fetched | None]

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.sink.name

    def get(
        self, url: str, *, headers: Mapping[str, str] | None = None, promised: str = ""
    ) -> Fetched:
        """The file at a URL, or the one that is here where the server says that it has not changed.

        Raises `LoraCorrupt` where the bytes are not those of the sha256 that was `promised`.
        """
        version = (
            self.known.version if self.known and not promised else None
        )  # a digest says more than a version
        asking = {"If-None-Match": version} if version else {}
        return self._get(url, {**(headers or {}), **asking}, promised=promised)

    def get_anew(
        self, url: str, headers: Mapping[str, str], *, promised: str, digest_header: str
    ) -> Fetched:
        """The file at a URL, whatever was there last: for a server whose word for a version may be another tenant's.

        Raises `LoraCorrupt` as `get` does; what the server itself promises with the bytes, in `digest_header`, is the
        later word.
        """
        return self._get(url, headers, promised=promised, digest_header=digest_header)

    def _get(
        self, url: str, headers: Mapping[str, str], *, promised: str, digest_header: str = ""
    ) -> Fetched:
        statuses = (
            (HTTPStatus.OK, HTTPStatus.NOT_MODIFIED)
            if "If-None-Match" in headers
            else (HTTPStatus.OK,)
        )
        with self.web.open(url, name=self.name, headers=headers, statuses=statuses) as answer:
            if self.known and answer.status_code == HTTPStatus.NOT_MODIFIED:
                return self.known
            if not answer.history:  # where it was sent on, this one is not who promises
                promised = answer.headers.get(digest_header, promised).lower()
            fetched = copy(answer, self.sink, version=_version(answer), cut=self.web.session.cut)
        if promised and fetched.sha256 != promised:
            raise LoraCorrupt(
                f"{self.name}: the hub names sha256 {promised[:64]}, the bytes have {fetched.sha256}"
            )
        return fetched

    @contextmanager
    def head(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        statuses: tuple[int, ...] = (HTTPStatus.OK,),
        redirects: bool,
    ) -> Iterator[Response]:
        """What is told of a file."""
        with self.web.open(
            url,
            name=self.name,
            method="HEAD",
            headers=headers,
            statuses=statuses,
            redirects=redirects,
        ) as answer:
            yield answer


def _version(answer: Response) -> str | None:
    version = answer.headers.get("ETag", "")
    return version if _VERSION.fullmatch(version) else None
