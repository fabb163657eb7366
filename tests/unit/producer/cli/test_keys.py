"""`zlora keys`, and what `zlora serve` refuses to start with."""

import json
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from zlora.cli import keys, main
from zlora.server.tenants import ApiKeys, Tenant, read


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Path of the file of keys."""
    return tmp_path / "keys.json"


def run(file: Path | None, *words: str, **variables: str) -> Result:
    """Run a command; `ZLORA_API_KEYS` names the file."""
    environ: dict[str, Any] = {"ZLORA_API_KEYS": str(file) if file else None, **variables}
    return CliRunner().invoke(main, words, env=environ)


def test_a_new_key_is_printed_once_and_found(file: Path) -> None:
    """The file, which only its owner may read, does not have it."""
    added = run(file, "keys", "add", "shop", "--max-jobs", "3", "--source", "hf://owner/")
    key = added.output.strip()

    assert added.exit_code == 0
    assert ApiKeys(file).find(key) == ("shop", Tenant(max_jobs=3, sources=("hf://owner/",)))
    assert ApiKeys(file).find(key[:-1]) is None
    assert key not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert key not in run(file, "keys", "list").output


def test_limits_that_are_not_given_stay(file: Path) -> None:
    """They are those of all keys of the tenant; `--reset` forgets them first."""
    run(file, "keys", "add", "shop", "--max-jobs", "3")
    run(file, "keys", "add", "shop", "--model", "a", "--model", "b", "--catalogue", "x-*")
    both = read(file).tenants
    run(file, "keys", "add", "shop", "--reset", "--requests-per-minute", "5")

    assert both == {"shop": Tenant(max_jobs=3, models=("a", "b"), catalogue=("x-*",))}
    assert read(file).tenants == {"shop": Tenant(requests_per_minute=5)}
    assert len(read(file).keys) == 3


def test_a_revoked_key_is_unknown_and_the_others_stay(file: Path) -> None:
    added = [json.loads(run(file, "keys", "add", "shop", "--json").output) for _ in range(2)]
    revoked = run(file, "keys", "revoke", added[0]["id"], "nope", "--json")

    assert revoked.exit_code == 66
    assert json.loads(revoked.output) == {added[0]["id"]: True, "nope": False}
    assert ApiKeys(file).find(added[0]["key"]) is None
    assert ApiKeys(file).find(added[1]["key"]) == ("shop", Tenant())
    (left,) = json.loads(run(file, "keys", "list", "--json").output)
    assert (left["id"], left["tenant"], left["limits"]) == (added[1]["id"], "shop", {})


def test_commands_at_the_same_time_lose_no_key(file: Path) -> None:
    threads = [
        threading.Thread(target=keys.add.main, args=([f"t{n}"], "add", None, False))
        for n in range(8)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZLORA_API_KEYS", str(file))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert {key.tenant for key in read(file).keys} == {f"t{n}" for n in range(8)}


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["../shop"], 65),
        (["a" * 41], 65),
        (["shop", "--source", "owner/repo"], 65),
        (["shop", "--source", "https://[::1/"], 65),
        (["shop", "--source", "https://host/../"], 65),
        (["shop", "--max-jobs", "0"], 2),
        (["shop", "--max-jobs", "10001"], 2),
        (["shop", "--requests-per-minute", "-1"], 2),
    ],
)
def test_what_no_key_can_have_is_refused(file: Path, words: list[str], status: int) -> None:
    """The file stays as it was."""
    run(file, "keys", "add", "other")
    before = file.read_bytes()

    assert run(file, "keys", "add", *words).exit_code == status
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"tenants": {"a": {"max_job": 1}}}',
        '{"tenants": {"../a": {}}}',
        '{"tenants": {"local": {}}}',
        '{"tenants": {"a": {"sources": ["owner"]}}}',
        '{"keys": [{"id": "x", "sha256": "0", "tenant": "a", "created": 1}]}',
        '{"keys": [{"id": "x", "sha256": "' + "0" * 64 + '", "tenant": "a", "created": 1}]}',
        '{"tenants": ' + "[" * 100_000,
        " " * 2_000_000,
    ],
    ids=lambda content: content[:40],
)
def test_a_broken_file_is_a_wrong_setting(file: Path, content: str) -> None:
    """Neither a command nor a server goes on with a part of it, and no command replaces it."""
    file.write_text(content)

    for words in (["keys", "add", "a"], ["keys", "list"], ["keys", "revoke", "x"], ["serve"]):
        found = run(file, *words)
        assert found.exit_code == 78, found.output
        assert "ZLORA_API_KEYS" in found.output
    assert file.read_text() == content


def test_a_server_without_keys_is_for_this_machine(file: Path, tmp_path: Path) -> None:
    """Also wrong settings end it before it listens."""
    certificate = tmp_path / "certificate.pem"
    certificate.write_text("none")
    for host in ("0.0.0.0", "", "::", "10.0.0.1", "example.org"):  # noqa: S104 - must be refused
        assert run(None, "serve", "--host", host).exit_code == 78
    assert run(None, "serve", ZLORA_API_KEYS_FILE=str(file)).exit_code == 78
    assert run(None, "serve", ZLORA_HTTP_ORIGINS="https://a.example/path").exit_code == 78
    assert run(None, "serve", "--certificate", str(certificate)).exit_code == 78
    assert run(file, "serve").exit_code == 78  # there is no such file
