"""How commands end: one status a class of errors, one line or one document for each."""

import json
import os
import pty
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any, Self

import pytest
from click.testing import CliRunner, Result
from zlora import errors
from zlora.cli import connection, exit_codes, main
from zlora.errors import ZloraError
from zlora.testing import MemoryWorker

DOCS = (Path(__file__).parents[4] / "docs" / "cli.md").read_text()
CLASSES = errors.ERRORS


def ending(monkeypatch: pytest.MonkeyPatch, end: BaseException, *options: str) -> Result:
    """A command that ends so."""

    def client() -> Any:
        raise end

    monkeypatch.setattr(connection, "client", client)
    return CliRunner().invoke(main, ["submit", "a city", *options])


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not ZloraError])
def test_the_table_has_every_class_of_errors_or_its_parent(cls: type[ZloraError]) -> None:
    assert set(cls.__mro__[:-3]) & set(exit_codes.STATUSES)  # without ZloraError and above


@pytest.mark.parametrize("cls", CLASSES)
def test_75_is_what_may_succeed_later(cls: type[ZloraError]) -> None:
    assert (exit_codes.status_of(cls) == 75) == cls.retryable


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_is_one_line_and_its_status(
    monkeypatch: pytest.MonkeyPatch, cls: type[ZloraError]
) -> None:
    result = ending(monkeypatch, cls("a sentence"))

    assert (result.exit_code, result.stdout) == (exit_codes.status_of(cls), "")
    assert result.stderr == f"Error: a sentence [{cls.code}]\n"


@pytest.mark.parametrize("cls", CLASSES)
def test_with_json_an_error_is_one_document_and_the_same_status(
    monkeypatch: pytest.MonkeyPatch, cls: type[ZloraError]
) -> None:
    details = {"path": "$.loras[0]", "names": ["a", "\ud800"]}
    result = ending(monkeypatch, cls("a sentence", details), "--json")

    assert (result.exit_code, result.stderr) == (exit_codes.status_of(cls), "")
    assert json.loads(result.stdout) == {
        "error": {
            "code": cls.code,
            "message": "a sentence",
            "retryable": cls.retryable,
            "details": details,
        }
    }


def test_the_parent_s_status_holds_where_a_class_has_none() -> None:
    assert exit_codes.status_of(errors.LoraMismatch) == exit_codes.status_of(errors.LoraError) == 66
    assert exit_codes.status_of(ZloraError) == 70


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ctrl_c_where_nothing_was_submitted_is_130(
    monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    result = ending(monkeypatch, KeyboardInterrupt(), *options)

    assert result.exit_code == 130
    assert "interrupted" in (result.stdout if options else result.stderr)


def test_a_command_that_is_misspelt_is_told_with_status_2() -> None:
    result = CliRunner().invoke(main, ["sumbit"])

    assert result.exit_code == 2
    assert "sumbit" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["submit", "--stepz", "--json"], ["submit", "--json", "--steps", "x"]]
)
def test_with_json_what_makes_no_sense_is_a_document_too(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)

    assert (result.exit_code, result.stderr) == (2, "")
    assert json.loads(result.stdout)["error"]["code"] == "usage"


def test_an_error_is_one_line_whoever_chose_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    name = Path("a\nname\x1b[2J")
    result = ending(monkeypatch, FileNotFoundError(2, "No such file", str(name)))

    assert (result.exit_code, result.stderr) == (
        73,
        "Error: a?name?[2J: No such file [cannot_write]\n",
    )


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("cli.cache", ["cache", "ls"]),
        ("cli.replay_command", ["replay", "x.png"]),
        ("demo.command", ["demo"]),
    ],
)
def test_a_command_whose_packages_are_not_here_is_a_setting_that_makes_no_sense(
    monkeypatch: pytest.MonkeyPatch, module: str, arguments: list[str]
) -> None:
    monkeypatch.setattr(f"zlora_worker.{module}.find_spec", lambda _: None)
    result = CliRunner().invoke(main, [*arguments, "--json"])

    assert (result.exit_code, result.stderr) == (78, "")
    error = json.loads(result.stdout)["error"]
    assert (error["code"], "pip install 'z-image-lora[worker" in error["message"]) == (
        "invalid_setting",
        True,
    )


