"""`zlora up`: the embedded stack, as users start and stop it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from PIL import Image
from support.processes import clean_environ, free_port, wait_until
from support.tiny_folder import tiny_model
from zlora import Client, JobHandle, JobState, config, embedded
from zlora.embedded import EmbeddedStack
from zlora.errors import InvalidSetting, StackError

SMALL = {"prompt": "a city at night", "num_inference_steps": 2, "seed": 1}
LONG = {**SMALL, "num_inference_steps": 200, "num_images": 8}


@pytest.fixture
def environ(model_home: Path, tmp_path: Path) -> dict[str, str]:
    """Return the variables of a stack with the tiny model and an empty data folder."""
    model = str(tiny_model(model_home))
    return {"ZLORA_HOME": str(tmp_path / "home"), "ZLORA_MODEL": model, "ZLORA_DEVICE": "cpu"}


class Up:
    """A `zlora up` process with its screen in a file."""

    def __init__(self, process: "subprocess.Popen[bytes]", screen: Path) -> None:
        self.process, self._screen = process, screen

    @property
    def screen(self) -> str:
        return self._screen.read_text()

    def wait_for(self, text: str) -> None:
        """Wait until the screen has a text."""

        def look() -> bool:
            assert self.process.poll() is None, self.screen
            return text in self.screen

        wait_until(look, f"{text!r} on the screen")

    def ends(self) -> int:
        """Wait for the end of the command, and return its exit status."""
        return self.process.wait(60)


@contextmanager
def up(environ: Mapping[str, str], screen: Path, *options: str) -> Iterator[Up]:
    command = [str(Path(sys.executable).with_name("zlora")), "up", *options]
    with screen.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=clean_environ(environ),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield Up(process, screen)
    finally:
        process.kill()  # its child processes end with it
        process.wait()


def descendants(pid: int) -> set[int]:
    """Return the ids of all processes below `pid`."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | descendants(child)
    return found


def running(pids: set[int]) -> list[str]:
    """Return the command lines of those processes that run; that of a zombie is empty."""
    lines = (Path(f"/proc/{pid}/cmdline") for pid in pids)
    return [text for line in lines if line.exists() and (text := line.read_text())]


def wait_until_running(handle: JobHandle) -> None:
    wait_until(lambda: handle.status().state is JobState.PROGRESS, "the job runs")


def flower_page(url: str) -> "requests.Response | None":
    try:
        return requests.get(f"{url}/tasks", timeout=5)
    except requests.ConnectionError:
        return None


def test_jobs_outlive_the_stack_and_its_processes_do_not(
    environ: dict[str, str], tmp_path: Path
) -> None:
    """A client that has only the data folder in common finds the stack.

    After SIGTERM the running job is finished, and queued jobs are drawn by the next stack. SIGKILL
    in the middle of a job leaves no process, either.
    """
    home, port, other = Path(environ["ZLORA_HOME"]), free_port(), free_port()
    options = ("--flower", f"--flower-port={port}", "--serve", f"--serve-port={other}")
    with up(environ, tmp_path / "1", *options) as stack:
        stack.wait_for("\nready after ")
        (page_url,) = re.findall(r"page    (http://\S+)", stack.screen)
        assert "<title>zlora</title>" in requests.get(page_url, timeout=5).text
        (url,) = re.findall(r"Flower  (http://zlora:\S+)", stack.screen)
        page = wait_until(lambda: flower_page(url), "Flower answers")
        assert (page.status_code, "Flower" in page.text) == (200, True)
        # As a page does whose name has been made to resolve to this machine.
        without_account = flower_page(f"http://127.0.0.1:{port}")
        assert without_account is not None
        assert without_account.status_code == 401
        with Client.from_env(environ) as client:
            done = client.submit(SMALL)
            assert done.result(timeout=90).base_intact
            unfinished = client.submit({**SMALL, "num_inference_steps": 100})
            queued = client.submit(SMALL)
            wait_until_running(unfinished)
        socket = Path((config.recorded_broker(home) or "").partition("://")[2])
        assert socket.is_socket()
        processes = descendants(stack.process.pid)
        assert len(processes) >= 5  # broker, server, worker, its child, Flower
        stack.process.terminate()

        assert stack.ends() == 0
        wait_until(lambda: not running(processes), "its processes end")
        assert not socket.parent.exists()
        assert config.recorded_broker(home) is None

    # The screen is short: the processes write to files, which other users cannot read.
    assert len(stack.screen.splitlines()) <= 13
    assert "a city at night" in stack.screen
    for name in ("broker", "worker", "flower", "server"):
        assert (home / "logs" / f"{name}.log").stat().st_size
    folders = (home, home / "broker", home / "logs")
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700] * 3
    for folder in folders[1:]:
        folder.chmod(0o755)  # as an earlier version or another program may have made it

    with up(environ, tmp_path / "2") as stack:
        wait_until(lambda: config.recorded_broker(home), "the broker is recorded")
        assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o700] * 3
        with Client.from_env(environ) as client:
            for handle in (done, unfinished, queued):
                assert client.job(handle.id).result(timeout=90).job_id == handle.id
            wait_until_running(client.submit(LONG))
        processes = descendants(stack.process.pid)
        stack.process.kill()
        stack.ends()

        wait_until(lambda: not running(processes), "its processes end")
    assert config.recorded_broker(home) is None


