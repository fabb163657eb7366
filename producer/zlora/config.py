"""Settings that producers and workers share.

Names of variables and parsers of their values; the broker's URL as Celery and redis-py understand
it, with its Sentinels and TLS options; the broker that a running `zlora up` has recorded.
"""

import ssl
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple, Self, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import msgspec

from zlora.errors import InvalidSetting
from zlora.schema import QUEUE as DEFAULT_QUEUE

T = TypeVar("T")

BROKER_URL: Final = "ZLORA_BROKER_URL"
RESULT_BACKEND: Final = "ZLORA_RESULT_BACKEND"
QUEUE: Final = "ZLORA_QUEUE"
HOME: Final = "ZLORA_HOME"
SECRETS: Final = "ZLORA_SECRETS"  # folder of files with the names of variables
ALLOW_HOSTS: Final = "ZLORA_ALLOW_HOSTS"
IMAGE_HOSTS: Final = "ZLORA_IMAGE_HOSTS"
CERTIFICATES: Final = "ZLORA_CA_BUNDLE"
HUGGING_FACE: Final = ("ZLORA_HF_ENDPOINT", "HF_ENDPOINT")  # the first that is set
CIVITAI: Final = "ZLORA_CIVITAI_URL"
CATALOGUE: Final = "ZLORA_CATALOGUE"
PROMPTS: Final = "ZLORA_PROMPTS"
WAIT_REPLICAS: Final = "ZLORA_WAIT_REPLICAS"
WEBHOOK_SECRET: Final = "ZLORA_WEBHOOK_SECRET"  # noqa: S105 - a name

SENTINEL: Final = "sentinel"
SCHEMES: Final = ("redis", "rediss", "redis+socket", SENTINEL)  # of a broker's URL
_SENTINEL_PORT: Final = 26379
_MAX_DIGITS: Final = 3
DEFAULT_BROKER: Final = "redis://localhost:6379/0"
_TLS_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


class Connection(NamedTuple):
    """The broker, the result backend, the queue, and what is shown of prompts.

    `wait_replicas` is how many replicas of Redis must have a job.
    """

    broker_url: str
    result_backend: str
    queue: str
    prompts: str
    wait_replicas: int = 0

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """Read the variables; raise `InvalidSetting` for a wrong value or an unreadable file."""
        broker = broker_url(environ)
        result_backend = value_of(environ, RESULT_BACKEND) or broker
        require_sentinels(broker_url=broker, result_backend=result_backend)
        return cls(
            broker_url=broker,
            result_backend=result_backend,
            queue=value_of(environ, QUEUE) or DEFAULT_QUEUE,
            prompts=value_of(environ, PROMPTS) or "shown",
            wait_replicas=read_first(environ, WAIT_REPLICAS, parse=_count, default="0"),
        )


def value_of(environ: Mapping[str, str], name: str) -> str:
    """Return a variable, or the content of the file that `<name>_FILE` names, or "" for neither.

    Without both, a file with the variable's name in the folder `ZLORA_SECRETS` counts. Newlines at
    the end of a file are removed. Raises `InvalidSetting` if both are set, or a file cannot be
    read.
    """
    value, file = environ.get(name, ""), environ.get(f"{name}_FILE")
    if not value and not file and (folder := environ.get(SECRETS)):
        found = Path(folder, name)
        file = str(found) if found.exists() else None
    if not file:
        return value
    if value:
        raise InvalidSetting(f"{name} and {name}_FILE: expected one of them", {"name": name})
    try:
        if stat.S_ISFIFO(Path(file).stat().st_mode):  # reading would wait for a writer
            raise InvalidSetting(f"{name}_FILE={file}: it is a pipe", {"name": f"{name}_FILE"})
        return Path(file).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InvalidSetting(f"{name}_FILE={file}: {reason}", {"name": f"{name}_FILE"}) from None


def read_first(
    environ: Mapping[str, str], *names: str, parse: Callable[[str], T], default: str = ""
) -> T:
    """Parse the first of the variables that is set, else `default`.

    Raises `InvalidSetting` if `parse` raises `ValueError`. The message does not show the value,
    which may be a secret.
    """
    name, text = names[0], default
    for candidate in reversed(names):
        if value := value_of(environ, candidate):
            name, text = candidate, value
    try:
        return parse(text)
    except ValueError as error:
        raise InvalidSetting(f"{name}: {error}", {"name": name}) from None


