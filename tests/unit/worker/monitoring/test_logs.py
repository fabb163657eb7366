"""The worker's log lines: their fields, their form, and that they contain no secrets."""

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zlora.errors import OutOfMemory
from zlora_worker.monitoring import logs

pytestmark = pytest.mark.usefixtures("own_log")

SECRET = "s3cret-t0ken"
QUERY = "X-Amz-Signature=0a1b2c"


class Log:
    """A logger of its own, and what it writes as `json` or `text`."""

    def __init__(
        self,
        kind: str,
        *secrets: str,
        process: str = "parent",
        logger: logging.Logger | None = None,
    ) -> None:
        self.stream = io.StringIO()
        self.logger = logger or logging.Logger("zlora_worker.test")  # noqa: LOG001 - not in the tree
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
        self.logger.addHandler(self.handler)
        logs.use(kind, secrets, logger=self.logger, process=process)

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    def lines(self) -> list[dict[str, Any]]:
        """Return all lines, each of which must be one JSON object."""
        *lines, rest = self.text.split("\n")
        assert rest == ""
        return [json.loads(line) for line in lines]

    def line(self) -> dict[str, Any]:
        (found,) = self.lines()
        return found

    def error(self, error: Exception, message: str = "it\nfails") -> None:
        """Log an exception with its traceback."""
        try:
            raise error
        except type(error):
            self.logger.exception("%s", message)


@pytest.fixture(params=["json", "text"])
def log(request: pytest.FixtureRequest) -> Callable[..., Log]:
    return lambda *secrets, **options: Log(request.param, *secrets, **options)


@pytest.fixture(autouse=True)
def restored_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Restore what `logs.use` changes in the process."""
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture(autouse=True)
def no_current_job() -> Iterator[None]:
    """No test leaves a current job behind."""
    yield
    assert (logs._job.id, logs._job.phase) == (None, None)


# --- fields


def test_a_line_has_time_level_logger_process_and_message() -> None:
    log = Log("json")

    log.logger.warning("%s is %s", "it", "so")

    line = log.line()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "warning",
        "logger": "zlora_worker.test",
        "process": "parent",
        "message": "it is so",
    }


def test_lines_inside_a_job_have_its_id_and_phase() -> None:
    log = Log("json")

    with logs.about("one"):
        log.logger.info("taken")
        logs.enter("denoising")
        log.logger.info("a step")
        log.logger.info("of another job", extra={"job": "two"})
    with suppress(RuntimeError), logs.about("three"):
        log.logger.info("the next job")
        raise RuntimeError
    log.logger.info("idle")

    assert [(line.get("job"), line.get("phase")) for line in log.lines()] == [
        ("one", None),
        ("one", "denoising"),
        ("two", None),
        ("three", None),
        (None, None),
    ]


def test_lines_of_celery_have_the_task_that_they_name() -> None:
    log = Log("json")

    log.logger.info("Task %(name)s[%(id)s] received", {"id": "one", "name": "zlora.generate"})
    log.logger.error("Task handler raised error", extra={"data": {"id": "two"}})
    log.logger.info("%(id)s", {"id": 5})

    assert [line.get("job") for line in log.lines()] == ["one", "two", None]


def test_the_code_comes_from_the_error_or_from_the_log_call() -> None:
    log = Log("json")

    log.logger.warning("too late", extra={"code": "timeout"})
    log.error(OutOfMemory("too large"))
    log.error(ValueError("no"))

    assert [line.get("code") for line in log.lines()] == ["timeout", "out_of_memory", None]


def test_other_attributes_of_a_record_are_not_written() -> None:
    log = Log("json")

    log.logger.info("x", extra={"data": {"id": "one", "args": SECRET}})

    assert SECRET not in log.text


@pytest.mark.parametrize(
    ("name", "process"), [("MainProcess", "sidecar"), ("ForkPoolWorker-3", "child")]
)
def test_a_forked_pool_process_is_the_child(name: str, process: str) -> None:
    log = Log("json", process="sidecar")
    record = log.logger.makeRecord("a", logging.INFO, "", 0, "x", (), None)
    record.processName = name

    log.logger.handle(record)

    assert log.line()["process"] == process


def test_stack_info_is_written_without_secrets(log: Callable[..., Log]) -> None:
    written = log(SECRET)

    written.logger.info("here", stack_info=True)  # s3cret-t0ken

    assert "Stack (most recent call last)" in written.text
    assert "test_stack_info" in written.text
    assert SECRET not in written.text


@pytest.mark.parametrize("field", ["job", "code"])
def test_a_job_id_or_code_is_short_printable_and_without_secrets(field: str) -> None:
    log = Log("json", SECRET)

    log.logger.info("x", extra={field: f"{SECRET}\n\x1b[31m{'y' * 200}"})
    log.logger.info("x", extra={field: 200})

    first, second = (line[field] for line in log.lines())
    assert first.startswith("***??[31myyy")
    assert len(first) == 64
    assert second == "200"


# --- form


def test_a_json_record_with_a_traceback_is_one_line() -> None:
    log = Log("json")

    log.error(ValueError("two\nlines\u2028and\x1b[31m more"))

    line = log.line()
    assert line["message"] == "it\nfails"
    assert line["exception"].startswith("Traceback")
    assert "ValueError: two\nlines" in line["exception"]
    assert "\x1b" not in log.text


def test_a_text_record_forges_no_line() -> None:
    """Lines that continue a record are indented, and control characters are escaped."""
    log = Log("text")

    log.error(ValueError("a\n[INFO] forged"), "b\r\n[INFO] forged\x1b[2J\x85\u2028[INFO] forged")

    first, *others = log.text.splitlines()
    assert first == "[ERROR] b\\r"
    assert all(line.startswith(("    ", "Traceback")) for line in others)
    assert "\\x1b[2J\\x85\\u2028" in others[0]
    assert "ValueError: a" in log.text


def test_half_a_surrogate_pair_is_escaped() -> None:
    """File names and prompts may contain one."""
    log = Log("json")

    log.logger.error("no such file: %s", "a\ud800b", extra={"job": "\udcff"})

    assert (log.line()["message"], log.line()["job"]) == ("no such file: a\\ud800b", "?")


def test_a_long_text_keeps_start_and_end() -> None:
    log = Log("json")

    log.logger.error("start%send", "x" * 9000, exc_info=ValueError("y" * 9000), stack_info=True)

    line = log.line()
    assert re.fullmatch(r"startx+ \.\.\.\[\d+ characters left out\]\.\.\. x+end", line["message"])
    assert line["exception"].endswith("yyy")
    assert len(log.text) < 4096  # PIPE_BUF in pipe(7)


WRITERS = """
import logging, os
from zlora_worker.monitoring import logs
logging.basicConfig(level=logging.INFO)
logs.use("json", [], logger=logging.getLogger(), process="parent")
for _ in range(2):
    os.fork()
