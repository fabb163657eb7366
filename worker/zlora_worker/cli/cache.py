"""`zlora cache ls|prune|verify`: list, prune and verify this machine's LoRA cache."""

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

import click
from msgspec import Struct
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from zlora.cli.exit_codes import writing
from zlora.cli.printing import json_option, print_json
from zlora.errors import InvalidSetting

from zlora_worker.settings import Settings

if TYPE_CHECKING:  # needs libraries that a producer alone does not have
    from zlora_worker.fetch.eviction import DiskBudget, Verdict

_MB: Final = 10**6
_DIGITS: Final = 12  # of a sha256 in the table
_WIDTH: Final = 240  # characters of a line if the output is not a terminal
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_AGE: Final = re.compile("([0-9]{1,9})([smhd]?)")


class FileRow(Struct, frozen=True, kw_only=True):
    """One file; `last_used` in epoch seconds, `sources` without secrets."""

    sha256: str
    size: int
    last_used: float
    in_use: bool
    sources: tuple[str, ...]


class Listing(Struct, frozen=True, kw_only=True):
    """A cache, the most recently used file first; sizes in bytes, `drafts` in progress."""

    folder: str
    files: tuple[FileRow, ...]
    drafts: int
    held: int
    max_bytes: int
    disk_free: int
    free_bytes: int


def _age(text: str) -> float:
    """Return an age such as `15m` in seconds."""
    if (found := _AGE.fullmatch(text)) is None:
        raise click.BadParameter(
            f"{text!r} is not a number of seconds, or a number with s, m, h or d"
        )
    return float(found[1]) * _SECONDS[found[2]]


@click.group()
def cache() -> None:
    """List, prune or verify this machine's LoRA cache."""


@cache.command()
@json_option
def ls(as_json: bool) -> None:
    """List the files, the most recently used first."""
    with _opened() as budget:
        listing = _listing(budget)
    if as_json:
        print_json(listing)
        return
    console = Console(width=None if os.isatty(1) else _WIDTH)
    console.print(_table(listing))
    console.print(
        f"{len(listing.files)} files, {_mb(listing.held)} of {_mb(listing.max_bytes)} MB, "
        f"{_mb(listing.drafts)} MB of downloads in progress; "
        f"{_mb(listing.disk_free)} MB of the disk are free, {_mb(listing.free_bytes)} MB stay free",
        highlight=False,
    )


@cache.command()
@click.option(
    "--max-bytes",
    type=click.IntRange(min=0),
    help="Evict until this many bytes are left. [default: the cache's cap]",
)
@click.option(
    "--older-than",
    type=_age,
    metavar="AGE",
    help="Evict only files not used for this long: seconds, or 15m, 12h, 7d.",
)
@click.option("--all", "everything", is_flag=True, help="Evict every file that is not in use.")
@json_option
def prune(max_bytes: int | None, older_than: float | None, everything: bool, as_json: bool) -> None:
    """Evict files, the least recently used first. Files in use stay."""
    if everything and (max_bytes, older_than) != (None, None):
        raise click.UsageError("--all cannot be combined with --max-bytes or --older-than")
    with _opened() as budget:
        if max_bytes is None:
            max_bytes = 0 if everything or older_than is not None else budget.max_bytes
        pruned = budget.prune(max_bytes=max_bytes, older_than=older_than or 0.0)
    if as_json:
        print_json(pruned)
        return
    text = f"{pruned.files} files evicted, {_mb(pruned.size)} MB"
    if pruned.in_use:
        text += f"; {pruned.in_use} in use"
    click.echo(text)


@cache.command()
@json_option
@click.pass_context
def verify(ctx: click.Context, as_json: bool) -> None:
    """Hash every file and delete damaged ones; exit status 1 if there were any."""
    console = Console(stderr=True)
    columns = (TextColumn("hashing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    with _opened() as budget, progress:
        bar = progress.add_task("", total=sum(1 for _ in budget.loras()))
        verdicts = dict[str, "Verdict"]()
        for sha256, verdict in budget.verify():
            verdicts[sha256] = verdict
            progress.advance(bar)
    damaged = {sha256: verdict for sha256, verdict in verdicts.items() if verdict != "sound"}
    if as_json:
        print_json(verdicts)
    else:
        for sha256, verdict in damaged.items():
            consequence = "deleted" if verdict == "dropped" else "cannot be deleted"
            click.echo(f"damaged, {consequence}: {sha256}")
        click.echo(f"{len(verdicts)} files, {len(damaged)} damaged")
    ctx.exit(1 if damaged else 0)


@contextmanager
def _opened() -> Iterator["DiskBudget"]:
    """Open the cache without creating or tidying anything: its owner is the worker's user."""
    if not all(map(find_spec, ("requests", "ssrfguard"))):
        raise InvalidSetting(
            "the LoRA cache needs the worker: pip install 'z-image-lora[worker]'",
            {"name": "worker"},
        )
    from zlora_worker.fetch.eviction import DiskBudget

    settings = Settings.from_env()
    folder = settings.cache_folder
    with writing(folder):
        if not (folder / "files").is_dir():
            click.echo(f"{folder}: there is no LoRA cache yet", err=True)
        yield DiskBudget(
            folder=folder, max_bytes=settings.lora_cache_bytes, free_bytes=settings.lora_free_bytes
        )


def _listing(budget: "DiskBudget") -> Listing:
    from zlora_worker.fetch.cache_index import CacheIndex
    from zlora_worker.fetch.eviction import listed
    from zlora_worker.fetch.file_lock import unused

    sources = dict[str, set[str]]()
    for _, entry in CacheIndex(budget.folder, credentials_fingerprint="").entries():
        sources.setdefault(entry.sha256, set()).add(entry.source)
    rows = []
    for found, path in sorted(budget.loras(), key=lambda item: -item[0].st_atime_ns):
        with unused(path) as is_unused:
            row = FileRow(
                sha256=path.stem,
                size=found.st_size,
                last_used=found.st_atime,
                in_use=not is_unused,
                sources=tuple(sorted(sources.get(path.stem, ()))),
            )
            rows.append(row)
    return Listing(
        folder=str(budget.folder),
        files=tuple(rows),
        drafts=sum(entry.st_size for entry, _ in listed(budget.drafts)),
        held=budget.used,
        max_bytes=budget.max_bytes,
        disk_free=budget.free,
        free_bytes=budget.free_bytes,
    )


def _table(listing: Listing) -> Table:
    # `Text` shows addresses as they are: rich would read [red] in one as markup
    table = Table(
        "sha256", "MB", "last used", "in use", "sources", title=Text(listing.folder), box=None
    )
    for row in listing.files:
        sources = Text("\n".join(row.sources) or "unknown", overflow="fold")
        ago = _ago(time.time() - row.last_used)
        used = "now" if row.in_use else ""
        table.add_row(row.sha256[:_DIGITS], _mb(row.size), ago, used, sources)
    return table


def _ago(seconds: float) -> str:
    unit = next((unit for unit in "dhm" if seconds >= _SECONDS[unit]), "s")
    return f"{max(0, int(seconds / _SECONDS[unit]))} {unit} ago"


def _mb(size: int) -> str:
    return f"{size / _MB:,.1f}"
