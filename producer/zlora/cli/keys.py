"""`zlora keys add|list|revoke`: the API keys of `zlora serve`."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec
from msgspec import structs

from zlora.cli.exit_codes import status_of, writing
from zlora.cli.printing import json_option, print_json
from zlora.errors import InvalidSetting, JobUnknown
from zlora.redaction import on_one_line
from zlora.schema import invalid
from zlora.server import tenants
from zlora.server.settings import key_file
from zlora.server.tenants import MAX_JOBS, Key, KeyFile, Tenant, check_source, check_tenant


@click.group()
def keys() -> None:
    """Add, list or revoke the API keys of `zlora serve`.

    They are in the file ZLORA_API_KEYS, which has no key itself, only its SHA-256. A running server
    reads the file again when it has changed.
    """


@keys.command()
@click.argument("tenant")
@click.option(
    "--max-jobs",
    type=click.IntRange(1, MAX_JOBS),
    help="Jobs that may be queued or running at once.",
)
@click.option("--requests-per-minute", type=click.IntRange(min=1), help="Requests in any minute.")
@click.option(
    "--source",
    "sources",
    multiple=True,
    help="Beginning of the addresses of files, up to a /, such as hf://owner/; may be repeated.",
)
@click.option(
    "--catalogue",
    multiple=True,
    help="Name in the catalogue, or a pattern such as 'anime-*'; may be repeated.",
)
@click.option("--model", "models", multiple=True, help="Name of a base model; may be repeated.")
@click.option("--reset", is_flag=True, help="Forget the limits that the tenant has.")
@json_option
def add(
    tenant: str,
    *,
    max_jobs: int | None,
    requests_per_minute: int | None,
    sources: tuple[str, ...],
    catalogue: tuple[str, ...],
    models: tuple[str, ...],
    reset: bool,
    as_json: bool,
) -> None:
    """Make a new key of a tenant, and print it, once.

    The limits are those of all keys of the tenant. Those that are not given stay as they are; a new
    tenant has none.
    """
    try:
        check_tenant(tenant)
    except ValueError as error:
        raise invalid("TENANT", tenant, str(error)) from None
    for source in sources:
        try:
            check_source(source)
        except ValueError as error:
            raise invalid("--source", source, str(error)) from None
    given = {
        "max_jobs": max_jobs,
        "requests_per_minute": requests_per_minute,
        "sources": sources,
        "catalogue": catalogue,
        "models": models,
    }
    limits = {name: value for name, value in given.items() if value}
    with _locked_file() as file:
        content = tenants.read(file) if file.exists() else KeyFile()
        known = Tenant() if reset else content.tenants.get(tenant, Tenant())
        text, key = tenants.new_key(tenant, now=time.time())
        while any(key.id == other.id for other in content.keys):
            text, key = tenants.new_key(tenant, now=time.time())
        changed = structs.replace(known, **limits)
        known_tenants = {**content.tenants, tenant: changed}
        tenants.write(file, KeyFile(tenants=known_tenants, keys=(*content.keys, key)))
    if as_json:
        print_json({"id": key.id, "tenant": tenant, "key": text})
    else:
        click.echo(text)


@keys.command("list")
@json_option
def list_keys(as_json: bool) -> None:
    """List the keys by their ids, with the limits of their tenants, never the keys themselves."""
    content = tenants.read(_file())
    if as_json:
        print_json([_described(key, content.tenants[key.tenant]) for key in content.keys])
        return
    for key in content.keys:
        limits = msgspec.to_builtins(content.tenants[key.tenant])
        words = [f"{name} {_shown(value)}" for name, value in limits.items()]
        created = datetime.fromtimestamp(key.created, UTC)
        line = f"{key.id}  {created:%Y-%m-%d %H:%M:%S}Z  {key.tenant}  {'; '.join(words)}"
        click.echo(on_one_line(line.rstrip()))


@keys.command()
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
@json_option
@click.pass_context
def revoke(ctx: click.Context, ids: tuple[str, ...], as_json: bool) -> None:
    """Revoke keys by their ids. The exit status is 66 if one of them is unknown.

    The tenant, its limits and its jobs stay, also without a key.
    """
    with _locked_file() as file:
        content = tenants.read(file)
        left = tuple(key for key in content.keys if key.id not in ids)
        known = {key.id for key in content.keys}
        tenants.write(file, structs.replace(content, keys=left))
    revoked = {name: name in known for name in dict.fromkeys(ids)}
    if as_json:
        print_json(revoked)
    else:
        for name, was_there in revoked.items():
            click.echo(on_one_line(f"{name}  {'revoked' if was_there else 'unknown'}"))
    if not all(revoked.values()):
        ctx.exit(status_of(JobUnknown))


def _file() -> Path:
    if (file := key_file(os.environ)) is None:
        message = f"{tenants.VARIABLE}: expected the path of the file of API keys"
        raise InvalidSetting(message, {"name": tenants.VARIABLE})
    return file


@contextmanager
def _locked_file() -> Iterator[Path]:
    """Yield the file, which no other command changes in the block."""
    file = _file()
    with writing(file):
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield file
        finally:
            os.close(folder)


def _described(key: Key, tenant: Tenant) -> dict[str, object]:
    shown = {"id": key.id, "tenant": key.tenant, "created": key.created}
    return {**shown, "limits": msgspec.to_builtins(tenant)}


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