for place in range(100):
    logging.info("%s", f"{os.getpid()}-{place} " + "x" * (3000 + 97 * place % 4000))
"""


def test_processes_that_share_a_pipe_write_whole_lines() -> None:
    environ = os.environ | {"PYTHONUNBUFFERED": "1"}  # as in containers
    written = subprocess.run(
        [sys.executable, "-c", WRITERS], env=environ, check=True, stderr=subprocess.PIPE
    ).stderr

    messages = [json.loads(line)["message"].split()[0] for line in written.splitlines()]

    assert len(set(messages)) == len(messages) == 400


@pytest.mark.parametrize("kind", ["json", "text", "auto"])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_auto_is_text_on_a_terminal_and_json_elsewhere(
    monkeypatch: pytest.MonkeyPatch, kind: str, *, is_terminal: bool
) -> None:
    ours, theirs = pty.openpty()
    with open(ours, "rb"), open(theirs, "w") as terminal, open(os.devnull, "w") as elsewhere:
        monkeypatch.setattr(sys, "stderr", terminal if is_terminal else elsewhere)
        log = Log(kind)
        log.logger.info("it is so")
        monkeypatch.undo()

    if kind == "text" or (kind == "auto" and is_terminal):
        assert log.text == "[INFO] it is so\n"
    else:
        assert log.line()["message"] == "it is so"


# --- what Python would print besides the log


@pytest.mark.parametrize("message", ["bad %d", "%s %s", "%(x)s"])
def test_a_wrong_log_call_is_one_line_without_arguments(
    log: Callable[..., Log], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written = log(SECRET)

    written.logger.warning(message, SECRET)

    assert message in written.text
    assert "test_logs.py:" in written.text
    assert written.text.count("\n") == 1
    assert SECRET not in written.text
    assert capsys.readouterr().err == ""


def test_a_line_that_cannot_be_written_is_not_printed(
    log: Callable[..., Log], capsys: pytest.CaptureFixture[str]
) -> None:
    written = log(SECRET)
    written.stream.close()

    written.logger.warning("%s", SECRET)

    assert capsys.readouterr().err == ""


def test_a_thread_that_ends_by_an_error_is_logged(
    log: Callable[..., Log], capsys: pytest.CaptureFixture[str]
) -> None:
    written = log(SECRET, logger=logging.getLogger(logs.__name__))

    def work(error: BaseException) -> None:
        raise error

    try:
        for error in (ValueError(f"no {SECRET}"), SystemExit(1)):
            thread = threading.Thread(target=work, args=(error,), name="sender")
            thread.start()
            thread.join()
    finally:
        written.logger.removeHandler(written.handler)

    assert "thread sender" in written.text
    assert "ValueError: no ***" in written.text
    assert "SystemExit" not in written.text
    assert capsys.readouterr().err == ""


# --- secrets; the rules themselves are tested in tests/unit/producer/test_redaction.py


def test_no_secret_is_in_a_message_a_traceback_or_a_cause(log: Callable[..., Log]) -> None:
    written = log(SECRET)
    text = f"{SECRET} at https://user:other-pw@host/file?{QUERY}"
    error = ValueError(f"outer: {text}")
    error.__cause__ = OSError(f"cause: {text}")

    written.error(error, f"before {text}")

    assert not any(word in written.text for word in (SECRET, "other-pw", "0a1b2c"))
    for word in ("before", "outer", "cause", "Traceback", "ValueError", "OSError"):
        assert word in written.text


def test_a_second_handler_writes_no_secret_either(log: Callable[..., Log]) -> None:
    written = log(SECRET)
    second = io.StringIO()
    written.logger.addHandler(logging.StreamHandler(second))

    written.error(ValueError(SECRET), SECRET)

    assert SECRET not in second.getvalue()


def test_the_reason_of_a_foreign_error_has_no_secrets() -> None:
    Log("json", SECRET)

    assert logs.said_by(ValueError(f"no {SECRET} {'x' * 500}")) == f"no *** {'x' * 193}"


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.characters()), is_error=st.booleans())
def test_any_text_is_one_json_object(text: str, is_error: bool) -> None:
    log = Log("json", SECRET)

    log.logger.info("%s", text, exc_info=ValueError(text) if is_error else None)

    assert set(log.line()) - {"exception"} == {"time", "level", "logger", "process", "message"}
