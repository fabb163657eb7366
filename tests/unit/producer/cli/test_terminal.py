"""The commands on a terminal: bars, tables, and the question after Ctrl-C."""

import base64
import codecs
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from PIL import Image
from support.played import inside
from support.processes import clean_environ, wait_until
from zlora import Client, JobState
from zlora.schema import GenerateRequest, parse_request, to_dict
from zlora.testing import fake_result

ZLORA = str(Path(sys.executable).with_name("zlora"))
CTRL_C = b"\x03"
SMALL = ("generate", "a city", "--job-id", "j")
INLINE = GenerateRequest(prompt="a city", inline=True)


class Terminal:
    """A command with its own terminal."""

    def __init__(self, environ: dict[str, str], *arguments: str, width: int = 100) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, width))
        self.process = subprocess.Popen(
            [ZLORA, *arguments],
            env=environ | {"TERM": "xterm"},
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=partial(os.login_tty, slave),  # noqa: PLW1509 - Ctrl-C needs a controlling terminal
        )
        os.close(slave)
        self.text = ""
        self._decode = codecs.getincrementaldecoder("utf-8")().decode  # a read may cut a character

    def sees(self, pattern: str) -> str:
        """Wait for output after what was seen before, and return the first group of the pattern."""
        found = wait_until(
            lambda: re.search(pattern, self._read(), re.DOTALL), f"{pattern} in {self.text!r}"
        )
        self.text = self.text[found.end() :]
        return "".join(found.groups()[:1])

    def types(self, keys: bytes) -> None:
        os.write(self._master, keys)

    def ends(self) -> int:
        """Wait for the end of the command, read all of its output, and return the exit status."""
        wait_until(lambda: (self._read(), self.process.poll() is not None)[1], "it ends")
        self._read()
        return self.process.wait()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _read(self) -> str:
        while select.select([self._master], [], [], 0)[0]:
            try:
                self.text += re.sub(
                    r"\x1b\[[0-9;]*m", "", self._decode(os.read(self._master, 65_536))
                )
            except OSError:  # the command has closed its terminal
                break
        return self.text


@pytest.fixture
def environ(broker_url: str) -> dict[str, str]:
    return clean_environ({"ZLORA_BROKER_URL": broker_url})


@pytest.fixture
def terminal(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Terminal]]:
    monkeypatch.chdir(tmp_path)
    opened: list[Terminal] = []

    def begin(*arguments: str, **options: Any) -> Terminal:
        opened.append(Terminal(environ, *arguments, **options))
        return opened[-1]

    yield begin
    for one in opened:
        one.close()


def set_state(client: Client, state: JobState, value: object) -> None:
    """Set the state of the job, as a worker does."""
    inside(client)._backend.store_result("j", value, state)


def test_a_bar_shows_how_far_the_job_is_and_a_table_what_was_used(
    client: Client, terminal: Callable[..., Terminal]
) -> None:
    """A path that is longer than a line is printed in full."""
    shell = terminal(
        *SMALL, "--lora", "owner/repo:0.8", "--out", "a-folder-with-a-long-name" * 2, width=81
    )
    shell.sees("job j\r\n")
    shell.sees(r"queued.*\(0 before it\)")
    set_state(
        client,
        JobState.PROGRESS,
        {"phase": "fetching", "received": 1_000_000, "expected": 4_000_000},
    )
    shell.sees(r"fetching.*━.*\(1.0 of 4.0 MB\)")
    set_state(
        client, JobState.PROGRESS, {"phase": "denoising", "step": 3, "steps": 28, "eta": 12.3}
    )
    shell.sees(r"denoising.*━.*\(step 3 of 28, 12 s left\)")
    request = parse_request(
        {"prompt": "a city", "inline": True, "loras": [{"file": {"url": "owner/repo"}}]}
    )
    made = fake_result("j", request)
    receipt = msgspec.structs.replace(
        made.loras[0], ranks=(8,), modules={"unet": 722}, relative_norm=0.0125
    )
    set_state(client, JobState.SUCCESS, to_dict(msgspec.structs.replace(made, loras=(receipt,))))

    assert shell.ends() == 0
    lines = "".join(line.strip() for line in shell.text.splitlines())
    assert "a-folder-with-a-long-name" * 2 + "/j-0.png" in lines
    assert re.search(r"LoRA +weight +rank +modules +relative norm +from", shell.text)
    assert re.search(r"hf://owner/repo +1 +8 +722 in unet +0.0125 +memory", shell.text)


