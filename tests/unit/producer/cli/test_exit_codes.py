"""How commands end: an exit status for each class of errors, and one line or one document."""

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


def submit_that_raises(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, *options: str
) -> Result:
    """Run a command whose client raises `error`."""

    def client() -> Any:
        raise error

    monkeypatch.setattr(connection, "client", client)
    return CliRunner().invoke(main, ["submit", "a city", *options])


def test_the_table_of_exit_statuses_is_complete() -> None:
    """Every class of errors has a row, or a parent below `ZloraError` that has one."""
    for cls in CLASSES:
        parents = [parent for parent in cls.__mro__ if parent in exit_codes.STATUSES]
        assert parents[0] is not ZloraError or cls is ZloraError, cls
    assert set(exit_codes.STATUSES) <= set(CLASSES)


def test_status_75_means_that_the_same_request_may_succeed_later() -> None:
    for cls in CLASSES:
        assert (exit_codes.status_of(cls) == 75) == cls.retryable, cls


def test_a_class_without_a_row_has_the_status_of_its_parent() -> None:
    assert exit_codes.status_of(errors.LoraMismatch) == exit_codes.status_of(errors.LoraError) == 66


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_is_one_line_or_one_document_with_the_same_status(
    monkeypatch: pytest.MonkeyPatch, cls: type[ZloraError]
) -> None:
    details = {"path": "$.loras[0]", "names": ["a", "\ud800"]}
    as_line = submit_that_raises(monkeypatch, cls("a sentence"))
    as_json = submit_that_raises(monkeypatch, cls("a sentence", details), "--json")

    assert (as_line.exit_code, as_line.stdout) == (exit_codes.status_of(cls), "")
    assert as_line.stderr == f"Error: a sentence [{cls.code}]\n"
    assert (as_json.exit_code, as_json.stderr) == (exit_codes.status_of(cls), "")
    assert json.loads(as_json.stdout)["error"] == {
        "code": cls.code,
        "message": "a sentence",
        "retryable": cls.retryable,
        "details": details,
    }


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ctrl_c_before_a_job_is_submitted_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    result = submit_that_raises(monkeypatch, KeyboardInterrupt(), *options)

    assert result.exit_code == 130
    assert "interrupted" in (result.stdout if options else result.stderr)


def test_a_misspelt_command_is_named_and_ends_with_2() -> None:
    result = CliRunner().invoke(main, ["sumbit"])

    assert result.exit_code == 2
    assert "sumbit" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["submit", "--stepz", "--json"], ["submit", "--json", "--steps", "x"]]
)
def test_with_json_a_usage_error_is_a_document(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)

    assert (result.exit_code, result.stderr) == (2, "")
    assert json.loads(result.stdout)["error"]["code"] == "usage"


def test_control_characters_in_an_error_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    name = Path("a\nname\x1b[2J")
    result = submit_that_raises(monkeypatch, FileNotFoundError(2, "No such file", str(name)))

    assert (result.exit_code, result.stderr) == (
        73,
        "Error: a?name?[2J: No such file [cannot_write]\n",
    )


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("cli.cache", ["cache", "ls"]),
        ("cli.local_worker", ["replay", "x.png"]),
        ("cli.local_worker", ["explain", "x.png"]),
        ("demo.command", ["demo"]),
    ],
)
def test_a_command_without_its_packages_says_what_to_install(
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
def _closed_pipe() -> Iterator[IO[str]]:
    """Open a pipe whose reader is closed."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        yield stream


def run(stream: str, opened: Callable[[], AbstractContextManager[IO[str]]], *arguments: str) -> int:
    """Run a command with such a stream; return its exit status. Unflushed output would raise."""
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
        (_closed_pipe, 141, [], 0),
        (_closed_pipe, 141, ["--json"], 0),
    ],
)
def test_a_full_disk_is_reported_and_a_closed_pipe_is_not(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    *,
    opened: Callable[[], AbstractContextManager[IO[str]]],
    status: int,
    options: list[str],
    lines: int,
) -> None:
    """Python prints no traceback at exit, and the results of a batch are in its file."""
    worker = MemoryWorker()
    monkeypatch.setattr(connection, "client", worker.client)
    monkeypatch.setattr(connection, "async_client", worker.async_client)
    jobs, results = tmp_path / "jobs.jsonl", tmp_path / "results.jsonl"
    jobs.write_text('{"prompt": "a city"}')

    for arguments in (["submit", "a city"], ["batch", str(jobs), "--out", str(results)]):
        assert run("stdout", opened, *arguments, *options) == status
    printed = capsys.readouterr().err
    assert printed.count("the output: No space left on device [cannot_write]\n") == lines
    assert "Traceback" not in printed
    assert len(results.read_text().splitlines()) == 1


def test_the_exit_status_reports_an_error_that_cannot_be_printed() -> None:
    assert run("stderr", _full, "submit", "a city", "--steps", "0") == 65
    assert run("stderr", _full, "sumbit") == 73


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_zlora_up_ends_with_0_if_its_terminal_is_closed(
    monkeypatch: pytest.MonkeyPatch, end: signal.Signals
) -> None:
    class Closing:
        """A stack whose terminal is closed by the signal."""

        broker_url, home, log_folder = "redis://h", Path("/home"), Path("/home/logs")

        def __init__(self, *_: object, **_options: object) -> None:
            """Take the arguments of `EmbeddedStack`."""

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
def test_the_docs_have_the_codes_that_no_error_has(code: str) -> None:
    assert re.search(rf"^\| [0-9, ]+ \| `{code}` \|", DOCS, re.MULTILINE)
