"""What producer and worker set alike, and how an embedded broker is found."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import redis
from kombu import Connection
from kombu.transport.redis import Channel
from zlora import Client, config
from zlora.broker import celery_app
from zlora.broker.celery_app import IMPATIENCE, impatient_config, shared_config, transport_options
from zlora.broker.keys import (
    DEFAULT_PRIORITY,
    PRIORITIES,
    PRIORITY_STEPS,
    expiring_key,
    job_key,
    lease_key,
    unfinished_key,
    manifest_requests_key,
    refused_key,
    sweep_key,
    waiting_lists,
)
from zlora.errors import InvalidSetting
from zlora.webhook import Verifier, new_secret


@contextmanager
def listening(path: Path) -> Iterator[str]:
    """A unix socket, as an embedded broker has one; yields its URL."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        yield f"redis+socket://{path}"


def record(home: Path, text: str | bytes) -> None:
    home.mkdir(exist_ok=True)
    config.broker_record(home).write_bytes(text if isinstance(text, bytes) else text.encode())


# --- the data folder


def test_the_data_folder_is_the_named_one_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")

    assert config.home({"ZLORA_HOME": "/srv/zlora", "XDG_DATA_HOME": "/xdg"}) == Path("/srv/zlora")
    assert config.home({"ZLORA_HOME": "here"}) == tmp_path / "here"
    assert config.home({"ZLORA_HOME": "~/zlora"}) == Path("/home/somebody/zlora")


def test_the_data_folder_is_else_in_the_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")

    assert config.home({"XDG_DATA_HOME": "/xdg"}) == Path("/xdg/zlora")
    assert config.home({"ZLORA_HOME": "", "XDG_DATA_HOME": ""}) == Path(
        "/home/somebody/.local/share/zlora"
    )