@pytest.mark.parametrize("colours", ["truecolor", ""])
def test_a_preview_is_shown_above_the_bar_if_the_terminal_has_the_colours(
    client: Client, environ: dict[str, str], terminal: Callable[..., Terminal], colours: str
) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "JPEG")
    preview = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
    environ["COLORTERM"] = colours
    shell = terminal(*SMALL, "--preview")
    shell.sees("queued")

    progress = {"phase": "denoising", "step": 3, "steps": 28, "eta": 12.3, "preview": preview}
    set_state(client, JobState.PROGRESS, progress)
    shown = shell.sees(r"(.*)step 3 of 28")
    set_state(client, JobState.SUCCESS, to_dict(fake_result("j", INLINE)))

    assert shell.ends() == 0
    assert ("▀" * 40 in shown) == (colours == "truecolor")
    assert "▀" not in shell.text.splitlines()[-1]


@pytest.mark.parametrize(
    ("answer", "state", "said"),
    [
        (b"\n", JobState.REVOKED, "job j is cancelled"),
        (CTRL_C, JobState.PENDING, "job j continues: zlora result j"),
    ],
)
def test_ctrl_c_asks_once_whether_to_cancel_the_job(
    client: Client, terminal: Callable[..., Terminal], answer: bytes, state: JobState, said: str
) -> None:
    """Enter means yes, another Ctrl-C means no."""
    shell = terminal(*SMALL)
    shell.sees("queued")
    shell.types(CTRL_C)
    shell.sees(r"Cancel job j\? \[Y/n\]: ")
    shell.types(answer)

    assert shell.ends() == 130
    assert said in shell.text
    assert client.job("j").status().state is state


@pytest.mark.parametrize(
    ("is_asking", "end", "status"), [(False, signal.SIGHUP, 129), (True, signal.SIGTERM, 143)]
)
def test_a_signal_from_another_process_cancels_the_job_without_an_answer(
    client: Client,
    terminal: Callable[..., Terminal],
    is_asking: bool,
    end: signal.Signals,
    status: int,
) -> None:
    """The signal may come before or during the question."""
    shell = terminal("generate", "a city")
    job_id = shell.sees(r"job (\S+)\r\n.*queued")
    if is_asking:
        shell.types(CTRL_C)
        shell.sees(r"Cancel job .* \[Y/n\]: ")
    shell.process.send_signal(end)

    assert shell.ends() == status
    assert f"job {job_id} is cancelled" in shell.text
    assert client.job(job_id).status().state is JobState.REVOKED


def test_ctrl_c_does_not_cancel_a_job_that_another_command_has_submitted(
    client: Client, terminal: Callable[..., Terminal]
) -> None:
    client.submit(GenerateRequest(prompt="a city"), job_id="j")
    shell = terminal("result", "j", "--wait", "inf")
    shell.sees("queued")
    shell.types(CTRL_C)

    assert shell.ends() == 130
    assert client.job("j").status().state is JobState.PENDING


def test_without_a_terminal_ctrl_c_cancels_and_progress_is_plain_lines(
    client: Client, environ: dict[str, str], tmp_path: Path
) -> None:
    """Stdin is closed here."""
    process = subprocess.Popen(
        ["/bin/sh", "-c", 'exec "$0" generate "a city" --json <&-', ZLORA],
        env=environ,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        lines = [process.stderr.readline(), process.stderr.readline()]
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()

    job_id = lines[0].split()[1]
    assert lines == [f"job {job_id}\n", "queued (0 before it)\n"]
    assert process.returncode == 130
    assert msgspec.json.decode(output)["error"]["details"] == {
        "job_id": job_id,
        "cancelled": "queued",
    }
    assert client.job(job_id).status().state is JobState.REVOKED


def test_a_batch_asks_once_for_all_jobs_in_flight(
    client: Client, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    """Ctrl-D means no: the jobs continue."""
    lines = [{"request": {"prompt": "a city"}, "job_id": name} for name in ("j", "k", "l")]
    (tmp_path / "jobs.jsonl").write_bytes(b"\n".join(map(msgspec.json.encode, lines)))
    shell = terminal("batch", "jobs.jsonl", "--out", "results.jsonl", "--in-flight", "2")
    shell.sees("0/3")
    wait_until(
        lambda: len(inside(client)._jobs.unfinished(age=-60)) == 2,
        "two are in flight",
    )
    set_state(client, JobState.SUCCESS, to_dict(fake_result("j", GenerateRequest(prompt="a city"))))
    shell.sees("━.*1/3")
    shell.types(CTRL_C)
    shell.sees(r"Cancel the 2 jobs in flight\? \[Y/n\]: ")
    shell.types(b"\x04")

    assert shell.ends() == 130
    assert "2 jobs continue; run the same command again to resume" in shell.text
    assert [client.job(name).status().state for name in ("k", "l")] == [
        JobState.PENDING,
        JobState.PENDING,
    ]
