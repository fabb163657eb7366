"""The worker's log: what a machine reads of it, and that no secret is in it, wherever it stood."""

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
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zlora.errors import OutOfMemory
from zlora_worker.monitoring import logs

pytestmark = pytest.mark.usefixtures("own_log")

SECRET = "s3cret-t0ken"
QUERY = "X-Amz-Signature=0a1b2c"


class Log:
    """What a logger writes in one of the two kinds."""

    def __init__(
        self,
        kind: str,
        *secrets: str,
        process: str = "parent",
        logger: logging.Logger | None = None,
    ) -> None:
        self.stream = io.StringIO()
        self.logger = logger or logging.Logger("zlora_worker.test")  # noqa: LOG001 - one of the test's own
        self.handler = logging.StreamHandler(self.stream)
        self.handler.setFormatter(logging.Formatter("[%(levelname)s] %(message)s"))
        self.logger.addHandler(self.handler)
        logs.use(kind, secrets, logger=self.logger, process=process)

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    def lines(self) -> list[dict[str, Any]]:
        """One object each."""
        *lines, rest = self.text.split("\n")
        assert rest == ""
        return [json.loads(line) for line in lines]

    def line(self) -> dict[str, Any]:
        (found,) = self.lines()
        return found


@pytest.fixture(params=["json", "text"])
def log(request: pytest.FixtureRequest) -> Callable[..., Log]:
    return lambda *secrets, **options: Log(request.param, *secrets, **options)


# --- fields


def test_a_line_says_when_who_and_what() -> None:
    log = Log("json")

    log.logger.warning("%s is %s", "it", "so")

    line = log.line()
    assert {name: value for name, value in line.items() if name != "time"} == {
        "level": "warning",
        "logger": "zlora_worker.test",
        "process": "parent",
        "message": "it is so",
    }
    assert line["time"].endswith("Z")
    assert len(line["time"]) == len("2026-01-01T00:00:00.000Z")


def test_what_is_logged_over_a_job_is_about_it_and_its_phase() -> None:
    """By any thread, until the job ends; the phase is the one that it is in."""
    log = Log("json")

    with logs.about("one"):
        log.logger.info("taken")
        logs.enter("denoising")
        log.logger.info("a step")
        log.logger.info("of another", extra={"job": "two"})
    with suppress(RuntimeError), logs.about("three"):
        log.logger.info("again")
        raise RuntimeError
    log.logger.info("idle")

    told = [(line.get("job"), line.get("phase")) for line in log.lines()]
    assert told == [
        ("one", None),
        ("one", "denoising"),
        ("two", None),
        ("three", None),
        (None, None),
    ]


def test_a_line_of_celery_s_is_about_the_task_that_it_names() -> None:
    """In the parent, which is at no job itself."""
    log = Log("json")

    log.logger.info("Task %(name)s[%(id)s] received", {"id": "one", "name": "zlora.generate"})
    log.logger.error("Task handler raised error", extra={"data": {"id": "two"}})
    log.logger.info("%(id)s", {"id": 5})

    assert [line.get("job") for line in log.lines()] == ["one", "two", None]


def test_the_code_is_the_error_s_or_what_the_line_says() -> None:
    log = Log("json")

    log.logger.warning("told", extra={"code": "timeout"})
    _log_error(log, OutOfMemory("too large"))
    _log_error(log, ValueError("no"))

    assert [line.get("code") for line in log.lines()] == ["timeout", "out_of_memory", None]


@pytest.mark.parametrize(
    ("name", "process"), [("MainProcess", "companion"), ("ForkPoolWorker-3", "child")]
)
def test_a_forked_pool_process_is_the_child(name: str, process: str) -> None:
    log = Log("json", process="companion")
    record = log.logger.makeRecord("a", logging.INFO, "", 0, "x", (), None)
    record.processName = name

    log.logger.handle(record)

    assert log.line()["process"] == process


def test_one_record_is_one_line_with_its_traceback_in_it() -> None:
    log = Log("json")

    _log_error(log, ValueError("two\nlines\u2028and\x1b[31m more"))

    line = log.line()
    assert line["message"] == "it\nfails"
    assert line["exception"].startswith("Traceback")
    assert "ValueError: two\nlines" in line["exception"]
    assert "\x1b" not in log.text


