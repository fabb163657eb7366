"""API keys: which tenant has which key, and what a tenant may do.

The file `ZLORA_API_KEYS` is JSON, which `zlora keys` writes:

```json
{
  "tenants": {"shop": {"max_jobs": 20, "requests_per_minute": 60, "sources": ["hf://owner/"]}},
  "keys": [{"id": "3f9a1c20", "sha256": "…", "tenant": "shop", "created": 1796100000}]
}
```

The file has the SHA-256 of each key, not the key, whose 256 random bits cannot be guessed.
"""

import hashlib
import re
import secrets
import threading
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import unquote, urlsplit

import msgspec
from msgspec import Meta, Struct, structs

from zlora import prompt_syntax
from zlora.errors import InvalidSetting, LoraNotAllowed
from zlora.files import open_regular, write_atomically
from zlora.lora.catalogue import lora_name
from zlora.queue_info import QueueInfo
from zlora.redaction import without_secrets
from zlora.schema import Asset, GenerateRequest, invalid

VARIABLE: Final = "ZLORA_API_KEYS"
LOCAL: Final = "local"  # the tenant of all requests if there are no keys
_PREFIX: Final = "zl_"  # so that tools that search for leaked secrets know a key
_ID_LENGTH: Final = 8  # hex digits of a key's SHA-256, by which people name it
MAX_JOBS: Final = 10_000  # of a tenant, in lists and in `max_jobs`
_MAX_BYTES: Final = 2**20  # of the file
_TENANT_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", re.ASCII)


