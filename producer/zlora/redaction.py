"""Remove secrets from text: addresses, requests in logs and Flower, and log lines."""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, Final
from urllib.parse import quote

from zlora.schedulers import find_scheduler

PROMPTS: Final = ("shown", "hashed")  # how prompts appear in logs and in Flower
_MASK: Final = "***"
_MAX_VALUE: Final = 80  # characters of one value
_MAX_LINE: Final = 1000  # characters of one request
_MAX_HOST: Final = 30  # characters of the host of a long address
_MAX_PATH_END: Final = 35  # characters of the end of a long address
_HASH_DIGITS: Final = 12  # hex digits; enough to tell a day's prompts apart
# As `schema.enum_fields`.
ENUM_FIELDS: Final = (
    "mode",
    "batch_size",
    "output_format",
    "prompt_syntax",
    "recipes",
    "schedule",
    "trigger_words",
    "url_policy",
)
_FILES: Final = {"loras": "lora", "embeddings": "embedding"}  # fields with addresses
_IMAGES: Final = ("image", "mask")  # fields that are an address each
_JOB_IMAGE: Final = re.compile(r"job:[A-Za-z0-9_-]{1,64}#[0-9]{1,2}", re.ASCII)  # as in `schema`
_ENUM_VALUE: Final = re.compile(r"[a-z0-9_]{1,20}", re.ASCII)  # a valid value, or a misspelt one
_MAX_NESTED: Final = 8  # addresses inside one another; deeper nesting could exhaust the stack
_MIN_SECRET: Final = 6  # characters; masking shorter secrets would mask ordinary words
_AUTHORITY: Final = re.compile(
    r"(?:.*@)?(?:\[[^\]]*\]|[^:\[\]]*)(?::[0-9]*)?", re.ASCII | re.DOTALL
)

# Addresses in free text. JSON may escape each slash, and text may quote JSON several times.
_ADDRESS: Final = re.compile(
    r"(?:[a-z][a-z0-9+.-]{0,30}:)?(?:\\{0,8}/){2}[^\s\"<>]+", re.IGNORECASE
)
_ESCAPED_SLASH: Final = re.compile(r"\\{1,8}/")
_QUERY: Final = re.compile(r"\?[^\s\"<>]+")  # after a path alone, as urllib3's errors contain it
_WORD: Final = re.compile(r"[^\s\"'<>/]+")
_CREDENTIAL: Final = re.compile(r"\b(bearer|basic)\s+[^\s'\",]+", re.IGNORECASE)
# An Authorization header of any scheme, up to the closing quote or to the end of the line.
_AUTHORIZATION: Final = re.compile(
    r"(authorization[\\'\"]{0,9}\s*(?:[:=]|(?<=['\"]),)\s*(b?\\{0,8}['\"])?)(?(2)[^'\"\\\r\n]*|[^\r\n]*)",
    re.IGNORECASE,
)


def without_secrets(address: str) -> str:
    """Return an address without credentials, query and fragment.

    Returns `***` if more than eight addresses are nested in one another. The index of a job's image
    stays.
    """
    if _JOB_IMAGE.fullmatch(address):
        return address
    if address.count("://") > _MAX_NESTED:
        return _MASK
    return _public_part(address)


def _public_part(address: str) -> str:
    scheme, mark, rest = re.split(r"[?#]", address, maxsplit=1)[0].partition("://")
    if not mark:
        return scheme.rpartition("@")[2]
    if scheme == "cozy" and "://" not in rest:
        return f"cozy://{rest}"
    if scheme.lower() in ("file", "redis+socket", "unix") and rest.startswith("/"):
        return f"{scheme}://{rest}"
    if "://" in rest or rest.startswith("/"):
        return f"{scheme}://{_public_part(rest.lstrip('/'))}"
    authority, slash, path = rest.partition("/")
    if not _AUTHORITY.fullmatch(authority):  # a password with a slash that should be %2F
        return f"{scheme}://{rest.rpartition('@')[2]}"
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"


def label(name: str | None) -> str | None:
    """Return a name that a request gives, without secrets if the name is an address."""
    if name and "://" in name:
        return without_secrets(name)
    return name


def without_secrets_in(value: Any, field: str = "") -> Any:
    """Return a request as JSON data whose addresses have no secrets, also those of a sweep."""
    if isinstance(value, dict):
        return {
            name: without_secrets_in(each, name.rpartition(".")[2]) for name, each in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets_in(each, field) for each in value]
    if field in ("url", "ref", "cozy_ref") and isinstance(value, str):
        return without_secrets(value) or _MASK
    return label(value) if field == "adapter_name" else value


def shown(request: object, *, prompts: str = "shown") -> str:
    """Return a request as one line for logs and Flower: prompt, files and numbers, no secrets.

    With `prompts="hashed"` every text that may be a prompt is replaced by its hash.
    """
    if isinstance(request, dict):
        parts: list[str] = []
        for name, value in request.items():
            if name in _FILES:
                parts += _files(_FILES[name], value)
            elif name in _IMAGES and isinstance(value, dict):
                parts += _files(str(name), [{"file": value}])
            else:
                parts.append(f"{field_name(name)}={_field(name, value, prompts)}")
        return ", ".join(parts)[:_MAX_LINE]
    if isinstance(request, str) and prompts == "hashed":
        return _hash(request)
    return printable(request)


