"""Checks LoRAs and embeddings before a job is queued: whether they exist, and their headers.

Addresses that need a worker's settings or files (`s3://`, `cozy://`, `file://`, `demo://`) and
files that require a token are left to the worker. The packages of the extra `preflight` are
imported when they are needed, so that the producer stays light.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from importlib.util import find_spec
from itertools import chain
from typing import TYPE_CHECKING, Final, Self, TypeVar
from urllib.parse import urlsplit

from zlora import config
from zlora.errors import (
    InvalidSetting,
    LoraError,
    LoraForbidden,
    LoraMismatch,
    LoraNotAllowed,
    naming_file,
)
from zlora.lora import base_model, key_names
from zlora.lora.addresses import (
    CATALOGUE,
    CIVITAI,
    HUGGING_FACE,
    MAX_LISTING,
    PUBLIC_SCHEMES,
    PUBLIC_SITES,
    WORKER_SCHEMES,
    canonical,
    civitai_url,
    hub_file,
    scheme_of,
)
from zlora.lora.base_model import LoraInfo
from zlora.lora.embedding_header import family_of, is_embedding, read_embeddings
from zlora.redaction import without_secrets
from zlora.schema import Asset, GenerateRequest, LoraSpec

if TYPE_CHECKING:
    from zlora.lora.remote_header import RemoteHeader
    from zlora.lora.safetensors_header import Header

T = TypeVar("T")

_PACKAGES: Final = ("requests", "ssrfguard", "huggingface_hub")
_SECONDS: Final = 30.0  # for one LoRA, redirects and further tries included
_TOKEN_REQUIRED: Final = (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)


class Preflight:
    """Checks LoRAs with the guard of a worker, without its tokens. Threads may share one."""

    def __init__(
        self,
        allow_hosts: Iterable[str] = (),
        *,
        certificates: str = "",
        hub: str = HUGGING_FACE,
        civitai: str = CIVITAI,
    ) -> None:
        """Take `allow_hosts` and `certificates` as `zlora.http.ssrf_guard` does, and base URLs.

        Raises `InvalidSetting` if the packages of the extra are not installed, `ValueError` if
        `hub` or `civitai` is not a base URL.
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
        """Read a worker's variables for LoRA sources; raise `InvalidSetting` with the variable."""
        return cls(
            _setting(environ, config.ALLOW_HOSTS, read=config.hosts),
            certificates=_setting(environ, config.CERTIFICATES, read=config.existing_file),
            hub=_setting(environ, *config.HUGGING_FACE, read=config.web_url) or HUGGING_FACE,
            civitai=_setting(environ, config.CIVITAI, read=config.web_url) or CIVITAI,
        )

    def inspect(self, lora: Asset | str) -> LoraInfo:
        """Describe the LoRA, or the embedding, at an address.

        Raises a `LoraError` whose message has no secret: `LoraNotAllowed` also for an address that
        only a worker opens, `LoraMismatch` for a file that no worker reads.
        """
        address = lora if isinstance(lora, str) else lora.address
        name = without_secrets(address)
        found = self._read(address)
        return describe(found.header, source=name, size=found.size)

    def check(self, request: GenerateRequest, *, base: str | None = None) -> None:
        """Raise a `LoraError`, with `index` in its details, for the first file that is unusable.

        `field` in the details is `embeddings` if `index` counts these.

        `base` is the family of the queue's base model, SDXL if it is not known. A LoRA that was
        made for another one is a `LoraMismatch`, unless `strict` is false: then the worker decides.
        So is one that changes text encoders with a strength that changes over the steps.
        Addresses that only a worker opens, files that require a token, and LoRAs with the weight 0
        are not checked.
        """
        checked = set[tuple[object, ...]]()
        for index, spec in chain.from_iterable(enumerate(cell.loras) for cell in request.cells):
            # All that the check depends on: images of a sweep mostly have the same files.
            key = (spec.file, spec.strict, spec.has_schedule, spec.text_encoder_weight is None)
            if not spec.is_used or key in checked:
                continue
            checked.add(key)
            with naming_file(index=index):
                self._check(spec, base=base)
        for index, embedding in enumerate(request.embeddings):
            address, name = embedding.file.address, without_secrets(embedding.file.address)
            with naming_file(index=index, field="embeddings"):
                if header := self._header(address):
                    family = base or base_model.SDXL
                    read_embeddings(header, name, base=family, token=embedding.token)

    def _header(self, address: str) -> "Header | None":
        """Return the header at an address; None if only a worker can open it."""
        if scheme_of(address) in (*WORKER_SCHEMES, CATALOGUE):
            return None
        try:
            return self._read(address).header
        except LoraForbidden as error:
            if error.details.get("status") in _TOKEN_REQUIRED:
                return None
            raise

    def _check(self, spec: LoraSpec, *, base: str | None) -> None:
        if (header := self._header(spec.file.address)) is None:
            return
        name = without_secrets(spec.file.address)
        base_model.require_lora(header, name)
        family, known = base or base_model.SDXL, f"the base model of the queue is {base}"
        if base is None:
            known = f"the base model of the queue is not known, and taken for {family}"
        if any(map(is_embedding, header.tensors)):
            read_embeddings(header, name, base=family, beside_lora=True)
        detected = base_model.detect_base_model(header)
        if spec.strict and detected and not base_model.is_for(detected.family, family):
            raise LoraMismatch(f"{name}: {detected.clause}; {known}", {"base": detected.family})
        info = base_model.describe(header, source=name, size=0)
        spec.require_constant_text(info.modules, name)

    def _read(self, address: str) -> "RemoteHeader":
        from zlora.http.client import HttpClient, HttpError
        from zlora.lora.http_errors import lora_error
        from zlora.lora.remote_header import read_remote_header

        name = without_secrets(address)
        scheme = scheme_of(address)
        if scheme in (*WORKER_SCHEMES, CATALOGUE):
            raise LoraNotAllowed(f"{name}: only a worker opens {scheme}://")
        if scheme not in PUBLIC_SCHEMES or not address.isprintable():
            schemes = ", ".join(PUBLIC_SCHEMES + WORKER_SCHEMES)
            raise LoraNotAllowed(f"{name}: not a URL of {schemes}")
        address = canonical(address, hub=self._hub, civitai=self._civitai)
        scheme = scheme_of(address)
        hosts = set(self._hosts)
        site = {"hf": self._hub, "civitai": self._civitai}.get(scheme)
        if site and site not in PUBLIC_SITES:  # the operator's own mirror, for its scheme only
            hosts.add(urlsplit(site).netloc.lower())
        client = HttpClient(hosts, certificates=self._certificates)

        def attempt() -> "RemoteHeader":
            url = address
            if scheme == "civitai":
                url = civitai_url(address, site=self._civitai)
            elif scheme == "hf":
                file = hub_file(address, endpoint=self._hub)
                if not file.path:
                    listing = client.get_bytes(file.listing_url(self._hub), max_bytes=MAX_LISTING)
                    file = file.only_lora(listing, name=name)
                url = file.url(self._hub)
            return read_remote_header(client, url, name=name)

        try:
            return client.with_retries(attempt, seconds=_SECONDS, cut_errors=LoraError)
        except HttpError as error:
            raise lora_error(error, name=name) from None