class Tenant(Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What the keys of one tenant allow; by default everything."""

    max_jobs: Annotated[int, Meta(ge=1, le=MAX_JOBS)] | None = None
    """Jobs that may be queued or running at the same time, up to 10,000."""
    requests_per_minute: Annotated[int, Meta(ge=1)] | None = None
    """Requests in any minute, for all APIs together."""
    sources: tuple[str, ...] | None = None
    """Beginnings of the addresses of files, each up to a `/`, such as `hf://owner/`."""
    catalogue: tuple[str, ...] | None = None
    """Names of the catalogue's LoRAs and embeddings; `*` stands for any text."""
    models: tuple[str, ...] | None = None
    """Names of base models."""

    def may_name(self, name: str) -> bool:
        """Return whether a LoRA or an embedding of the catalogue may be used by this name."""
        return self.catalogue is None or any(
            fnmatchcase(name, pattern) for pattern in self.catalogue
        )


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One API key of a tenant."""

    id: str
    """Name of the key for people."""
    sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    """SHA-256 of the key, in hex."""
    tenant: str
    """Name of the tenant."""
    created: int
    """Time of its creation in seconds since the epoch."""


class KeyFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The document of the file."""

    tenants: dict[str, Tenant] = {}
    keys: tuple[Key, ...] = ()

    def __post_init__(self) -> None:
        for name, tenant in self.tenants.items():
            check_tenant(name)
            for source in tenant.sources or ():
                check_source(source)
        if strange := [key.id for key in self.keys if key.tenant not in self.tenants]:
            raise ValueError(f"Expected the tenant of key {strange[0]} among the tenants")


def check_tenant(name: str) -> None:
    """Raise `ValueError` if a text cannot be the name of a tenant."""
    if not _TENANT_NAME.fullmatch(name):
        raise ValueError("Expected 1 to 40 characters of A-Z, a-z, 0-9, _ and -")
    if name == LOCAL:
        raise ValueError(f"Expected another name than {LOCAL}, whose jobs came without an API key")


def check_source(source: str) -> None:
    """Raise `ValueError` if a text cannot be the beginning of addresses."""
    parts = urlsplit(source)
    if not parts.scheme or not parts.netloc or ".." in source:
        raise ValueError(f"Expected sources such as hf://owner/, got {source}")


class ApiKeys:
    """The tenant of each key; the file is read again when it changes."""

    def __init__(self, file: Path) -> None:
        """Read the file; raise `InvalidSetting` if that fails."""
        self._file, self._lock = file, threading.Lock()
        self._version: object = None
        self._tenants: dict[str, tuple[str, Tenant]] = {}
        self._read_again()

    def find(self, key: str) -> tuple[str, Tenant] | None:
        """Return name and rights of the tenant with this key; None for an unknown one.

        A file that has become unreadable raises `InvalidSetting`: then no key is known.
        """
        self._read_again()
        return self._tenants.get(sha256_of(key))

    def _read_again(self) -> None:
        with self._lock:
            try:
                found = self._file.stat()
            except OSError as error:
                raise _unreadable(self._file, error.strerror or "it cannot be read") from None
            version = (found.st_mtime_ns, found.st_ino, found.st_size)
            if version == self._version:
                return
            content = read(self._file)
            self._tenants = {
                key.sha256: (key.tenant, content.tenants[key.tenant]) for key in content.keys
            }
            self._version = version


def read(file: Path) -> KeyFile:
    """Return the content of a file; raise `InvalidSetting` if it is not such a file."""
    try:
        with open_regular(file) as opened:
            data = opened.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise _unreadable(file, f"it has more than {_MAX_BYTES} bytes")
        return msgspec.json.decode(data, type=KeyFile)
    except OSError as error:
        raise _unreadable(file, error.strerror or "it cannot be read") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise _unreadable(file, str(error)) from None


def write(file: Path, content: KeyFile) -> None:
    """Replace the file, which only its owner may read."""
    data = msgspec.json.format(msgspec.json.encode(content), indent=2)
    write_atomically(file, data + b"\n", mode=0o600)


def new_key(tenant: str, *, now: float) -> tuple[str, Key]:
    """Return a new key, which is shown once, and what the file keeps of it."""
    text = _PREFIX + secrets.token_urlsafe(32)
    digest = sha256_of(text)
    return text, Key(id=digest[:_ID_LENGTH], sha256=digest, tenant=tenant, created=int(now))


def sha256_of(key: str) -> str:
    """Return the SHA-256 of a key in hex."""
    return hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()


def require_allowed(request: GenerateRequest, tenant: Tenant, info: QueueInfo | None) -> None:
    """Raise `InvalidRequest` or `LoraNotAllowed` for what the tenant may not use.

    `info` has the base model of requests that name none.
    """
    for cell in request.cells:
        model = cell.model or (info.model if info else None)
        if tenant.models is not None and model not in tenant.models:
            expected = f"Expected one of {', '.join(tenant.models)}, the models of this API key"
            raise invalid("$.model", cell.model, expected)
        files = {f"loras[{index}]": spec.file for index, spec in enumerate(cell.loras)}
        files |= {f"embeddings[{index}]": spec.file for index, spec in enumerate(cell.embeddings)}
        others = {
            place: asset
            for place, asset in cell.images.items()
            if not asset.job_image and not asset.upload  # the service checks whose it is
        }
        for place, asset in (files | others).items():
            require_source(asset, tenant, place)
        for tag in prompt_syntax.parse(cell.prompt, cell.prompt_syntax).loras:
            _require_name(tag.name, tenant, "prompt")


def require_source(asset: Asset, tenant: Tenant, place: str) -> None:
    """Raise `LoraNotAllowed`, which names the place, for an address that the tenant may not use."""
    if (name := lora_name(asset.address)) is not None:
        _require_name(name, tenant, place)
    elif tenant.sources is not None and not any(
        _is_below(asset.address, source) for source in tenant.sources
    ):
        sources = ", ".join(tenant.sources) or "the catalogue only"
        shown = without_secrets(asset.address)
        message = f"{shown}: the sources of this API key are {sources}"
        raise LoraNotAllowed(message, {"path": f"$.{place}"})


def allowed_info(info: QueueInfo, tenant: Tenant) -> QueueInfo:
    """Return what a queue serves, without the names that the tenant may not use.

    `model` and `base_sha256` are empty if the tenant may not use the base model of requests that
    name none.
    """
    names = info.catalogue
    if tenant.models is not None:
        models = tuple(name for name in info.models if name in tenant.models)
        info = structs.replace(info, models=models)
        if info.model not in tenant.models:
            info = structs.replace(info, model="", base_sha256="")
    if names is not None:
        names = tuple(name for name in names if tenant.may_name(name))
    return structs.replace(info, catalogue=names)


def model_names(info: QueueInfo) -> tuple[str, ...]:
    """Return the base models among which the caller of an `allowed_info` may choose."""
    return tuple(name for name in info.models or (info.model,) if name)


def _require_name(name: str, tenant: Tenant, place: str) -> None:
    if not tenant.may_name(name):
        message = f"{name}: not among the names of the catalogue that this API key may use"
        raise LoraNotAllowed(message, {"path": f"$.{place}"})


def _is_below(address: str, source: str) -> bool:
    """Return whether an address is a source or below it, and says so in the usual spelling."""
    root = urlsplit(source)
    try:
        found = urlsplit(address)
    except ValueError:  # such as half a pair of brackets
        return False
    path = unquote(found.path)
    if ".." in path.split("/") or "\\" in path or "%" in path:
        return False
    same = (found.scheme, found.netloc) == (root.scheme, root.netloc)
    folder = root.path.rstrip("/")
    return same and (path == folder or path.startswith(f"{folder}/"))


def _unreadable(file: Path, reason: str) -> InvalidSetting:
    return InvalidSetting(f"{VARIABLE}={file}: {reason}", {"name": VARIABLE})