def test_the_data_folder_is_a_whole_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A relative `XDG_DATA_HOME` is to be ignored (XDG Base Directory); a worker makes URLs of this path."""
    monkeypatch.setenv("HOME", str(tmp_path))

    assert config.home({"XDG_DATA_HOME": "relative"}).is_absolute()


# --- the broker


def test_the_explicit_broker_wins_over_a_running_one(tmp_path: Path) -> None:
    with listening(tmp_path / "s") as url:
        record(tmp_path, json.dumps({"url": url, "pid": 1}))

        explicit = config.broker_url(
            {"ZLORA_HOME": str(tmp_path), "ZLORA_BROKER_URL": "redis://elsewhere/1"}
        )

    assert explicit == "redis://elsewhere/1"


def test_the_embedded_broker_is_found_while_its_socket_is_there(tmp_path: Path) -> None:
    environ = {"ZLORA_HOME": str(tmp_path), "ZLORA_BROKER_URL": ""}
    with listening(tmp_path / "s") as url:
        record(tmp_path, json.dumps({"url": url, "pid": 1}))
        running = config.broker_url(environ)
    os.unlink(tmp_path / "s")

    assert running == url
    assert config.broker_url(environ) == config.DEFAULT_BROKER


def test_without_any_word_the_broker_is_redis_on_this_machine(tmp_path: Path) -> None:
    assert config.broker_url({"ZLORA_HOME": str(tmp_path / "absent")}) == "redis://localhost:6379/0"


@pytest.mark.parametrize(
    "text", ["", "{", '{"url": null}', '{"url": "redis://h"}', "{}", "[]", "null", '"x"', b"\xff"]
)
def test_a_record_that_names_no_socket_is_no_broker(tmp_path: Path, text: str | bytes) -> None:
    record(tmp_path, text)

    assert config.recorded_broker(tmp_path) is None


def test_a_data_folder_that_is_a_file_has_no_broker(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert config.recorded_broker(tmp_path / "file") is None


# --- values in files


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("redis://h/1\n", "redis://h/1"),
        ("redis://h/1", "redis://h/1"),
        (" a b \n\n", " a b "),
        ("a\r\n", "a"),
        ("", ""),
        ("\n", ""),
    ],
)
def test_a_value_is_all_of_its_file_but_the_newlines_at_the_end(
    tmp_path: Path, content: str, value: str
) -> None:
    (tmp_path / "secret").write_text(content)

    assert config.value_of({"NAME_FILE": str(tmp_path / "secret")}, "NAME") == value
    assert config.value_of({"NAME_FILE": str(tmp_path / "secret"), "NAME": ""}, "NAME") == value


def test_a_pipe_is_not_waited_for_and_an_empty_broker_is_no_other_one(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()

    with pytest.raises(InvalidSetting, match="it is a pipe"):
        config.value_of({"NAME_FILE": str(tmp_path / "pipe")}, "NAME")
    with pytest.raises(InvalidSetting, match="ZLORA_BROKER_URL_FILE: the file is empty"):
        config.broker_url({"ZLORA_BROKER_URL_FILE": str(tmp_path / "empty")})


def test_without_a_file_a_value_is_the_variable_s_as_it_is() -> None:
    assert config.value_of({"NAME": "a\n", "NAME_FILE": ""}, "NAME") == "a\n"
    assert config.value_of({}, "NAME") == ""


def test_a_value_in_two_places_or_in_no_text_is_refused_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"s3cret\xff")
    file = {"NAME_FILE": str(tmp_path / "secret")}

    for environ, reason in (
        ({"NAME": "s3cret", **file}, "NAME and NAME_FILE: expected one of them"),
        (file, "it is no text"),
        ({"NAME_FILE": str(tmp_path)}, "Is a directory"),
        ({"NAME_FILE": str(tmp_path / "absent")}, "No such file or directory"),
    ):
        with pytest.raises(InvalidSetting, match=reason) as raised:
            config.value_of(environ, "NAME")
        assert "s3cret" not in str(raised.value)


def test_a_broker_in_a_file_wins_over_a_running_one(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("redis://elsewhere/1\n")
    with listening(tmp_path / "s") as url:
        record(tmp_path, json.dumps({"url": url, "pid": 1}))

        found = config.broker_url(
            {"ZLORA_HOME": str(tmp_path), "ZLORA_BROKER_URL_FILE": str(tmp_path / "url")}
        )

    assert found == "redis://elsewhere/1"


def test_a_producer_reads_its_secrets_from_files(tmp_path: Path, broker_url: str) -> None:
    """The client its broker, and the receiver of webhooks what signs them."""
    (tmp_path / "url").write_text(f"{broker_url}\n")
    (tmp_path / "secret").write_text(f"{new_secret()}\n")
    (tmp_path / "queue").write_text("files")
    told = {
        name: str(tmp_path / file)
        for name, file in (("BROKER_URL_FILE", "url"), ("QUEUE_FILE", "queue"))
    }
    environ = {"ZLORA_HOME": str(tmp_path)} | {f"ZLORA_{name}": file for name, file in told.items()}
    with Client.from_env(environ) as client:
        client.submit({"prompt": "x"})
    with redis.Redis.from_url(broker_url) as broker:
        assert sum(int(broker.llen(name)) for name in waiting_lists("files")) == 1
    Verifier.from_env({"ZLORA_WEBHOOK_SECRET_FILE": str(tmp_path / "secret")})

    with pytest.raises(InvalidSetting, match="ZLORA_WEBHOOK_SECRET_FILE=/nowhere: No such file"):
        Verifier.from_env({"ZLORA_WEBHOOK_SECRET_FILE": "/nowhere"})
    for name in ("ZLORA_BROKER_URL", "ZLORA_RESULT_BACKEND"):
        with pytest.raises(InvalidSetting, match=f"{name}_FILE=/nowhere: No such file"):
            Client.from_env({"ZLORA_HOME": str(tmp_path), f"{name}_FILE": "/nowhere"})


# --- options


def test_the_options_are_handed_out_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery changes what it is given: no two apps share a dictionary, or a list in it."""
    monkeypatch.setattr(celery_app, "PRIORITY_STEPS", list(range(10)))
    options = shared_config(broker_url="redis://a", result_backend="redis://b", queue="q")
    options["broker_transport_options"]["priority_steps"].clear()

    again = shared_config(broker_url="redis://a", result_backend="redis://b", queue="q")

    assert again["broker_transport_options"]["priority_steps"] == list(range(10))
    assert (again["broker_url"], again["result_backend"], again["task_default_queue"]) == (
        "redis://a",
        "redis://b",
        "q",
    )


def test_only_json_is_sent_and_taken() -> None:
    """A pickle would run code."""
    options = shared_config(broker_url="redis://a", result_backend="redis://b", queue="q")

    assert options["accept_content"] == ["json"]
    assert options["task_serializer"] == options["result_serializer"] == "json"


def test_no_wait_for_redis_is_without_a_bound() -> None:
    options = shared_config(broker_url="redis://a", result_backend="redis://b", queue="q")

    names = ("socket_timeout", "socket_connect_timeout")
    waits = [options[f"redis_{name}"] for name in names] + [
        options["broker_transport_options"][name] for name in names
    ]
    assert all(wait > 0 for wait in waits)


