"""What may be shown of a stranger's words, and of an address: to logs, watchers and receipts."""

import hashlib
import re
from typing import Any, Final

PROMPTS: Final = ("shown", "hashed")  # what of them may be seen
_SHOWN: Final = 80  # characters of a value in a message
_HOST: Final = 30  # characters of a long address's host, and
_END: Final = 35  # of its end
_DIGITS: Final = 12  # of a hash, in hex: enough to tell a day's prompts apart
_WORDS: Final = (
    "scheduler",
    "output_format",
    "url_policy",
)  # texts of a request that are no prompt
_WORD: Final = re.compile(
    r"[a-z0-9_]{1,20}", re.ASCII
)  # one of their values, or anybody's short misspelling
_NESTED: Final = 8  # addresses in one another, each looked into: a thousand would end the process
_AUTHORITY: Final = re.compile(
    r"(?:.*@)?(?:\[[^\]]*\]|[^:\[\]]*)(?::[0-9]*)?", re.ASCII | re.DOTALL
)


def without_secrets(address: str) -> str:
    """An address fit for logs and receipts: no credentials, no query, no fragment.

    Of one with more addresses in one another than anybody means, nothing.
    """
    return "***" if address.count("://") > _NESTED else _public(address)


def _public(address: str) -> str:
    scheme, mark, rest = re.split(r"[?#]", address, maxsplit=1)[0].partition("://")
    if not mark:
        return scheme.rpartition("@")[2]
    if scheme == "cozy" and "://" not in rest:
        return f"cozy://{rest}"
    if scheme.lower() in ("file", "redis+socket", "unix") and rest.startswith("/"):
        return f"{scheme}://{rest}"
    if "://" in rest or rest.startswith("/"):
        return f"{scheme}://{_public(rest.lstrip('/'))}"
    authority, slash, path = rest.partition("/")
    if not _AUTHORITY.fullmatch(authority):  # a password with a slash that should be %2F
        return f"{scheme}://{rest.rpartition('@')[2]}"
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def label(name: str | None) -> str | None:
    """A stranger's name for something, which may be an address."""
    return without_secrets(name) if name and "://" in name else name


def shown(request: object, *, prompts: str = "shown") -> str:
    """A request in one line for logs and watchers: prompt, LoRAs and numbers, and of addresses what may be shown.

    With `prompts="hashed"` of every text that may be a prompt only its hash.
    """
    if not isinstance(request, dict):
        return (
            _hash(request)
            if isinstance(request, str) and prompts == "hashed"
            else printable(request)
        )
    parts: list[str] = []
    for name, value in request.items():
        if name == "loras":
            parts += _loras(value)
        else:
            parts.append(f"{on_one_line(name)}={_told(name, value, prompts)}")
    return ", ".join(parts)[:1000]


def _told(name: object, value: object, prompts: str) -> str:
    if (
        isinstance(value, str)
        and prompts == "hashed"
        and not (name in _WORDS and _WORD.fullmatch(value))
    ):
        return _hash(value)
    if isinstance(value, str) and name in ("prompt", "negative_prompt"):
        return _cut(repr(value))  # as it is: only elsewhere may there be an address
    return printable(value)


def _hash(text: str) -> str:
    """By which equal texts are known. It has no key, so that all sides say the same: who guesses a text may check."""
    return f"sha256:{hashlib.sha256(text.encode(errors='surrogatepass')).hexdigest()[:_DIGITS]}"


def _loras(specs: object) -> list[str]:
    """Each LoRA by the name that its request gives it, else by its address, and its weight where it has one."""
    found = (
        [spec for spec in specs if isinstance(spec, dict)]
        if isinstance(specs, list | tuple)
        else []
    )
    return [f"lora={_name(spec)}{_weight(spec.get('weight'))}" for spec in found]


def _name(spec: dict[str, Any]) -> str:
    file = spec.get("file")
    addresses = (
        [file.get(field) for field in ("url", "cozy_ref", "ref")] if isinstance(file, dict) else []
    )
    names = (
        name for name in (spec.get("adapter_name"), *addresses) if isinstance(name, str) and name
    )
    return short(next(names, "?"))


def _weight(weight: object) -> str:
    return f" {weight:g}" if isinstance(weight, int | float) else ""


def short(name: str) -> str:
    """A LoRA's name or address in one short line: of a long address the host and the end, which names the file."""
    safe = without_secrets(name)
    start, mark, rest = safe.partition("://")
    host, slash, path = rest.partition("/")
    if mark and slash and len(safe) > _SHOWN:
        safe = f"{start}://{host[:_HOST]}/...{path[-_END:]}"
    return _cut(repr(safe))


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