@contextmanager
def _full() -> Iterator[IO[str]]:
    with open("/dev/full", "w") as stream:
        yield stream


@contextmanager
def _left() -> Iterator[IO[str]]:
    """A pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        yield stream


def run(stream: str, opened: Callable[[], AbstractContextManager[IO[str]]], *arguments: str) -> int:
    """The exit status of a command with such a stream; what is left in it to be flushed would raise."""
    with opened() as other, pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, stream, other)
        with pytest.raises(SystemExit) as ended:
            main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("opened", "status", "options", "lines"),
    [
        (_full, 73, [], 2),
        (_full, 73, ["--json"], 0),
        (_left, 141, [], 0),
        (_left, 141, ["--json"], 0),
    ],
)
def test_what_cannot_be_printed_is_told_and_what_nobody_reads_is_not(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    *,
    opened: Callable[[], AbstractContextManager[IO[str]]],
    status: int,
    options: list[str],
    lines: int,
) -> None:
    """And Python has nothing left to complain of; the results of a batch are in its file."""
    worker = MemoryWorker()
    monkeypatch.setattr(connection, "client", worker.client)
    monkeypatch.setattr(connection, "async_client", worker.async_client)
    jobs, results = tmp_path / "jobs.jsonl", tmp_path / "results.jsonl"
    jobs.write_text('{"prompt": "a city"}')

    for arguments in (["submit", "a city"], ["batch", str(jobs), "--out", str(results)]):
        assert run("stdout", opened, *arguments, *options) == status
    told = capsys.readouterr().err
    assert told.count("the output: No space left on device [cannot_write]\n") == lines
    assert "Traceback" not in told
    assert len(results.read_text().splitlines()) == 1


def test_where_not_even_the_error_can_be_printed_its_status_tells() -> None:
    assert run("stderr", _full, "submit", "a city", "--steps", "0") == 65
    assert run("stderr", _full, "sumbit") == 73


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stack_whose_terminal_is_closed_has_ended_well(
    monkeypatch: pytest.MonkeyPatch, end: signal.Signals
) -> None:
    class Closing:
        """A stack whose terminal goes with the signal."""

        broker_url, home = "redis://h", "/home"

        def __init__(self, *_: object, **_options: object) -> None:
            """As `Stack`."""

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            ended.append("stopped")

        def check(self) -> None:
            os.close(master)
            os.kill(os.getpid(), end)

    @contextmanager
    def terminal() -> Iterator[IO[str]]:
        with open(slave, "w") as stream:
            yield stream

    ended = list[str]()
    master, slave = pty.openpty()
    monkeypatch.setattr("zlora.embedded.EmbeddedStack", Closing)

    assert (run("stdout", terminal, "up"), ended) == (0, ["stopped"])


@pytest.mark.parametrize("code", ["usage", "cannot_write", "interrupted"])
def test_the_docs_have_the_codes_that_are_no_error_s(code: str) -> None:
    assert re.search(rf"^\| [0-9, ]+ \| \| .*`{code}` \|$", DOCS, re.MULTILINE)


def test_the_docs_have_the_table() -> None:
    rows = re.findall(r"^\| ([0-9]+) \| (.+?) \|", DOCS, re.MULTILINE)
    told = {
        name: int(status) for status, names in rows for name in re.findall(r"`([A-Z]\w+)`", names)
    }

    assert told == {kind.__name__: status for kind, status in exit_codes.STATUSES.items()} | {
        "ZloraError": 70
    }


def test_the_docs_have_every_command() -> None:
    with main.make_context("zlora", ["up"]) as ctx:
        names = main.list_commands(ctx)

    assert not [name for name in names if f"`zlora {name}" not in DOCS]
