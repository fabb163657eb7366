"""Fetch the file at an address; remote servers only by the guarded client."""

from collections.abc import Callable
from contextlib import suppress
from typing import BinaryIO
from urllib.parse import urlsplit

from zlora.errors import LoraError, LoraNotAllowed
from zlora.http.client import HttpClient, HttpError
from zlora.lora.addresses import PUBLIC_SITES, canonical, hub_file, scheme_of
from zlora.lora.http_errors import lora_error
from zlora.lora.peft_config import CONFIG_FILE, MAX_CONFIG
from zlora.lora.safetensors_header import SafetensorsStream
from zlora.redaction import without_secrets

from zlora_worker.fetch.sources import SCHEMES, Download
from zlora_worker.fetch.transfer import DocumentStream, Fetched, Kind, Limits, OnBytes, Transfer
from zlora_worker.s3_client import SourceBuckets
from zlora_worker.settings import Settings


class Fetcher:
    """Fetches LoRAs as the settings allow. For one thread at a time."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._buckets = SourceBuckets(settings)
        own_sites = {
            "s3": settings.source_endpoint,
            "hf": settings.hf_endpoint,
            "civitai": settings.civitai_url,
            "cozy": settings.hub_url,
        }
        # One client for each scheme: the operator's own site is open to its scheme only, not to
        # URLs of requests and not to redirects of other sources.
        self._clients: dict[str, HttpClient] = {}
        for scheme in SCHEMES:
            hosts = set(settings.allow_hosts)
            site = own_sites.get(scheme)
            if site and site not in PUBLIC_SITES:
                hosts.add(urlsplit(site).netloc.lower())
            self._clients[scheme] = HttpClient(hosts, certificates=settings.certificates)

    def source(self, address: str) -> str:
        """Return the canonical spelling of an address without secrets, for receipts."""
        name = without_secrets(address)
        with suppress(LoraError):  # a cached file needs no valid address
            return without_secrets(self._canonical(address, name))
        return name

    def config_address(self, address: str) -> str | None:
        """Return the address of peft's configuration beside a file; None for other sources.

        Only the hub and folders of this machine have files that belong together.
        """
        address = self._canonical(address, without_secrets(address))
        scheme = scheme_of(address)
        if scheme == "file":
            return f"{address.rpartition('/')[0]}/{CONFIG_FILE}"
        if scheme == "hf":
            return hub_file(address, endpoint=self.settings.hf_endpoint).beside(CONFIG_FILE).address
        return None

    def fetch(
        self,
        address: str,
        file: BinaryIO,
        *,
        known: Fetched | None = None,
        have: Callable[[str], Fetched | None] | None = None,
        on_bytes: OnBytes | None = None,
        make_room: Callable[[int], None] | None = None,
        kind: Kind = "lora",
    ) -> Fetched:
        """Write the file at `address` to `file`, or write nothing if it is here already.

        `known` is what the address had the last time, `have` returns the cached file of a sha256,
        `make_room` is called with the file's size before the file is written. `kind` decides how
        many bytes it may have, and whether they are checked as they arrive. Raises a `LoraError`
        whose message has no secret, and everything that the callbacks raise.
        """
        name = without_secrets(address)
        address = self._canonical(address, name)
        scheme = scheme_of(address)
        settings, client = self.settings, self._clients[scheme]
        most = {
            "lora": settings.lora_max_bytes,
            "config": MAX_CONFIG,
            "image": settings.image_max_bytes,
        }
        limits = Limits(max_bytes=most[kind], min_rate=settings.lora_min_rate)
        transfer = Transfer(
            file,
            name=name,
            limits=limits,
            on_bytes=on_bytes,
            make_room=make_room,
            stream=SafetensorsStream if kind == "lora" else DocumentStream,
        )
        download = Download(
            settings=settings,
            client=client,
            buckets=self._buckets,
            transfer=transfer,
            known=known,
            have=have or (lambda _sha256: None),
        )
        try:
            return client.with_retries(
                lambda: SCHEMES[scheme](download, address),
                seconds=settings.lora_deadline,
                on_pause=transfer.report_pause,
                cut_errors=LoraError,
            )
        except HttpError as error:
            raise lora_error(error, name=name) from None

    def _canonical(self, address: str, name: str) -> str:
        if scheme_of(address) not in SCHEMES or not address.isprintable():
            raise LoraNotAllowed(
                f"{name}: not a URL of {', '.join(SCHEMES)}; a repository of Hugging Face is "
                "`owner/repo`, a name of the catalogue `lora://name`"
            )
        return canonical(address, hub=self.settings.hf_endpoint, civitai=self.settings.civitai_url)
