"""`zlora cache`: ls, prune and verify."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from click.testing import CliRunner, Result
from support.servers import by_path, caching, digest, got, kept, lora_bytes, named, serving
from zlora.cli import main
from zlora.schema import Asset
from zlora_worker.fetch import cache_index
from zlora_worker.fetch.cache import Cache

ONE, TWO, THREE = (lora_bytes(fill) for fill in (1, 2, 3))
SIZE = len(ONE)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cache]:
    """Yield the cache of this environment with files that were used 20, 10 and 5 minutes ago."""
    for name in [name for name in os.environ if name.startswith("ZLORA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("ZLORA_HOME", str(tmp_path))
    with (
        serving(by_path({"/a": ONE, "/%5Bred%5Db": TWO, "/c": THREE, "/again": ONE})) as host,
        caching(tmp_path, host) as opened,
    ):
        for name, minutes in (("a", 20), ("again", 20), ("[red]b", 10), ("c", 5)):
            path = got(opened, Asset(url=f"{host.url}/{name}?X-Amz-Signature=s3cret")).path
            then = time.time() - 60 * minutes
            os.utime(path, (then, path.stat().st_mtime))
        yield opened


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["cache", *arguments])


def held(data: bytes) -> Asset:
    """Asset of a job that needs no source for it."""
    return Asset(url="https://nowhere.invalid/a", sha256=digest(data))


# --- ls


@pytest.mark.usefixtures("cache")
def test_ls_shows_files_with_their_sources_and_without_secrets() -> None:
    """The most recently used first; an address is not read as markup."""
    result = run("ls")

    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.output.splitlines()]
    rows = {line[0]: line for line in lines if line and len(line[0]) == 12}
    assert list(rows) == [digest(data)[:12] for data in (THREE, TWO, ONE)]
    assert rows[digest(THREE)[:12]][1:5] == ["0.0", "5", "m", "ago"]
    assert all(
        any(word.endswith(name) for line in lines for word in line)
        for name in ("/a", "/again", "/c", "/[red]b")
    )
    assert "3 files, 0.0 of 20,000.0 MB" in result.output
    assert "s3cret" not in result.output


def test_ls_json_has_all_facts(cache: Cache, tmp_path: Path) -> None:
    with cache.files([held(ONE)]):
        listing = json.loads(run("ls", "--json").output)

    assert [(row["sha256"], row["size"], row["in_use"]) for row in listing["files"]] == [
        (digest(ONE), SIZE, True),
        (digest(THREE), SIZE, False),
        (digest(TWO), SIZE, False),
    ]
    assert [source.rpartition("/")[2] for source in listing["files"][0]["sources"]] == [
        "a",
        "again",
    ]
    assert listing["files"][1]["last_used"] == pytest.approx(time.time() - 300, abs=60)
    assert (listing["held"], listing["drafts"], listing["max_bytes"]) == (
        3 * SIZE,
        0,
        20_000_000_000,
    )
    assert listing["folder"] == str(tmp_path / "loras")


@pytest.mark.parametrize("data", [ONE, TWO])
def test_ls_marks_files_in_use(cache: Cache, data: bytes) -> None:
    with cache.files([held(data)]):
        output = run("ls").output

    (line,) = (line for line in output.splitlines() if " now" in line)
    assert line.split()[0] == digest(data)[:12]
    assert " now" not in run("ls").output


def test_ls_of_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZLORA_HOME", str(tmp_path))

    (tmp_path / "loras").mkdir()

    assert "0 files" in run("ls").output
    assert json.loads(run("ls", "--json").stdout)["files"] == []


def test_ls_and_verify_do_not_count_as_uses(cache: Cache) -> None:
    before = {path: path.stat().st_atime_ns for path in cache.budget.files.iterdir()}
    run("ls")
    run("verify")

    assert {path: path.stat().st_atime_ns for path in cache.budget.files.iterdir()} == before


# --- prune


@pytest.mark.parametrize(
    ("options", "left"),
    [
        ([], [ONE, TWO, THREE]),
        (["--max-bytes", str(2 * SIZE)], [TWO, THREE]),
        (["--max-bytes", "0"], []),
        (["--older-than", "15m"], [TWO, THREE]),
        (["--older-than", "420"], [THREE]),
        (["--older-than", "1d"], [ONE, TWO, THREE]),
        (["--older-than", "7m", "--max-bytes", str(2 * SIZE)], [TWO, THREE]),
        (["--all"], []),
    ],
)
def test_prune_evicts_what_its_options_say(
    cache: Cache, tmp_path: Path, options: list[str], left: list[bytes]
) -> None:
    result = run("prune", *options)

    assert result.exit_code == 0, result.output
    assert result.output == f"{3 - len(left)} files evicted, 0.0 MB\n"
    assert kept(tmp_path) == named(*left)
    assert len(list(cache.budget.files.iterdir())) == len(left)


def test_prune_without_options_prunes_to_the_cap(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here after an operator has lowered it."""
    monkeypatch.setenv("ZLORA_LORA_CACHE_BYTES", str(SIZE))
    run("prune")

    assert kept(tmp_path) == named(THREE)
    assert cache.budget.used == SIZE


def test_prune_keeps_files_in_use(cache: Cache, tmp_path: Path) -> None:
    with cache.files([held(TWO)]):
        assert run("prune", "--all").output == "2 files evicted, 0.0 MB; 1 in use\n"
        assert kept(tmp_path) == named(TWO)


