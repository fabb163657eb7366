"""What producer and worker set alike, and how an embedded broker is found."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from zlora import wire


@contextmanager
def listening(path: Path) -> Iterator[str]:
    """A unix socket, as an embedded broker has one; yields its URL."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        yield f"redis+socket://{path}"


def record(home: Path, text: str | bytes) -> None:
    home.mkdir(exist_ok=True)
    wire.broker_record(home).write_bytes(text if isinstance(text, bytes) else text.encode())


# --- the data folder


def test_the_data_folder_is_the_named_one_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")

    assert wire.home({"ZLORA_HOME": "/srv/zlora", "XDG_DATA_HOME": "/xdg"}) == Path("/srv/zlora")
    assert wire.home({"ZLORA_HOME": "here"}) == tmp_path / "here"
    assert wire.home({"ZLORA_HOME": "~/zlora"}) == Path("/home/somebody/zlora")


def test_the_data_folder_is_else_in_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")

    assert wire.home({"XDG_DATA_HOME": "/xdg"}) == Path("/xdg/zlora")
    assert wire.home({"ZLORA_HOME": "", "XDG_DATA_HOME": ""}) == Path("/home/somebody/.local/share/zlora")


def test_the_data_folder_is_a_whole_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A relative `XDG_DATA_HOME` is to be ignored (XDG Base Directory); a worker makes URLs of this path."""
    monkeypatch.setenv("HOME", str(tmp_path))

    assert wire.home({"XDG_DATA_HOME": "relative"}).is_absolute()


# --- the broker


def test_the_explicit_broker_wins_over_a_running_one(tmp_path: Path) -> None:
    with listening(tmp_path / "s") as url:
        record(tmp_path, json.dumps({"url": url, "pid": 1}))

        explicit = wire.broker_url({"ZLORA_HOME": str(tmp_path), "ZLORA_BROKER_URL": "redis://elsewhere/1"})

    assert explicit == "redis://elsewhere/1"


def test_the_embedded_broker_is_found_while_its_socket_is_there(tmp_path: Path) -> None:
    environ = {"ZLORA_HOME": str(tmp_path), "ZLORA_BROKER_URL": ""}
    with listening(tmp_path / "s") as url:
        record(tmp_path, json.dumps({"url": url, "pid": 1}))
        running = wire.broker_url(environ)
    os.unlink(tmp_path / "s")

    assert running == url
    assert wire.broker_url(environ) == wire.DEFAULT_BROKER


def test_without_any_word_the_broker_is_redis_on_this_machine(tmp_path: Path) -> None:
    assert wire.broker_url({"ZLORA_HOME": str(tmp_path / "absent")}) == "redis://localhost:6379/0"


@pytest.mark.parametrize("text", ["", "{", '{"url": null}', '{"url": "redis://h"}', "{}", "[]", "null", '"x"', b"\xff"])
def test_a_record_that_names_no_socket_is_no_broker(tmp_path: Path, text: str | bytes) -> None:
    record(tmp_path, text)

    assert wire.recorded_broker(tmp_path) is None


def test_a_data_folder_that_is_a_file_has_no_broker(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert wire.recorded_broker(tmp_path / "file") is None


# --- options


def test_the_options_are_handed_out_anew_each_time() -> None:
    """Celery changes what it is given: no two apps share a dictionary."""
    options = wire.shared_config(broker_url="redis://a", result_backend="redis://b", queue="q")
    options["broker_transport_options"]["priority_steps"].clear()

    again = wire.shared_config(broker_url="redis://a", result_backend="redis://b", queue="q")

    assert again["broker_transport_options"]["priority_steps"] == list(range(10))
    assert (again["broker_url"], again["result_backend"], again["task_default_queue"]) == (
        "redis://a",
        "redis://b",
        "q",
    )


def test_only_json_is_sent_and_taken() -> None:
    """A pickle would run code."""
    options = wire.shared_config(broker_url="redis://a", result_backend="redis://b", queue="q")

    assert options["accept_content"] == ["json"]
    assert options["task_serializer"] == options["result_serializer"] == "json"


def test_no_wait_for_redis_is_without_a_bound() -> None:
    options = wire.shared_config(broker_url="redis://a", result_backend="redis://b", queue="q")

    names = ("socket_timeout", "socket_connect_timeout")
    waits = [options[f"redis_{name}"] for name in names] + [options["broker_transport_options"][name] for name in names]
    assert all(wait > 0 for wait in waits)
