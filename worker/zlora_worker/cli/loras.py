"""`zlora loras list|show|check|add`: the catalogue of LoRAs of this machine's workers."""

import json
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import click
import msgspec
from msgspec import Struct, structs
from zlora import config
from zlora.cli.exit_codes import writing
from zlora.cli.printing import json_option, print_facts, print_json
from zlora.errors import InvalidSetting, LoraError, LoraMismatch
from zlora.files import write_atomically
from zlora.lora import base_model
from zlora.lora.addresses import CATALOGUE, WORKER_SCHEMES, scheme_of
from zlora.lora.base_model import EMBEDDING, LoraInfo
from zlora.lora.catalogue import Catalogue, CatalogueEntry, CatalogueRow, parse_rows, read_text
from zlora.redaction import on_one_line, without_secrets
from zlora.schema import Asset

from zlora_worker.settings import DEMO_CATALOGUE, Settings

_base_option: Final = click.option(
    "--base",
    type=click.Choice(base_model.FAMILIES),
    default=base_model.SDXL,
    show_default=True,
    help="Family of the workers' base model, for which the files must be.",
)
_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)  # that TOML needs no quotes for


class Checked(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was found at the source of an entry; `code` and `error` if it cannot be used."""

    name: str
    source: str
    kind: str = "LoRA"
    base: str | None = None
    size: int | None = None
    sha256: str | None = None
    trigger_words: tuple[str, ...] = ()
    code: str | None = None
    error: str | None = None


@click.group()
@click.option(
    "--catalogue",
    "file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File of the catalogue.  [default: ZLORA_CATALOGUE, or that of the demo model]",
)
@click.pass_context
def loras(ctx: click.Context, file: Path | None) -> None:
    """List, show, check or add LoRAs of a catalogue."""
    if file is None:
        if name := config.value_of(os.environ, config.CATALOGUE):
            file = Path(name)
        elif os.environ.get("ZLORA_MODEL") == "demo":
            file = DEMO_CATALOGUE
        else:
            raise click.UsageError("There is no catalogue: set ZLORA_CATALOGUE, or --catalogue.")
    ctx.obj = file


@loras.command("list")
@json_option
@click.pass_obj
def list_(file: Path, as_json: bool) -> None:
    """List the names, each with its source and weight."""
    entries = _opened(file).entries.values()
    if as_json:
        print_json([_public(entry) for entry in entries])
        return
    print_facts([(entry.name, ", ".join(_summary(entry))) for entry in entries])


@loras.command()
@click.argument("name")
@json_option
@click.pass_obj
def show(file: Path, name: str, as_json: bool) -> None:
    """Show everything that the catalogue says of NAME."""
    entry = _public(_opened(file).find(name))
    if as_json:
        print_json(entry)
        return
    facts: dict[str, Any] = {"name": entry.name} | msgspec.to_builtins(entry)
    facts |= {"trigger_words": ", ".join(entry.words)}
    print_facts(
        [(field.replace("_", " "), str(value)) for field, value in facts.items() if value != ""]
    )


@loras.command()
@click.argument("names", nargs=-1)
@click.option("--fetch", is_flag=True, help="Download each file into the cache, and hash it.")
@_base_option
@json_option
@click.pass_context
def check(ctx: click.Context, names: Sequence[str], fetch: bool, base: str, as_json: bool) -> None:
    """Read the header of each file, or of NAMES; exit status 1 if one cannot be used.

    Files that only a worker opens are downloaded into the cache with the worker's settings, as all
    are with --fetch.
    """
    catalogue = _opened(ctx.obj)
    entries = [catalogue.find(name) for name in names] or list(catalogue.entries.values())
    found = [_check(entry, fetch=fetch, base=base) for entry in entries]
    if as_json:
        print_json(found)
    else:
        for one in found:
            made_for = one.base or "of a base that its header does not name"
            told = one.error or f"{one.kind}, {made_for}, {one.size:,} bytes"
            click.echo(f"{one.name}: {on_one_line(told)}")
    ctx.exit(1 if any(one.error for one in found) else 0)


@loras.command()
@click.argument("name")
@click.argument("source")
@click.option("--sha256", help="Checksum of the file.  [default: that of a downloaded file]")
@click.option("--weight", type=float, help="Strength for requests that name none.")
@click.option(
    "--trigger-word",
    "trigger_words",
    multiple=True,
    metavar="TEXT",
    help="Words for the prompt, may be repeated.  [default: those of the header]",
)
@click.option("--recipe", help="Few-step recipe that the LoRA was made for.")
@click.option("--notes", default="", help="Text for people.")
@click.option("--pinned", is_flag=True, help="Keep the LoRA in the memory of each worker.")
@click.option("--fetch", is_flag=True, help="Download the file into the cache, and hash it.")
@_base_option
@click.option("--no-check", is_flag=True, help="Do not look at the source.")
@click.pass_obj
def add(
    file: Path,
    /,
    *,
    name: str,
    source: str,
    fetch: bool,
    base: str,
    no_check: bool,
    **fields: Any,
) -> None:
    """Add NAME for the LoRA at SOURCE, an address or `lora://` and another name.

    The header of the file is read first. The file of the catalogue is made if there is none.
    """
    if file == DEMO_CATALOGUE:
        raise click.UsageError(
            "The catalogue of the demo model is part of the package: set ZLORA_CATALOGUE, or "
            "--catalogue."
        )
    given = {
        field: value
        for field, value in fields.items()
        if value is not None and value is not False and value not in ((), "")  # 0 is a weight
    }
    try:
        row = msgspec.convert({"source": source, **given}, CatalogueRow)
        text = read_text(file) if file.exists() else ""
        rows = parse_rows(text)
        Catalogue({**rows, name: structs.replace(row, pinned=False)})
    except ValueError as error:
        raise click.UsageError(on_one_line(error)) from None
    if name in rows:
        raise click.UsageError(f"{name}: there is a LoRA of this name already")
    if not no_check and scheme_of(source) != CATALOGUE:
        info, sha256 = _inspect(
            Asset(url=source, sha256=row.sha256),
            fetch=fetch or (row.pinned and not row.sha256),
            base=base,
        )
        row = structs.replace(row, sha256=row.sha256 or sha256)
        if row.trigger_words is None and info.trigger_words:
            row = structs.replace(row, trigger_words=info.trigger_words)
    text = f"{text.rstrip()}\n\n{_toml(name, row)}".lstrip()
    try:
        Catalogue(parse_rows(text))
        data = text.encode()  # fails for bytes of the command line that are no text
    except ValueError as error:
        raise click.UsageError(on_one_line(error)) from None
    with writing(file):
        write_atomically(file, data)
    click.echo(f"{file}: {name} is added")


def _opened(file: Path) -> Catalogue:
    return Catalogue.load(file, variable=config.CATALOGUE)


def _public(entry: CatalogueEntry) -> CatalogueEntry:
    """Return an entry without the secrets of its source."""
    return structs.replace(entry, source=without_secrets(entry.source))


def _summary(entry: CatalogueEntry) -> list[str]:
    facts = [without_secrets(entry.source)]
    if entry.weight is not None:
        facts.append(f"weight {entry.weight:g}")
    facts += entry.words
    if entry.recipe:
        facts.append(f"recipe {entry.recipe}")
    if entry.pinned:
        facts.append("pinned")
    return facts


def _check(entry: CatalogueEntry, *, fetch: bool, base: str) -> Checked:
    source = without_secrets(entry.source)
    try:
        info, sha256 = _inspect(entry.asset, fetch=fetch, base=base)
    except LoraError as error:
        return Checked(name=entry.name, source=source, code=error.code, error=str(error))
    return Checked(
        name=entry.name,
        source=source,
        kind="embedding" if EMBEDDING in info.kinds else "LoRA",
        base=info.base,
        size=info.size,
        sha256=sha256,
        trigger_words=info.trigger_words,
    )


def _inspect(asset: Asset, *, fetch: bool, base: str) -> tuple[LoraInfo, str | None]:
    """Describe the file of an entry; return its sha256 if it was downloaded.

    Raises a `LoraError`, also for a LoRA that was made for another base model than `base`.
    """
    from zlora.lora.preflight import Preflight

    if not fetch and scheme_of(asset.address) not in WORKER_SCHEMES:
        info, sha256 = Preflight.from_env().inspect(asset), None
    else:
        info, sha256 = _fetched(asset)
    if info.base is not None and not base_model.is_for(info.base, base):
        raise LoraMismatch(f"{info.source}: made for {info.base}, not for {base}")
    return info, sha256


def _fetched(asset: Asset) -> tuple[LoraInfo, str]:
    """Describe a file that is downloaded into the cache as a worker does it."""
    if not all(map(find_spec, ("requests", "ssrfguard", "boto3"))):
        raise InvalidSetting(
            "files are downloaded by the worker's code: pip install '.[worker]'",
            {"name": "worker"},
        )
    from zlora.lora.preflight import describe
    from zlora.lora.safetensors_header import read_header

    from zlora_worker.fetch.cache import Cache

    # the file of the catalogue may not exist yet
    settings = Settings.from_env({**os.environ, config.CATALOGUE: ""})
    with Cache.open(settings).files([asset]) as (file,):
        header = read_header(file.path)
        return describe(header, source=file.source, size=file.size), file.sha256


def _toml(name: str, row: CatalogueRow) -> str:
    """Return the table of a row; a string of TOML is written as one of JSON."""
    key = name if _BARE_KEY.fullmatch(name) else json.dumps(name, ensure_ascii=False)
    document = msgspec.to_builtins(row)
    lines = [
        f"{field} = {json.dumps(value, ensure_ascii=False)}" for field, value in document.items()
    ]
    return "\n".join([f"[loras.{key}]", *lines, ""])