def test_text_that_is_no_unicode_is_a_line_too() -> None:
    """As the name of a file may be, or a prompt with half a character."""
    log = Log("json")

    log.logger.error("no such file: %s", "a\ud800b", extra={"job": "\udcff"})

    assert (log.line()["message"], log.line()["job"]) == ("no such file: a\\ud800b", "?")


def test_where_a_line_was_written_is_told_where_it_is_asked_for(log: Callable[..., Log]) -> None:
    written = log(SECRET)

    def s3cret() -> None:
        written.logger.info("here", stack_info=True)

    s3cret()

    assert "in s3cret" in written.text
    assert "Stack (most recent call last)" in written.text


@pytest.mark.parametrize("field", ["job", "code"])
def test_a_name_that_a_stranger_chose_is_short_and_printable_and_no_secret(field: str) -> None:
    log = Log("json", SECRET)

    log.logger.info("x", extra={field: f"{SECRET}\n\x1b[31m{'y' * 200}"})
    log.logger.info("x", extra={field: 200})

    first, second = (line[field] for line in log.lines())
    assert first.startswith("***??[31myyy")
    assert len(first) == 64
    assert second == "200"


# --- long lines

SIZE = 4096  # bytes that Linux writes to a pipe at once: pipe(7), PIPE_BUF


@settings(deadline=None)
@given(
    texts=st.lists(st.text(st.characters(), min_size=1, max_size=5), min_size=3, max_size=3),
    times=st.lists(st.integers(0, 3000), min_size=3, max_size=3),
)
def test_a_line_fits_a_pipe_whatever_is_said(texts: list[str], times: list[int]) -> None:
    """In bytes as they are written, and with its newline."""
    log = Log("json")
    said, raised, name = (text * count for text, count in zip(texts, times, strict=True))

    log.logger.error(
        "%s", said, exc_info=ValueError(raised), stack_info=True, extra={"job": name, "code": name}
    )

    assert len(log.text.encode()) <= SIZE
    assert {"message", "exception", "stack"} <= set(log.line())


@pytest.mark.parametrize("character", ["x", "\n", "\x01", "é", "😀", '"'])
def test_of_a_long_text_start_and_end_stay_and_what_is_left_out_is_told(character: str) -> None:
    """And no more of it is left out than must be."""
    log = Log("json")

    log.logger.error("start%send", character * 10_000, exc_info=ValueError("short"))

    line = log.line()
    start, count, end = re.split(r" \.\.\.\[(\d+) characters left out\]\.\.\. ", line["message"])
    assert start + character * int(count) + end == f"start{character * 10_000}end"
    assert line["exception"] == "ValueError: short\n"
    assert len(log.text.encode()) > SIZE - 15


def test_of_a_long_message_and_a_long_traceback_there_is_as_much() -> None:
    log = Log("json")

    log.logger.error("m%sm", "x" * 10_000, exc_info=ValueError(f"{'y' * 10_000}e"))

    line = log.line()
    assert (line["message"][0], line["message"][-1], line["exception"][-2:]) == ("m", "m", "e\n")
    assert abs(len(line["message"]) - len(line["exception"])) < 20


