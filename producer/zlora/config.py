"""Settings that producers and workers share: names of variables, parsers, and the broker's URL."""

import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple, Self, TypeVar
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

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
CERTIFICATES: Final = "ZLORA_CA_BUNDLE"
HUGGING_FACE: Final = ("ZLORA_HF_ENDPOINT", "HF_ENDPOINT")  # the first that is set
CIVITAI: Final = "ZLORA_CIVITAI_URL"
PROMPTS: Final = "ZLORA_PROMPTS"
WEBHOOK_SECRET: Final = "ZLORA_WEBHOOK_SECRET"  # noqa: S105 - a name

SCHEMES: Final = ("redis", "rediss", "redis+socket")  # of a broker's URL
DEFAULT_BROKER: Final = "redis://localhost:6379/0"


class Connection(NamedTuple):
    """The broker, the result backend, the queue, and what is shown of prompts."""

    broker_url: str
    result_backend: str
    queue: str
    prompts: str

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Self:
        """Read the variables; raise `InvalidSetting` if a file of a variable cannot be read."""
        broker = broker_url(environ)
        return cls(
            broker_url=broker,
            result_backend=value_of(environ, RESULT_BACKEND) or broker,
            queue=value_of(environ, QUEUE) or DEFAULT_QUEUE,
            prompts=value_of(environ, PROMPTS) or "shown",
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


def redis_url(url: str) -> str:
    """Translate Celery's URL of a Redis to redis-py's; raise `ValueError` for any other broker.

    Celery writes a socket as `redis+socket:///path?virtual_host=1`, and accepts `CERT_REQUIRED` for
    `required`.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or ";" in url:
        raise ValueError(f"expected one URL of {', '.join(SCHEMES)}")
    scheme, query = parts.scheme, dict(parse_qsl(parts.query))
    if scheme == "redis+socket":
        scheme = "unix"
        if "virtual_host" in query:
            query["db"] = query.pop("virtual_host")
    if "ssl_cert_reqs" in query:
        query["ssl_cert_reqs"] = query["ssl_cert_reqs"].lower().removeprefix("cert_")
    options = f"?{urlencode(query)}" if query else ""
    return f"{scheme}://{parts.netloc}{parts.path}{options}"


def hosts(text: str) -> frozenset[str]:
    """Parse comma-separated `host` or `host:port`, in lower case; raise `ValueError`."""
    found = frozenset(name.strip().lower() for name in text.split(",") if name.strip())
    for host in found:
        parts = urlsplit(f"//{host}")
        # `parts.port` raises `ValueError` itself if the port is above 65535.
        if parts.netloc != host or "@" in host or not parts.hostname or parts.port == 0:
            raise ValueError("expected `host` or `host:port`, comma-separated")
    return found


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
