"""`zlora up`: the embedded stack as its user starts and stops it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from support.processes import clean_environ, free_port, wait_until
from support.tiny_folder import tiny_model
from zlora import Client, JobState, config
from zlora.embedded import EmbeddedStack
from zlora.errors import InvalidSetting, StackError

SMALL = {"prompt": "a city at night", "num_inference_steps": 2, "seed": 1}


@pytest.fixture
def environ(model_home: Path, tmp_path: Path) -> dict[str, str]:
    """The tiny model, and an empty data folder."""
    model = str(tiny_model(model_home))
    return {"ZLORA_HOME": str(tmp_path / "home"), "ZLORA_MODEL": model, "ZLORA_DEVICE": "cpu"}


@contextmanager
def up(environ: Mapping[str, str], log: Path, *options: str) -> "Iterator[subprocess.Popen[bytes]]":
    command = [str(Path(sys.executable).with_name("zlora")), "up", *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            env=clean_environ(environ),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.kill()  # where the test has not ended it: its children end with it
        process.wait()


def descendants(pid: int) -> set[int]:
    """All processes below `pid`."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | descendants(child)
    return found


def alive(pids: set[int]) -> list[str]:
    """The command lines of those that still run; a zombie does not."""
    lines = (Path(f"/proc/{pid}/cmdline") for pid in pids)
    return [text for line in lines if line.exists() and (text := line.read_text())]


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_client_finds_the_running_stack_and_nothing_of_it_stays(
    environ: dict[str, str], tmp_path: Path, end: signal.Signals
) -> None:
    """With the data folder alone in common, a job goes through; however `zlora up` ends, its children end too."""
    port = free_port()
    with up(environ, tmp_path / "log", "--flower", f"--flower-port={port}") as stack:
        url = wait_until(
            lambda: config.recorded_broker(Path(environ["ZLORA_HOME"])), "the broker is recorded"
        )
        with Client.from_env(environ) as client:
            assert client.submit(SMALL).result(timeout=90).base_intact
        page = wait_until(lambda: flower_page(port), "Flower answers")
        assert "zlora" in page or "Flower" in page
        children = descendants(stack.pid)
        assert len(children) >= 4  # broker, worker, its child, Flower

        os.kill(stack.pid, end)
        status = stack.wait(60)

        wait_until(lambda: not alive(children), f"its children end: {alive(children)}")
        assert status == (-signal.SIGKILL if end is signal.SIGKILL else 0)
        if end is not signal.SIGKILL:
            assert not Path(url.partition("://")[2]).exists()
        assert config.recorded_broker(Path(environ["ZLORA_HOME"])) is None


def flower_page(port: int) -> str | None:
    try:
        return requests.get(f"http://127.0.0.1:{port}/tasks", timeout=5).text
    except requests.ConnectionError:
        return None


def test_jobs_outlive_the_stack(environ: dict[str, str], tmp_path: Path) -> None:
    """Told to stop, it finishes the job that runs; what was queued is drawn when it runs again."""
    with up(environ, tmp_path / "first") as stack:
        wait_until(
            lambda: config.recorded_broker(Path(environ["ZLORA_HOME"])), "the broker is recorded"
        )
        with Client.from_env(environ) as client:
            done = client.submit(SMALL)
            done.result(timeout=90)
            running = client.submit({**SMALL, "num_inference_steps": 200})
            waiting = client.submit(SMALL)
            wait_until(lambda: running.status().state is JobState.PROGRESS, "the job runs")
        stack.terminate()
        assert stack.wait(60) == 0

    with up(environ, tmp_path / "second"):
        wait_until(
            lambda: config.recorded_broker(Path(environ["ZLORA_HOME"])), "the broker is recorded"
        )
        with Client.from_env(environ) as client:
            for handle, patience in ((done, 5), (running, 5), (waiting, 90)):
                assert client.job(handle.id).result(timeout=patience).job_id == handle.id


@pytest.mark.parametrize(
    "signals", [(signal.SIGKILL,), (signal.SIGINT, signal.SIGINT)], ids=["killed", "Ctrl-C twice"]
)
def test_nothing_stays_of_a_stack_that_ends_in_mid_job(
    environ: dict[str, str], tmp_path: Path, signals: tuple[signal.Signals, ...]
) -> None:
    with up(environ, tmp_path / "log") as stack:
        wait_until(
            lambda: config.recorded_broker(Path(environ["ZLORA_HOME"])), "the broker is recorded"
        )
        with Client.from_env(environ) as client:
            handle = client.submit({**SMALL, "num_inference_steps": 200, "num_images": 8})
            wait_until(lambda: handle.status().state is JobState.PROGRESS, "the job runs")
        children = descendants(stack.pid)
        for sent in signals:
            os.kill(stack.pid, sent)
            time.sleep(1)
        stack.wait(20)

        wait_until(lambda: not alive(children), "its children end")