def test_the_impatient_wait_no_longer_than_they_say_and_try_once() -> None:
    options = impatient_config(broker_url="redis://a", result_backend="redis://b", queue="q")

    names = ("socket_timeout", "socket_connect_timeout")
    assert {options[f"redis_{name}"] for name in names} == {IMPATIENCE}
    assert {options["broker_transport_options"][name] for name in names} == {IMPATIENCE}
    assert not options["redis_retry_on_timeout"]
    assert options["result_backend_transport_options"] == {"retry_policy": {"max_retries": 0}}
    assert options["broker_transport_options"]["priority_steps"] == PRIORITY_STEPS


@pytest.mark.parametrize("visibility", [1, 5, 30, 3600])
def test_lost_jobs_are_looked_for_several_times_within_the_visibility(visibility: int) -> None:
    options = transport_options(visibility=visibility)

    assert options["visibility_timeout"] == visibility
    assert 1 <= options["unacked_restore_interval"] <= max(1, visibility / 6)


def test_each_priority_has_a_list_of_its_own_and_the_first_is_the_queue_s() -> None:
    lists = waiting_lists("q")

    assert lists[0] == "q"
    assert len(set(lists)) == len(PRIORITY_STEPS)
    assert PRIORITIES["high"] < DEFAULT_PRIORITY == PRIORITIES["normal"] < PRIORITIES["low"]
    assert set(PRIORITIES.values()) <= set(PRIORITY_STEPS)


def test_what_belongs_to_a_job_or_to_a_queue_has_a_key_of_its_own() -> None:
    of_jobs = [key(job_id) for key in (job_key, lease_key) for job_id in ("a", "b")]
    of_queues = [
        key(queue)
        for key in (unfinished_key, expiring_key, sweep_key, manifest_requests_key, refused_key)
        for queue in ("a", "b")
    ]

    assert len({*of_jobs, *of_queues}) == 14
    assert all(key.startswith("zlora:") for key in (*of_jobs, *of_queues))


# --- a broker as redis-py spells it


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://h", {"host": "h"}),
        ("redis://:p%40ss@h:7/3", {"host": "h", "port": 7, "db": 3, "password": "p@ss"}),
        ("redis://user:pass@h/0", {"username": "user", "password": "pass", "db": 0}),
        ("redis://[::1]:7/1", {"host": "::1", "port": 7, "db": 1}),
        ("rediss://h/0?ssl_cert_reqs=CERT_REQUIRED", {"ssl_cert_reqs": "required"}),
        ("rediss://h/0?ssl_cert_reqs=required", {"ssl_cert_reqs": "required"}),
        ("rediss://h/0?ssl_cert_reqs=CERT_NONE", {"ssl_cert_reqs": "none"}),
        (
            "rediss://h/0?ssl_cert_reqs=optional&ssl_ca_certs=%2Fetc%2Fa%20b.pem",
            {"ssl_cert_reqs": "optional", "ssl_ca_certs": "/etc/a b.pem"},
        ),
        ("redis+socket:///run/zlora/s", {"path": "/run/zlora/s"}),
        ("redis+socket:///run/s?virtual_host=2", {"path": "/run/s", "db": 2}),
        (
            "redis+socket://:p%40ss@/run/s?virtual_host=2",
            {"path": "/run/s", "db": 2, "password": "p@ss"},
        ),
    ],
)
def test_celery_s_url_means_the_same_to_redis_py(url: str, expected: dict[str, object]) -> None:
    options = redis.Redis.from_url(config.redis_url(url)).connection_pool.connection_kwargs

    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    "url",
    ["redis://h", "redis://h//2", "redis://:p%2540ss@h:7/3", "redis://user:pass@h/0", "redis+socket:///run/a%20b",
     "redis+socket://:p%40ss@/run/s?virtual_host=2"],
)  # fmt: skip
def test_ledger_and_queue_are_in_one_database(url: str) -> None:
    """By kombu's own reading of the URL."""
    channel: Any = Channel.__new__(Channel)  # to construct one is to connect
    channel._closed = True
    channel.connection = SimpleNamespace(client=Connection(url), default_port=6379)

    ours = redis.Redis.from_url(config.redis_url(url)).connection_pool.connection_kwargs

    default = {
        "host": None,
        "port": 6379,
        "path": None,
        "username": None,
        "password": None,
        "db": 0,
    }
    theirs = channel._connparams()
    if "path" in theirs:
        default["port"] = None
    assert {name: ours.get(name, other) for name, other in default.items()} == {
        name: theirs.get(name, other) for name, other in default.items()
    }


@pytest.mark.parametrize(
    "url",
    ["sentinel://h:26379", "amqp://h//", "memory://", "cache+memory://", "sqs://", "redis://a/0;redis://b/0", "",
     "redis", "unix:///run/s", "http://h"],
)  # fmt: skip
def test_what_is_not_one_redis_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected one URL of redis, "):
        config.redis_url(url)
