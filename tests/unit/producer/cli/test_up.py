"""The screen of `zlora up`, with a stack that starts no processes."""

import os
import signal
import socket
from pathlib import Path
from typing import Self

import pytest
from click.testing import CliRunner, Result
from zlora import embedded
from zlora.cli import main, up
from zlora.errors import StackError
from zlora_worker.settings import Settings

LOGS = Path("/data/logs")


class FakeStack:
    """A stack that is ready at once, until `check` is called for the second time."""

    broker_url, home, log_folder = "redis://:a-secret@redis:6379/0", Path("/data"), LOGS
    flower_url = "http://zlora:password@127.0.0.1:5555"
    page_url = "http://127.0.0.1:8000/"

    def __init__(self, *_: object, **__: object) -> None:
        self.checks = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def is_ready(self) -> bool:
        return True

    def check(self) -> None:
        self.checks += 1
        if self.checks == 2:
            os.kill(os.getpid(), signal.SIGINT)


def run(
    monkeypatch: pytest.MonkeyPatch, stack: type, *options: str, **environ: str | None
) -> Result:
    monkeypatch.setattr(embedded, "EmbeddedStack", stack)
    return CliRunner().invoke(main, ["up", *options], env=environ)


@pytest.mark.usefixtures("handlers")
def test_the_screen_says_where_which_model_and_what_to_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The password of the broker's URL is not printed."""
    result = run(monkeypatch, FakeStack, "--flower", ZLORA_MODEL="demo", ZLORA_HOME="/data")

    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        "broker  redis://redis:6379/0",
        "store   /data/store",
        "Flower  http://zlora:password@127.0.0.1:5555",
        "logs    /data/logs",
        "model   demo, loading",
        "ready after 0 s; to draw an image, type in another terminal with the same ZLORA_HOME:",
        "",
        '  zlora generate "a portrait in anime style" --lora demo://anime-style',
        "",
        "stopping after the running job; Ctrl-C again stops at once",
    ]


@pytest.mark.usefixtures("handlers")
def test_the_screen_says_where_the_page_is(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, FakeStack, "--serve", ZLORA_HOME=None, ZLORA_BROKER_URL=None)

    assert "page    http://127.0.0.1:8000/\n" in result.stdout
    assert "to draw an image, open http://127.0.0.1:8000/, or type in another" in result.stdout


@pytest.mark.usefixtures("handlers")
def test_several_models_are_printed_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example is for the first one, which a request without `model` has."""
    models = "drawn=demo, photo=/models/photo.safetensors"
    result = run(monkeypatch, FakeStack, ZLORA_MODEL="", ZLORA_MODELS=models)

    assert "model   drawn, photo, loading\n" in result.stdout
    assert "demo://anime-style" in result.stdout


@pytest.mark.usefixtures("handlers")
def test_without_a_model_that_of_the_worker_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    default = Settings.from_env({}).model
    result = run(monkeypatch, FakeStack, ZLORA_MODEL=None, ZLORA_STORE="s3://key:a-secret@b/c")

    assert default == up.DEFAULT_MODEL
    assert f"model   {default}, loading\n" in result.stdout
    assert "demo://" not in result.stdout
    assert "a-secret" not in result.stdout


@pytest.mark.usefixtures("handlers")
def test_a_process_that_ends_is_reported_with_the_last_lines_of_its_log(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Failing(FakeStack):
        def check(self) -> None:
            details = {"log": "/data/logs/worker.log", "last_lines": ["loading", "no such model"]}
            raise StackError("the worker has ended; its log is /data/logs/worker.log", details)

    result = run(monkeypatch, Failing)

    assert result.exit_code == 69
    assert result.stderr.splitlines() == [
        "loading",
        "no such model",
        "Error: the worker has ended; its log is /data/logs/worker.log [stack_error]",
    ]


@pytest.mark.usefixtures("handlers")
def test_a_port_that_is_in_use_is_named_before_anything_is_printed(tmp_path: Path) -> None:
    """The page of another server would be taken for this one."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        environ = {"ZLORA_HOME": str(tmp_path), "ZLORA_BROKER_URL": "redis://127.0.0.1:1/0"}

        result = CliRunner().invoke(main, ["up", "--serve", f"--serve-port={port}"], env=environ)

    assert (result.exit_code, result.stdout) == (69, "")
    assert result.stderr == (
        f"Error: port {port}: Address already in use: choose another with --serve-port"
        " [stack_error]\n"
    )