@pytest.mark.parametrize(
    "options",
    [
        ["--older-than", "soon"],
        ["--max-bytes", "-1"],
        ["--all", "--max-bytes", "5"],
        ["--all", "--older-than", "0"],
    ],
)
def test_prune_with_invalid_options_evicts_nothing(
    cache: Cache, tmp_path: Path, options: list[str]
) -> None:
    assert run("prune", *options).exit_code == 2
    assert len(kept(tmp_path)) == len(list(cache.budget.verify())) == 3


# --- verify


def test_verify_accepts_undamaged_files(cache: Cache) -> None:
    result = run("verify")

    assert (result.exit_code, result.output) == (0, "3 files, 0 damaged\n")
    assert cache.budget.used == 3 * SIZE


def test_verify_names_and_deletes_damaged_files_and_exits_with_1(
    cache: Cache, tmp_path: Path
) -> None:
    """Although the file is in use, and its size and times are unchanged."""
    path = cache.file(digest(TWO))
    found = path.stat()
    with cache.files([held(TWO)]):
        path.write_bytes(bytes(SIZE))
        os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
        result = run("verify")

    assert result.exit_code == 1
    assert result.output == f"damaged, deleted: {digest(TWO)}\n3 files, 1 damaged\n"
    assert kept(tmp_path) == named(ONE, THREE)
    assert run("verify").exit_code == 0


# --- missing folders, foreign files, read-only disks, other users


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ls"], "0 files, 0.0 of 20,000.0 MB"),
        (["ls", "--json"], '"files": []'),
        (["prune", "--all"], "0 files evicted, 0.0 MB"),
        (["verify"], "0 files, 0 damaged"),
    ],
)
@pytest.mark.parametrize("made", ["", "loras"])
def test_no_command_creates_a_missing_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str, made: str
) -> None:
    """Its folders would belong to another user than the worker's."""
    monkeypatch.setenv("ZLORA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ZLORA_LORA_CACHE", raising=False)
    (tmp_path / "home" / made).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    result = run(*arguments)

    assert result.exit_code == 0, result.output
    assert said in result.stdout
    assert result.stderr == f"{tmp_path / 'home/loras'}: there is no LoRA cache yet\n"
    assert sorted(tmp_path.rglob("*")) == before


def test_foreign_files_are_not_listed_and_stay(cache: Cache) -> None:
    foreign = [cache.budget.files / name for name in ("README", "folder")]
    foreign[0].write_text("Do not delete")
    foreign[1].mkdir()

    assert len(json.loads(run("ls", "--json").output)["files"]) == 3
    assert run("verify").output == "3 files, 0 damaged\n"
    assert run("prune", "--all").output == "3 files evicted, 0.0 MB\n"
    assert sorted(cache.budget.files.iterdir()) == foreign


@pytest.fixture
def read_only(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """Act as if the cache were on a read-only mount."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def opened(path: str, flags: int, *more: Any, **options: Any) -> int:
        if flags & (os.O_CREAT | os.O_RDWR | os.O_WRONLY):
            refuse()
        return os_open(path, flags, *more, **options)

    os_open = os.open
    monkeypatch.setattr(os, "open", opened)
    for name in ("mkdir", "replace", "unlink", "utime"):
        monkeypatch.setattr(os, name, refuse)
    return cache


def test_a_read_only_cache_can_be_listed_and_verified(read_only: Cache) -> None:
    path = read_only.file(digest(TWO))
    assert len(json.loads(run("ls", "--json").output)["files"]) == 3
    assert run("verify").output == "3 files, 0 damaged\n"

    path.write_bytes(bytes(SIZE))
    result = run("verify")
    assert result.exit_code == 1
    assert result.output == f"damaged, cannot be deleted: {digest(TWO)}\n3 files, 1 damaged\n"
    assert path.exists()


@pytest.mark.usefixtures("read_only")
def test_prune_of_a_read_only_cache_fails(tmp_path: Path) -> None:
    result = run("prune", "--all")

    assert (result.exit_code, result.output) == (
        73,
        f"Error: {tmp_path / 'loras'}: Read-only file system [cannot_write]\n",
    )
    assert kept(tmp_path) == named(ONE, TWO, THREE)


def test_sources_that_this_user_may_not_read_are_left_out(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are listed all the same."""

    def open_regular(path: Path) -> BinaryIO:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(cache_index, "open_regular", open_regular)
    rows = json.loads(run("ls", "--json").output)["files"]

    assert [(row["sha256"], row["sources"]) for row in rows] == [
        (digest(data), []) for data in (THREE, TWO, ONE)
    ]
    assert cache.budget.used == 3 * SIZE


def test_prune_and_verify_have_json_output(cache: Cache) -> None:
    cache.file(digest(TWO)).write_bytes(bytes(SIZE))

    verified = run("verify", "--json")
    pruned = run("prune", "--all", "--json")

    assert json.loads(verified.stdout) == {
        digest(ONE): "sound",
        digest(TWO): "dropped",
        digest(THREE): "sound",
    }
    assert verified.exit_code == 1
    assert json.loads(pruned.stdout) == {"files": 2, "size": 2 * SIZE, "in_use": 0}


# --- start


def test_an_invalid_setting_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZLORA_LORA_CACHE_BYTES", "many")
    result = run("ls")

    assert result.exit_code == 78
    assert "ZLORA_LORA_CACHE_BYTES" in result.output
    told = run("verify", "--json")
    assert (told.exit_code, json.loads(told.stdout)["error"]["code"]) == (78, "invalid_setting")


def test_the_command_imports_no_library_of_the_worker() -> None:
    """`zlora` imports the module at each start, even if only the producer is installed."""
    code = "import sys, zlora_worker.cli.cache; print(sorted(sys.modules))"
    modules = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout

    assert not [
        name
        for name in ("torch", "boto3", "requests", "ssrfguard", "diffusers")
        if f"'{name}'" in modules
    ]
