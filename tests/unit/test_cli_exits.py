"""How commands end: one status a class of errors, one line or one document for each."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from zlora import errors
from zlora.cli import connection, exits, main
from zlora.errors import ZloraError

DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
CLASSES: list[type[ZloraError]] = [getattr(errors, name) for name in errors.__all__]


def ending(monkeypatch: pytest.MonkeyPatch, end: BaseException, *options: str) -> Result:
    """A command that ends so."""

    def client() -> Any:
        raise end

    monkeypatch.setattr(connection, "client", client)
    return CliRunner().invoke(main, ["submit", "a city", *options])


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not ZloraError])
def test_the_table_has_every_class_of_errors_or_its_parent(cls: type[ZloraError]) -> None:
    assert set(cls.__mro__[:-3]) & set(exits.STATUSES)  # without ZloraError and above


@pytest.mark.parametrize("cls", CLASSES)
def test_75_is_what_may_succeed_later(cls: type[ZloraError]) -> None:
    assert (exits.status_of(cls) == 75) == cls.retryable


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_is_one_line_and_its_status(monkeypatch: pytest.MonkeyPatch, cls: type[ZloraError]) -> None:
    result = ending(monkeypatch, cls("a sentence"))

    assert (result.exit_code, result.stdout) == (exits.status_of(cls), "")
    assert result.stderr == f"Error: a sentence [{cls.code}]\n"


@pytest.mark.parametrize("cls", CLASSES)
def test_with_json_an_error_is_one_document_and_the_same_status(
    monkeypatch: pytest.MonkeyPatch, cls: type[ZloraError]
) -> None:
    details = {"path": "$.loras[0]", "names": ["a", "\ud800"]}
    result = ending(monkeypatch, cls("a sentence", details), "--json")

    assert (result.exit_code, result.stderr) == (exits.status_of(cls), "")
    assert json.loads(result.stdout) == {
        "error": {"code": cls.code, "message": "a sentence", "retryable": cls.retryable, "details": details}
    }


def test_the_parent_s_status_holds_where_a_class_has_none() -> None:
    assert exits.status_of(errors.LoraMismatch) == exits.status_of(errors.LoraError) == 66
    assert exits.status_of(ZloraError) == 70


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ctrl_c_where_nothing_was_submitted_is_130(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    result = ending(monkeypatch, KeyboardInterrupt(), *options)

    assert result.exit_code == 130
    assert "interrupted" in (result.stdout if options else result.stderr)


def test_a_command_that_is_misspelt_is_told_with_status_2() -> None:
    result = CliRunner().invoke(main, ["sumbit"])

    assert result.exit_code == 2
    assert "sumbit" in result.stderr


def test_the_docs_have_the_table() -> None:
    rows = re.findall(r"^\| ([0-9]+) \| (.+?) \|", DOCS, re.MULTILINE)
    told = {name: int(status) for status, names in rows for name in re.findall(r"`([A-Z]\w+)`", names)}

    assert told == {kind.__name__: status for kind, status in exits.STATUSES.items()} | {"ZloraError": 70}


def test_the_docs_have_every_command() -> None:
    with main.make_context("zlora", ["up"]) as ctx:
        names = main.list_commands(ctx)

    assert not [name for name in names if f"`zlora {name}" not in DOCS]