def test_an_explicit_broker_is_used_and_a_second_ctrl_c_ends_the_job(
    environ: dict[str, str], tmp_path: Path, broker_url: str
) -> None:
    """The URL may be in a file, as a secret is. Webhooks get no secret of the data folder."""
    home = Path(environ["ZLORA_HOME"])
    (tmp_path / "url").write_text(f"{broker_url}\n")
    given = environ | {"ZLORA_BROKER_URL_FILE": str(tmp_path / "url")}
    with up(given, tmp_path / "screen") as stack, Client(broker_url) as client:
        wait_until_running(client.submit(LONG))
        assert not (home / "broker").exists()
        assert not config.webhook_secret(home).exists()
        assert f"broker  {broker_url}" in stack.screen
        processes = descendants(stack.process.pid)
        stack.process.send_signal(signal.SIGINT)
        stack.wait_for("stopping after the running job")
        stack.process.send_signal(signal.SIGINT)
        stack.ends()

        wait_until(lambda: not running(processes), "its processes end")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_stacks_of_one_folder_share_a_broker_and_end_with_it(
    environ: dict[str, str], tmp_path: Path, end: signal.Signals
) -> None:
    """They start at the same time, and a signal ends the stack that has the broker."""
    (tmp_path / "empty").touch()  # without a secret of the operator, the stacks share one
    home = Path(environ["ZLORA_HOME"])
    full = environ | {"ZLORA_WEBHOOK_SECRET_FILE": str(tmp_path / "empty")}
    with up(full, tmp_path / "a") as one, up(full, tmp_path / "b") as two:
        for stack in (one, two):
            stack.wait_for("model   ")
        (broker,) = {stack.screen.splitlines()[0] for stack in (one, two)}
        socket = Path(broker.partition("://")[2])
        owner, other = one, two
        if any(str(socket) in line for line in running(descendants(two.process.pid))):
            owner, other = two, one
        assert config.webhook_secret(home).stat().st_mode & 0o777 == 0o600
        owner.process.send_signal(end)

        assert owner.ends() == (-signal.SIGKILL if end is signal.SIGKILL else 0)
        assert other.ends() == 69
        assert "the `zlora up` that started the broker has ended" in other.screen
    assert config.recorded_broker(home) is None
    if end is not signal.SIGKILL:
        assert not socket.parent.exists()


def test_a_worker_that_cannot_load_its_model_ends_the_stack_with_the_reason(
    environ: dict[str, str], tmp_path: Path
) -> None:
    with up(environ | {"ZLORA_MODEL": "/nonexistent"}, tmp_path / "screen") as stack:
        assert stack.ends() == 69

    *_, last_of_log, error = stack.screen.splitlines()
    assert "status 70" in error
    assert error.endswith(f"its log is {environ['ZLORA_HOME']}/logs/worker.log [stack_error]")
    assert last_of_log in Path(environ["ZLORA_HOME"], "logs", "worker.log").read_text()


def test_a_data_folder_that_is_a_file_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "home").touch()

    with (
        pytest.raises(StackError, match="ZLORA_HOME"),
        EmbeddedStack(clean_environ({"ZLORA_HOME": str(tmp_path / "home")})),
    ):
        pass


def test_what_the_server_lacks_is_named(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda _name: None)

    with (
        pytest.raises(StackError, match=r"pip install 'z-image-lora\[server\]'"),
        EmbeddedStack(clean_environ(environ), serve_port=free_port()),
    ):
        pass


