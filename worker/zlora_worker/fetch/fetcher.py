"""Bytes in: a LoRA's address to a file, by scheme. All but files of this machine come through the guard."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import BinaryIO, Final
from urllib.parse import urlsplit

from zlora.errors import LoraError, LoraNotAllowed
from zlora.http.client import HttpClient, with_retries
from zlora.lora.addresses import PUBLIC, reference
from zlora.redaction import without_secrets

from zlora_worker.fetch import sources
from zlora_worker.fetch.download import Download
from zlora_worker.fetch.transfer import Fetched, Limits, OnBytes, Transfer, anywhere, nobody
from zlora_worker.s3_client import SourceBuckets
from zlora_worker.settings import Settings

SCHEMES: Final[dict[str, Callable[[Download, str], Fetched]]] = {
    "https": sources.https,
    "http": sources.https,
    "s3": sources.s3,
    "hf": sources.hugging_face,
    "civitai": sources.civitai,
    "cozy": sources.cozy,
    "file": sources.file,
}


def nothing(_sha256: str) -> Fetched | None:
    """Has no file."""
    return None


class Fetcher:
    """Downloads LoRAs as the settings allow. One for the life of a thread."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        sites = {
            "s3": settings.source_endpoint,
            "hf": settings.hf_endpoint,
            "civitai": settings.civitai_url,
            "cozy": settings.hub_url,
        }
        # Each apart, so that neither a producer's address nor another source's redirect reaches what only this one may.
        own = {
            scheme: {urlsplit(site).netloc.lower()}
            for scheme, site in sites.items()
            if site and site not in PUBLIC
        }
        self._webs = {
            scheme: HttpClient(
                settings.allow_hosts | own.get(scheme, set()), certificates=settings.certificates
            )
            for scheme in SCHEMES
        }

    @property
    def asker(self) -> str:
        """A name for all that decides what this worker is told: its sites, and its credentials there."""
        told = self.settings
        ours = (
            (told.hub_url, told.hub_token, told.hub_tenant),
            (told.hf_endpoint, told.hf_token),
            (told.civitai_url, told.civitai_token),
            (
                told.source_endpoint,
                told.lora_s3_key,
                told.lora_s3_secret,
                told.lora_s3_token,
                told.lora_buckets,
            ),
            (told.lora_roots, sorted(told.allow_hosts)),
        )
        return hashlib.sha256(repr(ours).encode()).hexdigest()

    @cached_property
    def _buckets(self) -> SourceBuckets:
        return SourceBuckets(self.settings)

    def source(self, address: str) -> str:
        """What an address means, in its one spelling and fit for receipts."""
        name = without_secrets(address)
        with suppress(LoraError):  # a file that is here is not refused for it
            return without_secrets(self._reference(address, name))
        return name

    def close(self) -> None:
        """Give the connections back."""
        for web in self._webs.values():
            web.session.close()

    def fetch(
        self,
        address: str,
        file: BinaryIO,
        *,
        known: Fetched | None = None,
        have: Callable[[str], Fetched | None] = nothing,
        on_bytes: OnBytes = nobody,
        make_room: Callable[[int], None] = anywhere,
    ) -> Fetched:
        """Write what is at `address` to `file`, or nothing where it is here already, and tell what it is.

        `known` is what the address had last, `have` tells a file that is here by its sha256, `make_room` hears of a
        file's size before it is written. Raises a `LoraError` of the kind that fits, or what the callbacks raise; what
        it says holds no query and no credentials.
        """
        name, settings = without_secrets(address), self.settings
        address = self._reference(address, name)
        scheme = address.partition("://")[0]
        web = self._webs[scheme]
        limits = Limits(max_bytes=settings.lora_max_bytes, min_rate=settings.lora_min_rate)
        sink = Transfer(file, name=name, limits=limits, on_bytes=on_bytes, make_room=make_room)
        download = Download(
            settings=settings,
            web=web,
            buckets=lambda: self._buckets,
            sink=sink,
            known=known,
            have=have,
        )
        return with_retries(
            web,
            lambda: SCHEMES[scheme](download, address),
            name=name,
            seconds=settings.lora_deadline,
            on_pause=sink.wait,
        )

    def _reference(self, address: str, name: str) -> str:
        """The address, or the reference that it is a page of; raises `LoraNotAllowed` where there is no such scheme."""
        if address.partition("://")[0].lower() not in SCHEMES or not address.isprintable():
            raise LoraNotAllowed(f"{name}: not a URL of {', '.join(SCHEMES)}")
        return reference(address, hub=self.settings.hf_endpoint, civitai=self.settings.civitai_url)