CROWD = """
import logging, os, sys
from zlora_worker.monitoring import logs
logging.basicConfig(level=logging.INFO)
logs.use("json", [], logger=logging.getLogger(), process="parent")
for _ in range(2):
    os.fork()
for place in range(100):
    logging.info("%s", f"{os.getpid()}-{place} " + "x" * (3000 + 97 * place % 4000))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_processes_that_share_a_pipe_write_whole_lines(unbuffered: str) -> None:
    """Also where Python does not buffer, as containers have it."""
    environ = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    written = subprocess.run(
        [sys.executable, "-c", CROWD], env=environ, check=True, stderr=subprocess.PIPE
    ).stderr

    said = [json.loads(line)["message"].split()[0] for line in written.splitlines()]

    assert len(set(said)) == len(said) == 400


# --- what Python would write beside the log


@pytest.mark.parametrize("said", ["bad %d", "%s %s", "%(x)s"])
def test_a_wrong_log_call_is_one_line_and_shows_no_argument(
    log: Callable[..., Log], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written = log(SECRET)

    written.logger.warning(said, SECRET)

    assert f"{said} (test_logs.py:" in written.text
    assert written.text.count("\n") == 1
    assert SECRET not in written.text
    assert capsys.readouterr().err == ""


def test_a_line_that_cannot_be_written_is_not_told_elsewhere(
    log: Callable[..., Log], capsys: pytest.CaptureFixture[str]
) -> None:
    written = log(SECRET)
    written.stream.close()

    written.logger.warning("%s", SECRET)

    assert capsys.readouterr().err == ""


def test_a_thread_that_ends_by_an_error_is_one_line(
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

    assert "the thread sender ends" in written.text
    assert "ValueError: no ***" in written.text
    assert "SystemExit" not in written.text
    assert capsys.readouterr().err == ""


def _log_error(log: Log, error: Exception, told: str = "it\nfails") -> None:
    try:
        raise error
    except type(error):
        log.logger.exception("%s", told)


# --- which kind


@pytest.mark.parametrize("kind", ["json", "text", "auto"])
@pytest.mark.parametrize("is_terminal", [True, False])
def test_lines_are_text_on_a_terminal_and_objects_elsewhere_or_as_is_said(
    monkeypatch: pytest.MonkeyPatch, kind: str, *, is_terminal: bool
) -> None:
    ours, theirs = pty.openpty()
    with open(ours, "rb"), open(theirs, "w") as terminal, open(os.devnull, "w") as elsewhere:
        monkeypatch.setattr(sys, "stderr", terminal if is_terminal else elsewhere)
        log = Log(kind)
        log.logger.info("it is so")
        monkeypatch.undo()

    is_text = kind == "text" or (kind == "auto" and is_terminal)
    assert log.text == "[INFO] it is so\n" if is_text else log.line()["message"] == "it is so"


def test_text_is_that_of_the_logger_s_own_form(log: Callable[..., Log]) -> None:
    """What a program is told of a record, a person reads in Celery's way."""
    written = log()
    written.logger.warning("it is so")

    assert ("[WARNING] it is so" in written.text) != ('"level":"warning"' in written.text)


# --- secrets


@pytest.mark.parametrize(
    "said",
    [
        f"the token {SECRET} is wrong",
        f"'{SECRET}'",
        f"x{SECRET}y{SECRET}",
        f"redis://:{SECRET}@host:6379/0 is away",
        f"https://host/{SECRET}/x",
        "redis://user:other-pw@host/0",
        "rediss://:other-pw@host/0?x=1",
        "https://us'er:other-pw@host/x",
        "https://host/file.safetensors?token=other-pw",
        f"HTTPS://host/file?a='b'&{QUERY}",
        f"('https://host/file?{QUERY}', 'https://other/file?{QUERY}#x')",
        f'{{"url":"https://host/file?{QUERY}"}}',
        f"Max retries exceeded with url: /file?a=b&{QUERY} (Caused by a reset)",
        "Authorization: Bearer other-pw",
        "{'authorization': 'bearer other-pw'}",
        "Authorization: Basic other-pw=",
        "Authorization: Token other-pw",
        'Authorization: Digest username="u", response="other-pw"',
        "{'Authorization': 'Token other-pw'}",
        r"{\"authorization\": \"Key other-pw\"}",
        "[('Authorization', b'Token other-pw')]",
        f"Max retries exceeded with url: /file?download&{QUERY} (Caused by a reset)",
        "Max retries exceeded with url: /file?other-pw (Caused by a reset)",
        "/file?=other-pw",
        "file.safetensors?~other-pw",
        "//user:other-pw@host/x",
        "//other-pw@host/x",
        "https:/user:other-pw@host/x",
        "https:user:other-pw@host/x",
        "user:x:other-pw@host",
        r"https:\/\/user:other-pw@host\/x",
        r"https:\/\/other-pw@host\/x",
        rf"b\'{{\"url\":\"https:\\/\\/u:other-pw@host\\/x?{QUERY}\"}}\'",
    ],
)
def test_no_secret_is_read_in_a_message_its_arguments_or_a_traceback(
    log: Callable[..., Log], said: str
) -> None:
    """Nor of a cause. What is beside it stays."""
    written, error = log(SECRET), ValueError(f"outer: {said}")
    error.__cause__ = OSError(f"cause: {said}")
    _log_error(written, error, f"before {said}")

    assert not any(word in written.text for word in (SECRET, "other-pw", "0a1b2c"))
    for word in ("before", "outer", "cause", "Traceback", "ValueError", "OSError"):
        assert word in written.text


def test_what_is_no_secret_of_an_address_stays(log: Callable[..., Log]) -> None:
    written = log()

    written.logger.info(
        "from https://u:p@host:8443/a/b.safetensors?sig=1 to redis://host:6379/0 (is that so? yes)"
    )

    assert (
        "from https://host:8443/a/b.safetensors to redis://host:6379/0 (is that so? yes)"
        in written.text
    )