def test_stacks_started_at_once_share_one_broker(environ: dict[str, str], tmp_path: Path) -> None:
    with up(environ, tmp_path / "a") as first, up(environ, tmp_path / "b") as second:
        wait_until(
            lambda: all("broker  " in (tmp_path / name).read_text() for name in "ab"),
            "both have a broker",
        )
        brokers = [
            line
            for pid in (first.pid, second.pid)
            for line in alive(descendants(pid))
            if "unixsocket" in line or "valkey" in line
        ]

    assert len(brokers) == 1


def test_an_explicit_broker_wins(environ: dict[str, str], tmp_path: Path, broker_url: str) -> None:
    """Told by a file, as a secret is."""
    (tmp_path / "url").write_text(f"{broker_url}\n")
    told = environ | {"ZLORA_BROKER_URL_FILE": str(tmp_path / "url")}
    with EmbeddedStack(clean_environ(told), log_folder=tmp_path / "logs") as stack:
        assert stack.broker_url == broker_url
        assert not (Path(environ["ZLORA_HOME"]) / "broker").exists()
        # Its workers have one secret for their webhooks, and no data folder's.
        assert not config.webhook_secret(Path(environ["ZLORA_HOME"])).exists()
        with Client(broker_url) as client:
            assert client.submit(SMALL).result(timeout=90).base_intact


def test_a_second_stack_uses_the_broker_of_the_first(
    environ: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "none").touch()  # no secret of the operator's: the stacks have one of their own
    full = clean_environ(environ | {"ZLORA_WEBHOOK_SECRET_FILE": str(tmp_path / "none")})
    with (
        EmbeddedStack(full, log_folder=tmp_path / "a") as first,
        EmbeddedStack(full, log_folder=tmp_path / "b") as second,
    ):
        assert first.broker_url == second.broker_url


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_stack_leaves_nothing(
    environ: dict[str, str], tmp_path: Path, end: signal.Signals
) -> None:
    """The second is what a shell sends when its terminal is closed."""
    home = Path(environ["ZLORA_HOME"])
    with up(environ, tmp_path / "logs") as stack:
        url = wait_until(lambda: config.recorded_broker(home), "the broker is recorded")
        os.kill(stack.pid, end)
        stack.wait(60)

    assert not Path(url.partition("://")[2]).parent.exists()
    assert config.recorded_broker(home) is None


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_second_stack_ends_with_the_broker_of_the_first(
    environ: dict[str, str], tmp_path: Path, end: signal.Signals
) -> None:
    full = clean_environ(environ)
    with up(environ, tmp_path / "first") as first:
        wait_until(
            lambda: config.recorded_broker(Path(environ["ZLORA_HOME"])), "the broker is recorded"
        )
        with EmbeddedStack(full, log_folder=tmp_path / "b") as second:
            second.check()
            os.kill(first.pid, end)

            assert "started the broker" in str(
                wait_until(lambda: failure(second), "the second notices")
            )


def failure(stack: EmbeddedStack) -> StackError | None:
    """Why a stack cannot go on, if it cannot."""
    try:
        stack.check()
    except StackError as error:
        return error
    return None


def test_a_data_folder_that_is_a_file_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "home").touch()

    with (
        pytest.raises(StackError, match="ZLORA_HOME"),
        EmbeddedStack(clean_environ({"ZLORA_HOME": str(tmp_path / "home")})),
    ):
        pass


def test_a_secret_s_file_that_is_not_there_is_named_and_nothing_stays(
    environ: dict[str, str],
) -> None:
    before = descendants(os.getpid())
    for name in (config.BROKER_URL, config.WEBHOOK_SECRET):
        stack = EmbeddedStack(clean_environ(environ | {f"{name}_FILE": "/nowhere"}))
        with pytest.raises(InvalidSetting, match=f"{name}_FILE=/nowhere: No such file"), stack:
            pass
        assert not alive(descendants(os.getpid()) - before)


def test_a_temporary_folder_with_a_long_name_takes_a_broker_too(
    environ: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket's path has at most 107 bytes."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 100)))
    (tmp_path / ("x" * 100)).mkdir()

    with EmbeddedStack(clean_environ(environ), log_folder=tmp_path / "logs") as stack:
        stack.check()


def test_a_record_of_a_dead_broker_is_no_broker(environ: dict[str, str], tmp_path: Path) -> None:
    home = Path(environ["ZLORA_HOME"])
    home.mkdir()
    config.broker_record(home).write_text(
        json.dumps({"url": f"redis+socket://{tmp_path}/gone.sock", "pid": 1})
    )

    with EmbeddedStack(clean_environ(environ), log_folder=tmp_path / "logs") as stack:
        assert "gone.sock" not in stack.broker_url


def test_a_worker_that_cannot_load_ends_the_stack_with_a_reason(
    environ: dict[str, str], tmp_path: Path
) -> None:
    with EmbeddedStack(
        clean_environ(environ | {"ZLORA_MODEL": "/nonexistent"}), log_folder=tmp_path / "logs"
    ) as stack:
        error = wait_until(lambda: failure(stack), "the worker ends")

    assert error.details["status"] == 70
    assert "worker.log" in str(error)