def _field(name: object, value: object, prompts: str) -> str:
    if isinstance(value, str):
        is_enum = name in ENUM_FIELDS and _ENUM_VALUE.fullmatch(value)
        is_scheduler = name == "scheduler" and find_scheduler(value)
        if prompts == "hashed" and not is_enum and not is_scheduler:
            return _hash(value)
        if name in ("prompt", "negative_prompt"):  # not an address, whatever it contains
            return _shortened(repr(value))
    return printable(value)


def _hash(text: str) -> str:
    """Return a hash without a key, so that all processes print the same for the same text."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    return f"sha256:{digest[:_HASH_DIGITS]}"


def _files(kind: str, specs: object) -> list[str]:
    """Return each LoRA's name in the request, else its address, and its weight if there is one.

    An embedding is shown by its address.
    """
    found: list[str] = []
    if not isinstance(specs, list | tuple):
        return []
    for spec in specs:
        if not isinstance(spec, dict):
            continue
        names = [spec.get("adapter_name")]
        if isinstance(file := spec.get("file"), dict):
            names += [file.get(field) for field in ("url", "cozy_ref", "ref")]
        name = next((name for name in names if isinstance(name, str) and name), "?")
        text = f"{kind}={short(name)}"
        if isinstance(weight := spec.get("weight"), int | float):
            text += f" {weight:g}"
        found.append(text)
    return found


def short(name: str) -> str:
    """Return a LoRA's name or address in one short line; a long address keeps host and end."""
    safe = without_secrets(name)
    start, mark, rest = safe.partition("://")
    host, slash, path = rest.partition("/")
    if mark and slash and len(safe) > _MAX_VALUE:
        safe = f"{start}://{host[:_MAX_HOST]}/...{path[-_MAX_PATH_END:]}"
    return _shortened(repr(safe))


def printable(value: object) -> str:
    """Return any value in one short line, without secrets of addresses."""
    if isinstance(value, dict):
        fields = ", ".join(sorted(map(field_name, value))) or "no fields"
        return f"an object with {fields}"[:200]
    if isinstance(value, list | tuple):
        return f"an array of {len(value)}"
    if isinstance(value, str):
        value = without_secrets(value)
    return _shortened(repr(value))


def field_name(name: object) -> str:
    """Return the name of a field, which may be an address in the wrong place, as addresses are."""
    return _shortened(on_one_line(without_secrets(str(name))))


def _shortened(text: str) -> str:
    if len(text) > _MAX_VALUE:
        return f"{text[:_MAX_VALUE]}..."
    return text


def on_one_line(name: object) -> str:
    """Return text with `?` for every character that is not printable, such as a line break."""
    return "".join(character if character.isprintable() else "?" for character in str(name))


class Redactor:
    """Masks secrets in free text: the given ones, and credentials and queries of addresses.

    A doubtful case is masked: what follows a question mark without a space, and a word with a
    colon before an `@`.
    """

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        """Take the values to mask; values shorter than six characters are ignored."""
        spellings: set[str] = set()
        for secret in secrets:
            if len(secret) >= _MIN_SECRET:
                spellings |= _spellings(secret)
        longest_first = sorted(spellings, key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def __call__(self, text: str) -> str:
        """Return the text with `***` for each secret."""
        text = self._secrets.sub(_MASK, text)
        text = _AUTHORIZATION.sub(rf"\1{_MASK}", text)
        text = _CREDENTIAL.sub(rf"\1 {_MASK}", text)
        if "//" in text or "\\/" in text:
            text = _ADDRESS.sub(_mask_address, text)
        if "@" in text:
            text = _WORD.sub(_mask_credentials, text)
        if "?" in text:
            text = _QUERY.sub(_mask_query, text)
        return text


def _spellings(secret: str) -> set[str]:
    """Return the secret as written in an address, and as quoted by Python, by JSON, or by both."""
    once = {
        secret,
        quote(secret, safe="", errors="surrogateescape"),
        ascii(secret)[1:-1],
        repr(secret)[1:-1],
        repr(secret.encode(errors="surrogatepass"))[2:-1],
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
    }
    once |= {text.replace("/", "\\/") for text in once} | {
        text.replace("'", "\\'") for text in once
    }
    return once | {json.dumps(text)[1:-1] for text in once} | {repr(text)[1:-1] for text in once}


def _mask_address(found: re.Match[str]) -> str:
    return without_secrets(_ESCAPED_SLASH.sub("/", found[0]))


def _mask_credentials(word: re.Match[str]) -> str:
    """Mask `user:password` before an `@` in an address that is misspelt or has no scheme."""
    before, _, host = word[0].rpartition("@")
    if ":" in before:
        return f"{_MASK}@{host}"
    return word[0]


def _mask_query(found: re.Match[str]) -> str:
    """Remove a query; punctuation after a question mark is not one."""
    return "" if re.search(r"\w", found[0]) else found[0]