def broker_url(environ: Mapping[str, str]) -> str:
    """Return `ZLORA_BROKER_URL`, else the broker of a running `zlora up`, else a local Redis.

    Raises `InvalidSetting` if the file of the variable cannot be read or is empty.
    """
    if url := value_of(environ, BROKER_URL):
        return url
    name = f"{BROKER_URL}_FILE"
    if environ.get(name):
        raise InvalidSetting(f"{name}: the file is empty", {"name": name})
    return recorded_broker(home(environ)) or DEFAULT_BROKER


def home(environ: Mapping[str, str]) -> Path:
    """Return the data folder: `ZLORA_HOME`, else `zlora` in the user's data folder (XDG)."""
    if folder := environ.get(HOME):
        return Path(folder).expanduser().absolute()
    data = Path(environ.get("XDG_DATA_HOME", ""))
    if not data.is_absolute():  # the XDG specification says to ignore a relative path
        data = Path.home() / ".local" / "share"
    return data / "zlora"


class SettingRow(NamedTuple):
    """Row of the reference page: variables of one setting, the first that is set wins."""

    names: tuple[str, ...]
    default: str  # as the variable's text; empty if there is none
    note: str


class Sentinels(NamedTuple):
    """A URL of Sentinels, `sentinel://user:password@host:port,host:port/0?master=name`.

    User and password are those of Redis; the options `sentinel_username` and `sentinel_password`
    are those of the Sentinels. An option such as `ssl_ca_certs` means TLS, to all of them.
    """

    hosts: tuple[tuple[str, int], ...]
    name: str  # of the primary, for the Sentinels
    username: str | None
    password: str | None
    primary: str  # URL of the primary without its address, as Celery understands it
    celery: str  # URL of the Sentinels, as Celery understands it


def sentinels(url: str) -> Sentinels | None:
    """Parse a URL of Sentinels; return None for any other URL.

    Raises `ValueError` if it is malformed.
    """
    if not url.startswith(f"{SENTINEL}://"):
        return None
    parts = urlsplit(url)
    user, mark, places = parts.netloc.rpartition("@")
    hosts = []
    for place in places.split(","):
        one = urlsplit(f"//{place}")
        if not one.hostname:
            raise ValueError("expected sentinel://host:port,host:port/0?master=name")
        hosts.append((unquote(one.hostname), one.port or _SENTINEL_PORT))
    query = dict(parse_qsl(parts.query))
    name = query.pop("master", "")
    if not name:
        raise ValueError("expected ?master= with the name of the primary")
    username, password = (query.pop(f"sentinel_{word}", None) for word in ("username", "password"))
    options = f"?{urlencode(query)}" if query else ""
    scheme = "rediss" if any(option.startswith("ssl_") for option in query) else "redis"
    spelled = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in hosts]
    return Sentinels(
        hosts=tuple(hosts),
        name=name,
        username=username,
        password=password,
        primary=f"{scheme}://{user}{mark}localhost{parts.path}{options}",
        celery=";".join(
            f"{SENTINEL}://{user}{mark}{host}{parts.path}{options}" for host in spelled
        ),
    )


def require_sentinels(*, broker_url: str, result_backend: str) -> None:
    """Raise `InvalidSetting` if one of them is a URL of Sentinels that cannot be read."""
    for name, url in ((BROKER_URL, broker_url), (RESULT_BACKEND, result_backend)):
        try:
            sentinels(url)
        except ValueError:  # its text may have a part of a password
            expected = "sentinel://host:port,host:port/0?master=name"
            raise InvalidSetting(f"{name}: expected {expected}", {"name": name}) from None


def celery_url(url: str) -> str:
    """Return a broker's URL as Celery and the tools around it understand it."""
    found = sentinels(url)
    return url if found is None else found.celery


def redis_url(url: str) -> str:
    """Translate Celery's URL of a Redis to redis-py's; raise `ValueError` for any other broker.

    Celery writes a socket as `redis+socket:///path?virtual_host=1`, and accepts `CERT_REQUIRED` for
    `required`. The address in the URL of a primary behind Sentinels means nothing.
    """
    if (found := sentinels(url)) is not None:
        url = found.primary
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or ";" in url:
        raise ValueError(f"expected one URL of {', '.join(SCHEMES)}")
    scheme, query = parts.scheme, dict(parse_qsl(parts.query))
    if scheme == "redis+socket":
        scheme = "unix"
        if "virtual_host" in query:
            query["db"] = query.pop("virtual_host")
    query |= tls_options(url)
    options = f"?{urlencode(query)}" if query else ""
    return f"{scheme}://{parts.netloc}{parts.path}{options}"


def _count(text: str) -> int:
    """Parse a number of replicas; raise `ValueError`."""
    if not text.isascii() or not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise ValueError(f"expected a number of replicas, of up to {_MAX_DIGITS} digits")
    return int(text)


