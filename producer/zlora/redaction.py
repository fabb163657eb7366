"""What may be shown of a stranger's words, and of an address: to logs, watchers and receipts."""

import re
from typing import Final

_SHOWN: Final = 80  # characters of a value in a message
_AUTHORITY: Final = re.compile(r"(?:.*@)?(?:\[[^\]]*\]|[^:\[\]]*)(?::[0-9]*)?", re.ASCII | re.DOTALL)


def without_secrets(address: str) -> str:
    """An address fit for logs and receipts: no credentials, no query, no fragment."""
    scheme, mark, rest = re.split(r"[?#]", address, maxsplit=1)[0].partition("://")
    if not mark:
        return scheme.rpartition("@")[2]
    if scheme == "cozy" and "://" not in rest:
        return f"cozy://{rest}"
    if scheme.lower() in ("file", "redis+socket", "unix") and rest.startswith("/"):
        return f"{scheme}://{rest}"
    if "://" in rest or rest.startswith("/"):
        return f"{scheme}://{without_secrets(rest.lstrip('/'))}"
    authority, slash, path = rest.partition("/")
    if not _AUTHORITY.fullmatch(authority):  # a password with a slash that should be %2F
        return f"{scheme}://{rest.rpartition('@')[2]}"
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def label(name: str | None) -> str | None:
    """A stranger's name for something, which may be an address."""
    return without_secrets(name) if name and "://" in name else name


def shown(request: object) -> str:
    """A request in one line for logs and watchers: prompt, names and numbers, and of addresses what may be shown."""
    if not isinstance(request, dict):
        return printable(request)
    parts = [f"{on_one_line(name)}={_told(name, value)}" for name, value in request.items() if name != "loras"]
    loras = request.get("loras")
    files = [spec.get("file") for spec in loras if isinstance(spec, dict)] if isinstance(loras, list | tuple) else []
    addresses = [value for file in files if isinstance(file, dict) for value in file.values()]
    return ", ".join([*parts, *(f"lora={printable(address)}" for address in addresses)])[:1000]


def _told(name: object, value: object) -> str:
    """Texts as they are: only elsewhere may there be an address."""
    return _cut(repr(value)) if name in ("prompt", "negative_prompt") and isinstance(value, str) else printable(value)


def printable(value: object) -> str:
    """A value in one short line; of an address only what may be shown."""
    if isinstance(value, dict):
        return f"an object with {', '.join(sorted(map(on_one_line, value))) or 'no fields'}"[:200]
    if isinstance(value, list | tuple):
        return f"an array of {len(value)}"
    return _cut(repr(without_secrets(value) if isinstance(value, str) else value))


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def on_one_line(name: object) -> str:
    """A stranger's field name, which forges no line."""
    return "".join(character if character.isprintable() else "?" for character in str(name))