def describe(header: "Header", *, source: str, size: int) -> LoraInfo:
    """Return the description of a file of `size` bytes: a LoRA, or embeddings.

    `source` is its address without secrets. Raises `LoraMismatch` or `EmbeddingMismatch` for a file
    that no worker reads.
    """
    names, base = header.tensors, family_of(header)
    is_known = base in (base_model.SD1, base_model.SD2) or any(map(is_embedding, names))
    if not is_known or any(map(key_names.parse_key, names)):
        base_model.require_lora(header, source)
        return base_model.describe(header, source=source, size=size)
    base = base or base_model.SDXL
    is_one = not any(name.startswith(("bundle_emb.", "<")) for name in names)
    found = read_embeddings(header, source, base=base, token="any" if is_one else None)
    return LoraInfo(
        source=source,
        size=size,
        format=found.format,
        kinds=(base_model.EMBEDDING,),
        ranks=(),
        base=base,
        trigger_words=() if is_one else tuple(one.words[0] for one in found.embeddings),
        modules={},
    )


def _setting(environ: Mapping[str, str], *names: str, read: Callable[[str], T]) -> T:
    """Return the first variable that is set; errors do not show its value, which may be secret."""
    found = {name: value for name in names if (value := config.value_of(environ, name))}
    name, text = next(iter(found.items()), (names[0], ""))
    try:
        return read(text)
    except ValueError as error:
        raise InvalidSetting(f"{name}: {error}", {"name": name}) from None
