"""The catalogue of a worker: names of LoRAs, each with its source and how to use it.

The file is TOML with a table for each LoRA:

```toml
[loras.watercolor]
source = "hf://owner/repo/watercolor.safetensors@main"
sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
weight = 0.8
trigger_words = ["watercolor painting"]
recipe = "lcm"
notes = "paper texture from 0.6 on"
pinned = true
```

An entry whose source is `lora://<other name>` is another name of the same file, with weight,
trigger words and recipe of that entry unless it has its own.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, Self, TypeVar
from urllib.parse import quote, unquote

import msgspec
from msgspec import Meta, Struct, structs

from zlora import prompt_syntax
from zlora.errors import InvalidSetting, LoraError, LoraNotAllowed, LoraNotFound
from zlora.files import open_regular
from zlora.lora.addresses import CATALOGUE, PUBLIC_SCHEMES, WORKER_SCHEMES, canonical, scheme_of
from zlora.lora.recipes import recipe_named
from zlora.prompt_syntax import LoraTag, PromptSyntax
from zlora.redaction import on_one_line, without_secrets
from zlora.schema import (
    Address,
    Asset,
    EmbeddingSpec,
    GenerateRequest,
    LoraSpec,
    Sha256,
    Weight,
    invalid,
    parse_request,
)

_TABLE: Final = "loras"
_MAX_BYTES: Final = 4 * 2**20  # of the file: more than 10,000 entries
_MAX_NAME: Final = 100  # characters
_MAX_SHOWN: Final = _MAX_NAME + len("lora://")  # characters of an unknown name in a message
_MAX_CHAIN: Final = 10  # names from an entry to its file; each entry follows all of its own
# Letters and digits of any script; what separates the parts of an address or a tag is not in names.
_NAME: Final = re.compile(r"\w(?:[\w .+-]*[\w+])?")
_NEAREST: Final = 3  # names in a message
_SIMILARITY: Final = 0.4  # from 0 to 1: `neon` has 0.53 with `neon-lights`
_SCHEMES: Final = (*PUBLIC_SCHEMES, *WORKER_SCHEMES)

# One word or phrase of a prompt, on one line.
TriggerWord = Annotated[str, Meta(min_length=1, max_length=200, pattern=r"\A\S([^\r\n]*\S)?\Z")]


Spec = TypeVar("Spec", LoraSpec, EmbeddingSpec)


class CatalogueRow(
    Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """A table of the file. Unknown keys are refused, so that a misspelt one is never ignored."""

    source: Address
    """Address of the file as in `Asset.url`, or `lora://<name>` of another entry."""
    sha256: Sha256 | None = None
    """SHA-256 that the file must have; not checked by default."""
    weight: Weight | None = None
    """Strength of the LoRA for requests that name none; 1.0 by default."""
    trigger_words: Annotated[tuple[TriggerWord, ...], Meta(max_length=20)] | None = None
    """Words that belong into the prompt; none by default."""
    recipe: Annotated[str, Meta(min_length=1, max_length=40)] | None = None
    """Name of the few-step recipe that the LoRA was made for; by default what the file says."""
    notes: Annotated[str, Meta(max_length=2000)] = ""
    """Text for people."""
    pinned: bool = False
    """True to parse the LoRA at the start of a worker and keep it in memory; needs `sha256`."""


class CatalogueEntry(CatalogueRow, frozen=True, kw_only=True):
    """A LoRA of the catalogue, with everything that it has from the entry that its source names."""

    name: str
    """Name of the LoRA."""

    @property
    def asset(self) -> Asset:
        """File of the LoRA."""
        return Asset(url=self.source, sha256=self.sha256)

    @property
    def words(self) -> tuple[str, ...]:
        """Trigger words, none if the catalogue names none."""
        return self.trigger_words or ()


class Resolved(NamedTuple):
    """A request that needs no catalogue, and for each of its LoRAs the entry if there is one."""

    request: GenerateRequest
    entries: tuple[CatalogueEntry | None, ...]


class Catalogue:
    """LoRAs by name. With `only`, no other LoRAs are served."""

    def __init__(
        self, rows: Mapping[str, CatalogueRow] | None = None, *, only: bool = False
    ) -> None:
        """Raise `ValueError` for an entry that cannot be used, beginning with its name."""
        self.only = only
        self.entries = _entries(rows or {})
        self._folded = {name.casefold(): entry for name, entry in self.entries.items()}
        self._by_source: dict[str, CatalogueEntry] = {}
        for entry in self.entries.values() if only else ():
            try:
                addresses = (entry.asset.address, canonical(entry.asset.address))
            except LoraError as error:
                raise ValueError(f"{entry.name}: {error}") from None
            for address in addresses:  # as a request and as a receipt spell it
                self._by_source.setdefault(without_secrets(address), entry)

    @classmethod
    def load(cls, file: Path, *, only: bool = False, variable: str) -> Self:
        """Read a file; raise `InvalidSetting` with the variable that names it, and the reason."""
        try:
            return cls(read_rows(file), only=only)
        except ValueError as error:
            raise InvalidSetting(f"{variable}={file}: {error}", {"name": variable}) from None

    def find_address(self, address: str) -> CatalogueEntry | None:
        """Return the entry of an address `lora://<name>`, None for others; see `find`."""
        if (name := lora_name(address)) is None:
            return None
        return self.find(name, shown=unquote(without_secrets(address)))

    def find(self, name: str, *, shown: str = "") -> CatalogueEntry:
        """Return the entry of a name, in upper or lower case.

        Raises `LoraNotFound` with what is `shown` of the name, which has no secrets.
        """
        if (found := self._folded.get(name.casefold())) is not None:
            return found
        shown = on_one_line((shown or f"{CATALOGUE}://{name}")[:_MAX_SHOWN])
        if not self.entries:
            raise LoraNotFound(f"{shown}: this worker has no catalogue of LoRAs")
        nearest = nearest_names(name, self.entries)
        advice = f"; the nearest names: {', '.join(nearest)}" if nearest else ""
        raise LoraNotFound(f"{shown}: no such name in the catalogue{advice}", {"nearest": nearest})

    def resolve(self, request: GenerateRequest) -> Resolved:
        """Return the request with the files, weights and trigger words of the catalogue.

        LoRAs that the prompt names follow those of `loras`, and are no longer in the prompt. Of
        an embedding, the catalogue names the file.

        Raises `LoraNotFound` for an unknown name and `LoraNotAllowed` for a file that is not
        served, both with `index` in the details, and `InvalidRequest` if a field contradicts the
        catalogue, or the prompt is too long with its trigger words.
        """
        prompt, syntax = request.prompt, request.prompt_syntax
        given = list(request.loras)
        if inline := prompt_syntax.parse(prompt, syntax).loras:
            prompt = prompt_syntax.without_loras(prompt).strip()
            given += map(_spec_of, inline)
        loras = [
            self._named(spec, f"$.loras[{index}]", index=index) for index, spec in enumerate(given)
        ]
        embeddings = [
            self._named(spec, f"$.embeddings[{index}]", index=index, field="embeddings")
            for index, spec in enumerate(request.embeddings)
        ]
        entries = tuple(entry for _, entry in loras)
        adds_words = request.trigger_words == "add"
        if not any(entry for _, entry in (*loras, *embeddings)) and not adds_words:
            return Resolved(request, entries)
        specs = [spec if entry is None else _filled_in(spec, entry) for spec, entry in loras]
        if adds_words:
            for spec, entry in zip(specs, entries, strict=True):
                if entry is not None and spec.is_used:
                    prompt = with_words(prompt, entry.words, syntax)
        found = structs.replace(
            request,
            prompt=prompt,
            loras=tuple(specs),
            embeddings=tuple(spec for spec, _ in embeddings),
            trigger_words="list",
        )
        return Resolved(parse_request(found), entries)

    def _named(self, spec: Spec, path: str, **details: Any) -> tuple[Spec, CatalogueEntry | None]:
        """Return a spec with the file that it names, and the entry of the file if there is one.

        Raises a `LoraError` with these details, or `InvalidRequest` for the path.
        """
        try:
            entry = self._entry_of(spec.file)
        except LoraError as error:
            error.add_details(**details)
            raise
        if entry is None:
            return spec, None
        sha256 = spec.file.sha256
        # In a closed catalogue the sha256 of a request would choose any file that is cached.
        if sha256 and sha256 != entry.sha256 and (entry.sha256 or self.only):
            expected = f"Expected {entry.sha256 or 'none'}, as the catalogue says of {entry.name}"
            raise invalid(f"{path}.file.sha256", sha256, expected)
        asset = Asset(
            url=entry.source,
            sha256=entry.sha256 or sha256,
            config_sha256=spec.file.config_sha256,
        )
        return structs.replace(spec, file=asset), entry

    def _entry_of(self, asset: Asset) -> CatalogueEntry | None:
        """Return the entry that a file of a request names; None for a file of another source."""
        address, ref = asset.address, asset.ref
        if (entry := self.find_address(address)) is not None:
            return entry
        if ref and ref.casefold() in self._folded:
            return self.find(ref)
        if not self.only:
            return None
        if (entry := self._by_source.get(without_secrets(address))) is not None:
            return entry  # as the request in a result names it
        if ref and _NAME.fullmatch(ref):  # not a reference to a hub
            return self.find(ref)
        raise LoraNotAllowed(
            f"{without_secrets(address)}: this worker serves the LoRAs of its catalogue only"
        )


def _filled_in(spec: LoraSpec, entry: CatalogueEntry) -> LoraSpec:
    """Return a LoRA with the weight and the name of its entry, unless it has its own."""
    is_silent = spec.weight is None and spec.weights is None
    return structs.replace(
        spec,
        weight=entry.weight if is_silent else spec.weight,
        adapter_name=spec.adapter_name or entry.name,
    )


def _spec_of(tag: LoraTag) -> LoraSpec:
    """Return the LoRA of a tag in a prompt, in which a weight may be absent."""
    file = Asset(ref=f"{CATALOGUE}://{quote(tag.name, safe='')}")
    text, unet = tag.text_encoder_weight, tag.unet_weight
    if text == unet:
        return LoraSpec(file=file, weight=unet)
    return LoraSpec(file=file, text_encoder_weight=text, unet_weight=unet)


def with_words(prompt: str, words: Iterable[str], syntax: PromptSyntax) -> str:
    """Return a prompt with these trigger words at its end, but for those that it already has."""
    for plain in words:
        word = prompt_syntax.escaped(plain) if syntax == "a1111" else plain
        if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE):
            prompt = f"{prompt}, {word}" if prompt.strip() else word
    return prompt


def lora_name(address: str) -> str | None:
    """Return the name in an address `lora://<name>`, None for other addresses."""
    if scheme_of(address) != CATALOGUE:
        return None
    return unquote(address.partition("://")[2])


def nearest_names(name: str, names: Mapping[str, object]) -> list[str]:
    """Return the most similar of some names, the nearest first; none if all are very different."""
    folded = {other.casefold(): other for other in names}
    found = get_close_matches(name.casefold(), folded, n=_NEAREST, cutoff=_SIMILARITY)
    return [folded[other] for other in found]


def read_rows(file: Path) -> dict[str, CatalogueRow]:
    """Read the tables of a file in their order; raise `ValueError` without the file's name."""
    return parse_rows(read_text(file))