def test_a_missing_file_of_a_secret_is_named_and_no_process_is_left(
    environ: dict[str, str],
) -> None:
    before = descendants(os.getpid())
    for name in (config.BROKER_URL, config.WEBHOOK_SECRET):
        stack = EmbeddedStack(clean_environ(environ | {f"{name}_FILE": "/nowhere"}))
        with pytest.raises(InvalidSetting, match=f"{name}_FILE=/nowhere: No such file"), stack:
            pass
        assert not running(descendants(os.getpid()) - before)


def test_a_long_temporary_folder_and_an_old_record_do_not_stop_a_broker(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a socket has at most 107 bytes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    (tmp_path / ("x" * 100)).mkdir()
    home = Path(environ["ZLORA_HOME"])
    home.mkdir()
    record = {"url": f"redis+socket://{tmp_path}/gone.sock", "pid": 1}
    config.broker_record(home).write_text(json.dumps(record))

    with EmbeddedStack(clean_environ(environ)) as stack:
        assert "gone.sock" not in stack.broker_url
        stack.check()


def test_the_first_steps_of_the_readme_work_as_written(tmp_path: Path) -> None:
    """Its Python and its `zlora generate` draw with a LoRA beside `ZLORA_MODEL=demo zlora up`."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (python,) = re.findall(r"```python\n(.+?)```", readme, re.DOTALL)
    (command,) = re.findall(r"^zlora generate .+$", readme, re.MULTILINE)
    environ = {"ZLORA_HOME": str(tmp_path / "home"), "ZLORA_MODEL": "demo"}
    with up(environ, tmp_path / "screen") as stack:
        stack.wait_for("\nready after ")
        zlora = str(Path(sys.executable).with_name("zlora"))
        for program in [sys.executable, "-c", python], [zlora, *shlex.split(command)[1:]]:
            subprocess.run(program, env=clean_environ(environ), cwd=tmp_path, check=True)

    saved = list((tmp_path / "images").glob("*-0.png"))
    assert len(saved) == len({path.read_bytes() for path in saved}) == 2


def test_the_examples_of_the_http_pages_draw_as_written(tmp_path: Path) -> None:
    """Those for curl, and for the clients of fal, OpenAI and A1111, beside `zlora up --serve`."""
    port, tls_port = free_port(), free_port()

    def blocks(page: str, language: str) -> list[str]:
        text = (Path(__file__).parents[2] / "docs" / page).read_text()
        found = re.findall(rf"^```{language}\n(.+?)^```", text, re.MULTILINE | re.DOTALL)
        return [block.replace("8000", str(port)).replace("8443", str(tls_port)) for block in found]

    programs = Path(sys.executable).parent
    environ = clean_environ(
        {
            "ZLORA_HOME": str(tmp_path / "home"),
            "ZLORA_MODEL": "demo",
            "PATH": f"{programs}:{os.environ['PATH']}",
            "NO_PROXY": "127.0.0.1,localhost",
        }
    )

    def ran(*command: str) -> str:
        done = subprocess.run(
            command, env=environ, cwd=tmp_path, check=True, capture_output=True, encoding="utf-8"
        )
        return done.stdout

    def side_of(name: str) -> tuple[int, int]:
        with Image.open(tmp_path / name) as image:
            return image.size

    with up(environ, tmp_path / "screen", "--serve", f"--serve-port={port}") as stack:
        stack.wait_for("\nready after ")
        # The first block has started the stack; the last one is for a clone (`test_examples.py`).
        assert "event: end\nid: end\n" in ran("bash", "-ec", "".join(blocks("curl.md", "sh")[1:-1]))
        assert side_of("0.png") == (64, 64)

        for page in ("openai.md", "a1111.md"):
            ran("python", "-c", "".join(blocks(page, "python")))
            assert side_of("portrait.png") == (64, 64)
            (tmp_path / "portrait.png").unlink()

        server, variables = blocks("fal.md", "sh")
        wait = f"until curl -s --cacert certificate.pem https://localhost:{tls_port}/health/live"
        script = f"{server.rstrip()} &\ntrap 'kill %1' EXIT\n{wait}; do sleep 0.1; done\n"
        (tmp_path / "program.py").write_text(blocks("fal.md", "python")[0])
        printed = ran("bash", "-ec", f"{script}{variables}python program.py")
        assert re.search(rf"https://localhost:{tls_port}/v1/jobs/[\w-]+/images/0\n$", printed)
