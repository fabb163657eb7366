"""Settings that producers and workers share: names of variables, how their values are read, and the broker's URL."""

import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import msgspec

from zlora.errors import InvalidSetting

BROKER_URL: Final = "ZLORA_BROKER_URL"
RESULT_BACKEND: Final = "ZLORA_RESULT_BACKEND"
QUEUE: Final = "ZLORA_QUEUE"
HOME: Final = "ZLORA_HOME"
ALLOW_HOSTS: Final = "ZLORA_ALLOW_HOSTS"
CERTIFICATES: Final = "ZLORA_CA_BUNDLE"
HUGGING_FACE: Final = ("ZLORA_HF_ENDPOINT", "HF_ENDPOINT")  # the first that is set
CIVITAI: Final = "ZLORA_CIVITAI_URL"
PROMPTS: Final = "ZLORA_PROMPTS"
WEBHOOK_SECRET: Final = "ZLORA_WEBHOOK_SECRET"  # noqa: S105 - a name

SCHEMES: Final = ("redis", "rediss", "redis+socket")  # of a broker
DEFAULT_BROKER: Final = "redis://localhost:6379/0"


def redis_url(url: str) -> str:
    """A Celery URL of one Redis as redis-py spells it; raises `ValueError` for any other broker.

    Celery writes a socket as `redis+socket:///path?virtual_host=1`, and knows `CERT_REQUIRED` for `required`.
    """
    parts = urlsplit(url)
    names = {"virtual_host": "db"} if parts.scheme == "redis+socket" else {}
    query = [(names.get(name, name), value) for name, value in parse_qsl(parts.query)]
    query = [
        (name, value.lower().removeprefix("cert_") if name == "ssl_cert_reqs" else value)
        for name, value in query
    ]
    if parts.scheme not in SCHEMES or ";" in url:
        raise ValueError(f"expected one URL of {', '.join(SCHEMES)}")
    scheme = "unix" if parts.scheme == "redis+socket" else parts.scheme
    return f"{scheme}://{parts.netloc}{parts.path}{'?' if query else ''}{urlencode(query)}"


def home(environ: Mapping[str, str]) -> Path:
    """The data folder: `ZLORA_HOME`, else `zlora` in the user's data folder (XDG Base Directory)."""
    if named := environ.get(HOME):
        return Path(named).expanduser().absolute()
    data = Path(environ.get("XDG_DATA_HOME", ""))
    return (data if data.is_absolute() else Path.home() / ".local" / "share") / "zlora"


def value_of(environ: Mapping[str, str], name: str) -> str:
    """A variable's value, or the content of the file that `<name>_FILE` names, as secrets are mounted; "" for neither.

    Newlines at the file's end are not part of it. Raises `InvalidSetting` where both are set, and of what is no file.
    """
    value, file = environ.get(name, ""), environ.get(f"{name}_FILE")
    if not file:
        return value
    if value:
        raise InvalidSetting(f"{name} and {name}_FILE: expected one of them", {"name": name})
    try:
        if stat.S_ISFIFO(Path(file).stat().st_mode):
            raise InvalidSetting(
                f"{name}_FILE={file}: it is a pipe", {"name": f"{name}_FILE"}
            )  # and waited for
        return Path(file).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise InvalidSetting(f"{name}_FILE={file}: {reason}", {"name": f"{name}_FILE"}) from None


def broker_url(environ: Mapping[str, str]) -> str:
    """The broker: the explicit URL, else the embedded one that runs in the data folder, else Redis on this machine.

    Raises `InvalidSetting` of a file that cannot be read, or has no URL: no other broker was meant.
    """
    if told := value_of(environ, BROKER_URL):
        return told
    if environ.get(f"{BROKER_URL}_FILE"):
        raise InvalidSetting(
            f"{BROKER_URL}_FILE: the file is empty", {"name": f"{BROKER_URL}_FILE"}
        )
    return recorded_broker(home(environ)) or DEFAULT_BROKER


def hosts(text: str) -> frozenset[str]:
    """`host` or `host:port`, comma-separated, in lower case; raises `ValueError`."""
    found = frozenset(name.strip().lower() for name in text.split(",") if name.strip())
    for host in found:
        parts = urlsplit(f"//{host}")
        if (
            parts.netloc != host or "@" in host or not parts.hostname or parts.port == 0
        ):  # `port` raises by itself
            raise ValueError("expected `host` or `host:port`, comma-separated")
    return found


def web_url(text: str) -> str:
    """A site's base URL in its one spelling, or nothing; raises `ValueError`."""
    parts = urlsplit(text)
    if text and (parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0):
        raise ValueError("expected http://host or https://host")
    user, mark, host = parts.netloc.rpartition("@")
    host = host.lower().removesuffix(":443" if parts.scheme == "https" else ":80")
    return urlunsplit(parts._replace(netloc=f"{user}{mark}{host}", path=parts.path.rstrip("/")))


def existing_file(text: str) -> str:
    """A file's path, or nothing; raises `ValueError`."""
    if text and not Path(text).is_file():
        raise ValueError("expected a file that is there")
    return text


def webhook_secret(folder: Path) -> Path:
    """Where the embedded stack keeps the secret that signs its webhooks, for its receivers on this machine."""
    return folder / "webhook.secret"


class BrokerRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the embedded stack writes down of its broker."""

    url: str
    pid: int


def broker_record(folder: Path) -> Path:
    """Where the embedded stack writes down its broker's URL for as long as it runs."""
    return folder / "broker.json"


def recorded_broker(folder: Path) -> str | None:
    """The URL of the embedded broker whose socket is there, or None."""
    try:
        url = msgspec.json.decode(broker_record(folder).read_bytes(), type=BrokerRecord).url
    except (OSError, msgspec.DecodeError):
        return None
    return url if Path(url.partition("://")[2]).is_socket() else None
