"""`zlora cache ls|prune|verify`: what the LoRA cache of this machine holds, beside the workers that use it."""

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

if TYPE_CHECKING:  # it needs what a producer alone has not, and `zlora` starts without
    from zlora_worker.fetch.eviction import DiskBudget, Verdict

_MB: Final = 10**6
_DIGITS: Final = 12  # of a sha256, for people
_WIDTH: Final = 240  # characters where no terminal says
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_AGE: Final = re.compile("([0-9]{1,9})([smhd]?)")


class FileRow(Struct, frozen=True, kw_only=True):
    """One file. `last_used` is in seconds since the epoch; `sources` have no secrets."""

    sha256: str
    size: int
    last_used: float
    in_use: bool
    sources: tuple[str, ...]


class Listing(Struct, frozen=True, kw_only=True):
    """A cache: the most recently used first. Sizes are in bytes; `drafts` are downloads on their way."""

    folder: str
    files: tuple[FileRow, ...]
    drafts: int
    held: int
    max_bytes: int
    disk_free: int
    free_bytes: int


def _age(text: str) -> float:
    """Seconds."""
    if (found := _AGE.fullmatch(text)) is None:
        raise click.BadParameter(f"{text!r} is no number of seconds, nor one with s, m, h or d")
    return float(found[1]) * _SECONDS[found[2]]


@click.group()
def cache() -> None:
    """Look at this machine's LoRA cache, make room in it, or check its files."""


@cache.command()
@json_option
def ls(as_json: bool) -> None:
    """List the files, the most recently used first."""
    with _opened() as space:
        listing = _listing(space)
    if as_json:
        print_json(listing)
        return
    console = Console(width=None if os.isatty(1) else _WIDTH)
    console.print(_table(listing))
    console.print(
        f"{len(listing.files)} files, {_mb(listing.held)} of {_mb(listing.max_bytes)} MB, "
        f"{_mb(listing.drafts)} of them on their way; "
        f"{_mb(listing.disk_free)} MB of the disk are free, {_mb(listing.free_bytes)} stay free",
        highlight=False,
    )


@cache.command()
@click.option(
    "--max-bytes",
    type=click.IntRange(min=0),
    help="Until so many are left. [default: the cache's cap]",
)
@click.option(
    "--older-than",
    type=_age,
    metavar="AGE",
    help="What was not used for so long: seconds, or 15m, 12h, 7d.",
)
@click.option("--all", "everything", is_flag=True, help="Whatever is not in use.")
@json_option
def prune(max_bytes: int | None, older_than: float | None, everything: bool, as_json: bool) -> None:
    """Let files go, the least recently used first. Those that a worker uses stay."""
    if everything and (max_bytes, older_than) != (None, None):
        raise click.UsageError("--all leaves nothing to choose")
    with _opened() as space:
        if max_bytes is None:
            max_bytes = 0 if everything or older_than is not None else space.max_bytes
        pruned = space.prune(max_bytes=max_bytes, older_than=older_than or 0.0)
    if as_json:
        print_json(pruned)
        return
    stayed = f"; {pruned.in_use} are in use and stayed" if pruned.in_use else ""
    click.echo(f"{pruned.files} files went, {_mb(pruned.size)} MB{stayed}")


@cache.command()
@json_option
@click.pass_context
def verify(ctx: click.Context, as_json: bool) -> None:
    """Hash every file and drop the damaged ones; exit status 1 where there were some."""
    console = Console(stderr=True)
    columns = (TextColumn("hashing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    with _opened() as space, progress:
        bar = progress.add_task("", total=sum(1 for _ in space.loras()))
        verdicts = dict[str, "Verdict"]()
        for sha256, verdict in space.verify():
            verdicts[sha256] = verdict
            progress.advance(bar)
    damaged = {sha256: verdict for sha256, verdict in verdicts.items() if verdict != "sound"}
    if as_json:
        print_json(verdicts)
    else:
        for sha256, verdict in damaged.items():
            click.echo(
                f"damaged, and {'dropped' if verdict == 'dropped' else 'cannot be dropped'}: {sha256}"
            )
        click.echo(f"{len(verdicts)} files, {len(verdicts) - len(damaged)} of them sound")
    ctx.exit(1 if damaged else 0)


@contextmanager
def _opened() -> Iterator["DiskBudget"]:
    """The cache of this environment as it is; what is made or tidied by this user may be out of a worker's reach."""
    if not all(map(find_spec, ("requests", "ssrfguard"))):
        raise InvalidSetting(
            "the cache is the worker's: pip install 'z-image-lora[worker]'", {"name": "worker"}
        )
    from zlora_worker.fetch.eviction import DiskBudget

    settings = Settings.from_env()
    folder = settings.cache_folder
    with writing(folder):
        if not (folder / "files").is_dir():
            click.echo(f"{folder}: there is no LoRA cache yet", err=True)
        yield DiskBudget.under(
            folder, max_bytes=settings.lora_cache_bytes, free_bytes=settings.lora_free_bytes
        )


def _listing(space: "DiskBudget") -> Listing:
    from zlora_worker.fetch.cache_index import CacheIndex
    from zlora_worker.fetch.eviction import listed
    from zlora_worker.fetch.file_lock import unused

    folder, sources = space.files.parent, dict[str, set[str]]()
    for _, entry in CacheIndex(folder, asker="").entries():
        sources.setdefault(entry.sha256, set()).add(entry.source)
    rows = []
    for found, path in sorted(space.loras(), key=lambda item: -item[0].st_atime_ns):
        with unused(path) as free:
            names = tuple(sorted(sources.get(path.stem, ())))
            rows.append(
                FileRow(
                    sha256=path.stem,
                    size=found.st_size,
                    last_used=found.st_atime,
                    in_use=not free,
                    sources=names,
                )
            )
    return Listing(
        folder=str(folder),
        files=tuple(rows),
        drafts=sum(entry.st_size for entry, _ in listed(space.drafts)),
        held=space.held,
        max_bytes=space.max_bytes,
        disk_free=space.free,
        free_bytes=space.free_bytes,
    )


def _table(listing: Listing) -> Table:
    """A stranger's words are shown as they are: none of them is markup."""
    table = Table(
        "sha256", "MB", "last used", "in use", "sources", title=Text(listing.folder), box=None
    )
    for row in listing.files:
        sources = Text("\n".join(row.sources) or "not known any more", overflow="fold")
        used = "now" if row.in_use else ""
        table.add_row(
            row.sha256[:_DIGITS], _mb(row.size), _ago(time.time() - row.last_used), used, sources
        )
    return table


def _ago(seconds: float) -> str:
    unit = next((unit for unit in "dhm" if seconds >= _SECONDS[unit]), "s")
    return f"{max(0, int(seconds / _SECONDS[unit]))} {unit} ago"


def _mb(size: int) -> str:
    return f"{size / _MB:,.1f}"