@pytest.mark.parametrize(
    "said",
    [
        "is it there? yes", "(yes/no?)", "what?!", "'is it?', 'no'", "one@host ready.", "a@b.org: it fails", "at 12:30",
        "cozy://loras/anime@2", "s3://bucket/a@b", "file:///models/a@b", "a // b", "no authorization is set",
        "the token is wrong", "[config] .> transport: redis://host:6379/0",
    ],
)  # fmt: skip
def test_what_only_looks_like_an_address_stays(log: Callable[..., Log], said: str) -> None:
    written = log()

    written.logger.info("%s and so on", said)

    assert f"{said} and so on" in (
        written.line()["message"] if written.text.startswith("{") else written.text
    )


@pytest.mark.parametrize(
    "spell",
    [
        repr, ascii, json.dumps, lambda text: json.dumps(text, ensure_ascii=False), lambda text: repr(text.encode()),
        lambda text: repr(json.dumps(text)), lambda text: json.dumps(json.dumps(text)),
        lambda text: json.dumps(text).replace("/", "\\/"), lambda text: repr({"x": f'"{text}'}),
        lambda text: quote(text, safe=""),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "secret", ["pass/wörd", 'it\'s"so"', "back\\slash", "tab\tbed", "smile😀y"]
)
def test_a_secret_is_masked_as_it_is_quoted_too(
    log: Callable[..., Log], spell: Callable[[str], str], secret: str
) -> None:
    written = log(secret)

    written.logger.info("<%s>", spell(secret))

    told = written.line()["message"] if written.text.startswith("{") else written.text
    for part in ("pass", "rd", "it", "so", "back", "slash", "tab", "bed", "smile", "😀"):
        assert part not in told
    assert "***" in told


def test_an_address_of_any_depth_is_a_line(log: Callable[..., Log]) -> None:
    written = log()

    written.logger.info("a %s z", f"{'a://' * 2000}user:other-pw@host")

    assert "a *** z" in written.text


def test_a_secret_that_is_short_masks_no_words(log: Callable[..., Log]) -> None:
    written = log("a", "is", "word", "")

    written.logger.info("a word is a word")

    assert "a word is a word" in written.text


def test_of_secrets_in_one_another_the_longest_is_masked(log: Callable[..., Log]) -> None:
    written = log("s3cret", "s3cret-and-more")

    written.logger.info("<s3cret-and-more> <s3cret>")

    assert "<***> <***>" in written.text


# A mask may be part of no secret here, nor may what masks an address: else taking one out could make another.
words = st.text(st.characters(exclude_characters="*?:@#/", exclude_categories=["Cs"]))
secrets = st.lists(
    st.text(st.characters(exclude_characters="*?:@#/", exclude_categories=["Cs"]), min_size=6),
    min_size=1,
    max_size=4,
)


@settings(deadline=None)
@given(
    secrets=secrets,
    around=st.lists(words, min_size=5, max_size=5),
    kind=st.sampled_from(["json", "text"]),
)
def test_no_secret_survives_anywhere(secrets: list[str], around: list[str], kind: str) -> None:
    said = "".join(part for pair in zip(around, [*secrets, ""], strict=False) for part in pair)
    log = Log(kind, *secrets)

    log.logger.error("%s", said, exc_info=ValueError(said))

    read = log.line()["message"] + log.line()["exception"] if kind == "json" else log.text
    assert not any(secret in read for secret in secrets)


@settings(deadline=None)
@given(text=st.text(st.characters()), is_error=st.booleans())
def test_whatever_is_said_is_one_object(text: str, is_error: bool) -> None:
    log = Log("json", SECRET)

    log.logger.info("%s", text, exc_info=ValueError(text) if is_error else None)

    assert set(log.line()) - {"exception"} == {"time", "level", "logger", "process", "message"}


@pytest.fixture(autouse=True)
def python_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process does with its faults is put back after a test."""
    monkeypatch.setattr(logging, "raiseExceptions", logging.raiseExceptions)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)


@pytest.fixture(autouse=True)
def at_no_job() -> Iterator[None]:
    """The job is the process's: none is left over."""
    assert (logs._job.id, logs._job.phase) == (None, None)
    yield
    assert (logs._job.id, logs._job.phase) == (None, None)