def tls_options(url: str) -> dict[str, str]:
    """Return the TLS options of a broker's URL as redis-py names them; {} without TLS.

    kombu, Celery's result backend and redis-py read such a URL differently: kombu does not verify
    the server if the URL says nothing of TLS, and the result backend refuses that URL. Here the
    server is verified unless `ssl_cert_reqs` is `none`. With Sentinels, these are the options for
    them and for the primary. Raises `ValueError` for an unknown option, and for a file that cannot
    be used.
    """
    if (found := sentinels(url)) is not None:
        url = found.primary
    parts = urlsplit(url)
    given = {name: value for name, value in parse_qsl(parts.query) if name.startswith("ssl_")}
    if parts.scheme != "rediss":
        if given:
            raise ValueError(f"{min(given)}: expected a URL that begins with rediss://")
        return {}
    if unknown := given.keys() - {"ssl_cert_reqs", *_TLS_FILES}:
        expected = ", ".join(("ssl_cert_reqs", *_TLS_FILES))
        raise ValueError(f"{min(unknown)}: expected {expected}")
    verify = given.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    if verify not in ("required", "none"):
        raise ValueError("ssl_cert_reqs: expected required or none")
    for name in given.keys() & set(_TLS_FILES):
        if "%" in given[name]:  # Celery's result backend decodes it once more
            raise ValueError(f"{name}: expected a path without %")
    _try_certificates(*map(given.get, _TLS_FILES))
    return given | {"ssl_cert_reqs": verify}


def _try_certificates(authorities: str | None, certificate: str | None, key: str | None) -> None:
    """Raise `ValueError` if a file of a TLS client cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    name = f"ssl_ca_certs={authorities}"
    try:
        if authorities is not None:
            context.load_verify_locations(authorities)
        if certificate is None and key is not None:
            raise ValueError("ssl_keyfile: expected ssl_certfile, too")
        name = f"ssl_certfile={certificate}" + (f", ssl_keyfile={key}" if key else "")
        if certificate is not None:  # without a password OpenSSL would prompt for one
            context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        raise ValueError(f"{name}: OpenSSL cannot use it: {error.reason or error}") from None
    except OSError as error:
        raise ValueError(f"{name}: {error.strerror}") from None


def hosts(text: str) -> frozenset[str]:
    """Parse comma-separated `host` or `host:port`, in lower case; raise `ValueError`."""
    found = frozenset(name.strip().lower() for name in text.split(",") if name.strip())
    for host in found:
        parts = urlsplit(f"//{host}")
        # `parts.port` raises `ValueError` itself if the port is above 65535.
        if parts.netloc != host or "@" in host or not parts.hostname or parts.port == 0:
            raise ValueError("expected `host` or `host:port`, comma-separated")
    return found


def image_hosts(environ: Mapping[str, str]) -> frozenset[str] | None:
    """Return the hosts from which clients save images, None for all; raise `InvalidSetting`."""
    return read_first(environ, IMAGE_HOSTS, parse=hosts) or None


def web_url(text: str) -> str:
    """Normalise the base URL of a web site, or ""; raise `ValueError`."""
    parts = urlsplit(text)
    if text and (parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0):
        raise ValueError("expected http://host or https://host")
    user, mark, host = parts.netloc.rpartition("@")
    host = host.lower().removesuffix(":443" if parts.scheme == "https" else ":80")
    return urlunsplit(parts._replace(netloc=f"{user}{mark}{host}", path=parts.path.rstrip("/")))


def existing_file(text: str) -> str:
    """Return the path of a file, or ""; raise `ValueError` if there is no such file."""
    if text and not Path(text).is_file():
        raise ValueError("expected the path of an existing file")
    return text


def webhook_secret(folder: Path) -> Path:
    """Path of the secret that signs the webhooks of `zlora up`, for receivers on this machine."""
    return folder / "webhook.secret"


class BrokerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The broker of a running `zlora up`, as JSON in its data folder."""

    url: str
    pid: int


def broker_record(folder: Path) -> Path:
    """Path of the `BrokerRecord` of a running `zlora up`."""
    return folder / "broker.json"


def recorded_broker(folder: Path) -> str | None:
    """Return the URL of the broker of a running `zlora up`; None if its socket does not exist."""
    try:
        url = msgspec.json.decode(broker_record(folder).read_bytes(), type=BrokerRecord).url
    except (OSError, msgspec.DecodeError):
        return None
    return url if Path(url.partition("://")[2]).is_socket() else None