def read_text(file: Path) -> str:
    """Read the text of a file; raise `ValueError` without the file's name."""
    try:
        with open_regular(file) as opened:
            data = opened.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(error.strerror) from None
    if len(data) > _MAX_BYTES:
        raise ValueError(f"a catalogue has at most {_MAX_BYTES} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None


def parse_rows(text: str) -> dict[str, CatalogueRow]:
    """Parse the text of a file; raise `ValueError`."""
    try:
        document: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:  # also for a table that is there twice
        raise ValueError(f"not TOML: {error}") from None
    except RecursionError:
        raise ValueError("not TOML that can be read: too many brackets") from None
    if others := sorted(document.keys() - {_TABLE}):
        raise ValueError(f"expected tables [{_TABLE}.<name>] only, got {on_one_line(others[0])}")
    tables = document.get(_TABLE, {})
    if not isinstance(tables, dict):
        raise ValueError(f"expected tables [{_TABLE}.<name>]")  # noqa: TRY004 - of the text
    rows = {}
    for name, table in tables.items():
        try:
            rows[name] = msgspec.convert(table, CatalogueRow)
        except msgspec.ValidationError as error:
            raise ValueError(f"{on_one_line(name)}: {error}") from None
    return rows


def _entries(rows: Mapping[str, CatalogueRow]) -> dict[str, CatalogueEntry]:
    """Return the entries of checked tables, each with what it has from others; raise `ValueError`.

    The message shows no secret of a source.
    """
    names: dict[str, str] = {}  # by their spelling in lower case
    for name in rows:
        if len(name) > _MAX_NAME or not _NAME.fullmatch(name):
            raise ValueError(
                f"{on_one_line(name)}: expected a name of up to {_MAX_NAME} letters, digits and "
                "` _.+-`, with neither a separator nor a space at its ends"
            )
        if (other := names.setdefault(name.casefold(), name)) != name:
            raise ValueError(f"{name} and {other} are one name in upper or lower case")
    entries = {name: _entry(name, rows, names) for name in rows}
    digests: dict[str, CatalogueEntry] = {}
    for name, entry in entries.items():
        other_entry = digests.setdefault(entry.source, entry)
        if entry.sha256 and other_entry.sha256 and entry.sha256 != other_entry.sha256:
            raise ValueError(f"{name} and {other_entry.name}: one source with two sha256")
    return entries


def _entry(name: str, rows: Mapping[str, CatalogueRow], names: Mapping[str, str]) -> CatalogueEntry:
    """Return the entry of a name, with what it has from the entries that its source names."""
    found = rows[name]
    path = [name]
    while scheme_of(found.source) == CATALOGUE:
        other = unquote(found.source.partition("://")[2])
        target = names.get(other.casefold())
        if target is None:
            nearest = ", ".join(nearest_names(other, rows)) or "none"
            raise ValueError(
                f"{path[-1]}: its source {CATALOGUE}://{on_one_line(other)} is not in the "
                f"catalogue; the nearest names: {nearest}"
            )
        if target in path:
            circle = " -> ".join([*path[path.index(target) :], target])
            raise ValueError(f"{name}: its source leads back to itself: {circle}")
        path.append(target)
        if len(path) - 1 > _MAX_CHAIN:
            raise ValueError(f"{name}: its file is more than {_MAX_CHAIN} names away")
        origin = rows[target]
        if found.sha256 and origin.sha256 and found.sha256 != origin.sha256:
            raise ValueError(f"{path[-2]}: its sha256 is not that of {target}, whose file it names")
        found = structs.replace(
            found,
            source=origin.source,
            sha256=found.sha256 or origin.sha256,
            weight=origin.weight if found.weight is None else found.weight,
            trigger_words=(
                origin.trigger_words if found.trigger_words is None else found.trigger_words
            ),
            recipe=found.recipe or origin.recipe,
        )
    if scheme_of(Asset(url=found.source).address) not in _SCHEMES:
        raise ValueError(
            f"{name}: its source {without_secrets(found.source)} is not a URL of "
            f"{', '.join(_SCHEMES)}"
        )
    if found.recipe is not None:
        try:
            recipe_named(found.recipe)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if found.pinned and found.sha256 is None:
        raise ValueError(f"{name}: `pinned` needs `sha256`, so that the file is always the same")
    return CatalogueEntry(name=name, **structs.asdict(found))
