"""Settings of `zlora serve`, from the environment."""

import ipaddress
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Final, Self

from msgspec import Struct

from zlora import config
from zlora.config import Connection
from zlora.errors import InvalidSetting
from zlora.lora.preflight import Preflight
from zlora.server import tenants

CORS: Final = "ZLORA_HTTP_ORIGINS"
BASE_URL: Final = "ZLORA_HTTP_URL"
DEFAULT_HOST: Final = "127.0.0.1"


class ServerSettings(Struct, frozen=True, kw_only=True):
    """Where the server listens, whom it serves, and its queue."""

    connection: Connection
    keys: Path | None = None
    """File of API keys; None if every program on this machine may use the server."""
    origins: frozenset[str] = frozenset()
    """Origins of web pages of other sites that may use the server (CORS); `*` for all."""
    base_url: str = ""
    """URL of the server for its clients, if a proxy before it has another one."""
    image_hosts: frozenset[str] | None = None
    """Hosts from which images are fetched; None for all that results name."""
    preflight: Callable[[], Preflight] = Preflight
    """Makes what reads the headers of LoRAs, at the first use."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str], *, host: str = DEFAULT_HOST) -> Self:
        """Read the variables.

        Raises `InvalidSetting` for a wrong value, and for a host that other machines can reach if
        there are no API keys.
        """
        file = key_file(environ)
        if file is None and not _is_loopback(host):
            message = f"{tenants.VARIABLE}: without API keys the server listens on 127.0.0.1 only"
            raise InvalidSetting(message, {"name": tenants.VARIABLE})
        return cls(
            connection=Connection.from_env(environ),
            keys=file,
            origins=config.read_first(environ, CORS, parse=_origins),
            base_url=config.read_first(environ, BASE_URL, parse=config.web_url),
            image_hosts=config.image_hosts(environ),
            preflight=partial(Preflight.from_env, environ),
        )


def reference() -> Iterator[config.SettingRow]:
    """Rows of the reference page: what only the server and `zlora keys` read."""
    yield config.SettingRow(
        (tenants.VARIABLE,),
        "",
        "Path of the file of API keys, which `zlora keys` writes, and which is read again when it "
        "changes; there is no `ZLORA_API_KEYS_FILE`. Default: none, and the server is for programs "
        "of this machine only.",
    )
    yield config.SettingRow(
        (CORS,),
        "",
        "Origins of web pages of other sites that may use the server (CORS), such as "
        "`https://example.org`, separated by commas; `*` for all. Default: none.",
    )
    yield config.SettingRow(
        (BASE_URL,),
        "",
        "URL of the server for its clients, such as `https://draw.example.org`, if a proxy before "
        "it has another one than requests name. Default: that of the request.",
    )


def is_local_name(authority: str) -> bool:
    """Return whether `host` or `host:port` is a name of this machine.

    Without API keys other names are refused: a web page can have its own name resolve to this
    machine, and would then read what the server answers (DNS rebinding).
    """
    name, _, port = authority.rpartition(":")
    if not name or not port.isdecimal():
        name = authority
    return _is_loopback(name.removeprefix("[").removesuffix("]").lower())


def key_file(environ: Mapping[str, str]) -> Path | None:
    """Return the file of API keys, which may also be in the folder `ZLORA_SECRETS`."""
    name = tenants.VARIABLE
    if environ.get(f"{name}_FILE"):
        raise InvalidSetting(f"{name}_FILE: expected {name}, the path of the file", {"name": name})
    if file := environ.get(name):
        return Path(file)
    secret = Path(environ.get(config.SECRETS, ""), name)
    return secret if environ.get(config.SECRETS) and secret.exists() else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _origins(text: str) -> frozenset[str]:
    """Parse comma-separated origins; raise `ValueError`."""
    found = frozenset(origin.strip().lower() for origin in text.split(",") if origin.strip())
    for origin in found - {"*"}:
        if config.web_url(origin) != origin or origin.count("/") != 2:  # noqa: PLR2004 - of ://
            raise ValueError("expected origins such as https://example.org, comma-separated")
    return found
