"""Settings of producer and worker: the data folder, the broker, values in files, and parsers."""

import json
import os
import socket
import ssl
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlencode

import pytest
import redis
from kombu import Connection
from kombu.transport.redis import Channel
from support.servers import Authority
from zlora import Client, config
from zlora.broker.celery_app import IsolatedCelery, shared_config
from zlora.broker.connection import sentinel_options
from zlora.broker.keys import waiting_lists
from zlora.errors import InvalidSetting
from zlora.webhook import Verifier, new_secret


@contextmanager
def listening(path: Path) -> Iterator[str]:
    """Listen on a unix socket, as an embedded broker does; yield its URL."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        yield f"redis+socket://{path}"


def record(home: Path, text: str | bytes) -> None:
    home.mkdir(exist_ok=True)
    config.broker_record(home).write_bytes(text if isinstance(text, bytes) else text.encode())


# --- the data folder


def test_the_data_folder_is_the_absolute_path_of_zlora_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/user")

    assert config.home({"ZLORA_HOME": "/srv/zlora", "XDG_DATA_HOME": "/xdg"}) == Path("/srv/zlora")
    assert config.home({"ZLORA_HOME": "here"}) == tmp_path / "here"
    assert config.home({"ZLORA_HOME": "~/zlora"}) == Path("/home/user/zlora")


def test_the_default_data_folder_is_in_the_users_data_folder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/user")

    assert config.home({"XDG_DATA_HOME": "/xdg"}) == Path("/xdg/zlora")
    assert config.home({"ZLORA_HOME": "", "XDG_DATA_HOME": ""}) == Path(
        "/home/user/.local/share/zlora"
    )


def test_a_relative_xdg_data_home_is_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The XDG Base Directory specification says so; a worker makes URLs from this path."""
    monkeypatch.setenv("HOME", str(tmp_path))

    assert config.home({"XDG_DATA_HOME": "relative"}).is_absolute()


# --- the broker


def test_an_explicit_broker_wins_over_a_running_stack(tmp_path: Path) -> None:
    with listening(tmp_path / "s") as url:
        record(tmp_path, json.dumps({"url": url, "pid": 1}))

        explicit = config.broker_url(
            {"ZLORA_HOME": str(tmp_path), "ZLORA_BROKER_URL": "redis://elsewhere/1"}
        )

    assert explicit == "redis://elsewhere/1"


def test_the_embedded_broker_is_found_while_its_socket_exists(tmp_path: Path) -> None:
    environ = {"ZLORA_HOME": str(tmp_path), "ZLORA_BROKER_URL": ""}
    with listening(tmp_path / "s") as url:
        record(tmp_path, json.dumps({"url": url, "pid": 1}))
        running = config.broker_url(environ)
    os.unlink(tmp_path / "s")

    assert running == url
    assert config.broker_url(environ) == config.DEFAULT_BROKER


def test_the_default_broker_is_redis_on_this_machine(tmp_path: Path) -> None:
    assert config.broker_url({"ZLORA_HOME": str(tmp_path / "absent")}) == "redis://localhost:6379/0"


@pytest.mark.parametrize("text", ["", "{", '{"url": null}', '{"url": "redis://h"}', "[]", b"\xff"])
def test_a_record_without_a_socket_is_ignored(tmp_path: Path, text: str | bytes) -> None:
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
        (" a b \n\n", " a b "),
        ("a\r\n", "a"),
        ("\n", ""),
    ],
)
def test_a_value_is_the_content_of_its_file_without_final_newlines(
    tmp_path: Path, content: str, value: str
) -> None:
    (tmp_path / "secret").write_text(content)

    assert config.value_of({"NAME_FILE": str(tmp_path / "secret")}, "NAME") == value
    assert config.value_of({"NAME_FILE": str(tmp_path / "secret"), "NAME": ""}, "NAME") == value


def test_a_folder_of_secrets_has_the_variables_that_are_not_set(tmp_path: Path) -> None:
    """As a mounted Secret of Kubernetes, which may be absent."""
    (tmp_path / "NAME").write_text("s3cret\n")
    (tmp_path / "file").write_text("other")
    folder = {"ZLORA_SECRETS": str(tmp_path)}

    assert config.value_of(folder, "NAME") == "s3cret"
    assert config.value_of(folder | {"NAME": "set"}, "NAME") == "set"
    assert config.value_of(folder | {"NAME_FILE": str(tmp_path / "file")}, "NAME") == "other"
    assert config.value_of(folder, "OTHER") == ""
    assert config.value_of({"ZLORA_SECRETS": str(tmp_path / "absent")}, "NAME") == ""


def test_a_pipe_and_an_empty_file_of_the_broker_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty").touch()

    with pytest.raises(InvalidSetting, match="it is a pipe"):
        config.value_of({"NAME_FILE": str(tmp_path / "pipe")}, "NAME")
    with pytest.raises(InvalidSetting, match="ZLORA_BROKER_URL_FILE: the file is empty"):
        config.broker_url({"ZLORA_BROKER_URL_FILE": str(tmp_path / "empty")})


def test_a_value_without_a_file_is_the_variable_unchanged() -> None:
    assert config.value_of({"NAME": "a\n", "NAME_FILE": ""}, "NAME") == "a\n"
    assert config.value_of({}, "NAME") == ""


def test_a_value_in_two_places_or_an_unreadable_file_is_refused_without_showing_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "secret").write_bytes(b"s3cret\xff")
    file = {"NAME_FILE": str(tmp_path / "secret")}

    for environ, reason in (
        ({"NAME": "s3cret", **file}, "NAME and NAME_FILE: expected one of them"),
        (file, "it is not UTF-8 text"),
        ({"NAME_FILE": str(tmp_path)}, "Is a directory"),
        ({"NAME_FILE": str(tmp_path / "absent")}, "No such file or directory"),
    ):
        with pytest.raises(InvalidSetting, match=reason) as raised:
            config.value_of(environ, "NAME")
        assert "s3cret" not in str(raised.value)


def test_a_broker_in_a_file_wins_over_a_running_stack(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("redis://elsewhere/1\n")
    with listening(tmp_path / "s") as url:
        record(tmp_path, json.dumps({"url": url, "pid": 1}))

        found = config.broker_url(
            {"ZLORA_HOME": str(tmp_path), "ZLORA_BROKER_URL_FILE": str(tmp_path / "url")}
        )

    assert found == "redis://elsewhere/1"


def test_a_producer_reads_its_secrets_from_files(tmp_path: Path, broker_url: str) -> None:
    """The client reads its connection, and a receiver of webhooks its secret."""
    (tmp_path / "url").write_text(f"{broker_url}\n")
    (tmp_path / "secret").write_text(f"{new_secret()}\n")
    (tmp_path / "queue").write_text("files")
    files = {
        name: str(tmp_path / file)
        for name, file in (("BROKER_URL_FILE", "url"), ("QUEUE_FILE", "queue"))
    }
    environ = {"ZLORA_HOME": str(tmp_path)} | {
        f"ZLORA_{name}": file for name, file in files.items()
    }
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
        ("rediss://h/0", {"ssl_cert_reqs": "required"}),
        ("redis+socket:///run/zlora/s", {"path": "/run/zlora/s"}),
        ("redis+socket:///run/s?virtual_host=2", {"path": "/run/s", "db": 2}),
        (
            "redis+socket://:p%40ss@/run/s?virtual_host=2",
            {"path": "/run/s", "db": 2, "password": "p@ss"},
        ),
    ],
)
def test_a_celery_url_is_translated_to_redis_py(url: str, expected: dict[str, object]) -> None:
    options = redis.Redis.from_url(config.redis_url(url)).connection_pool.connection_kwargs

    assert {name: options[name] for name in expected} == expected


@pytest.mark.parametrize(
    "url",
    [
        "redis://h",
        "redis://h//2",
        "redis://:p%2540ss@h:7/3",
        "redis://user:pass@h/0",
        "redis+socket:///run/a%20b",
        "redis+socket://:p%40ss@/run/s?virtual_host=2",
    ],
)
def test_job_store_and_queue_are_in_the_same_database(url: str) -> None:
    """Kombu's own reading of the URL is the reference."""
    channel: Any = Channel.__new__(Channel)  # the constructor would connect
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


def test_the_files_of_a_tls_client_are_named_in_the_url(tmp_path: Path) -> None:
    """A path with a space, as kombu, Celery's backend and redis-py each decode it."""
    folder = tmp_path / "a b"
    folder.mkdir()
    authority = Authority(folder)
    certificate = authority.certificate("client")
    files = {
        "ssl_ca_certs": str(authority.bundle),
        "ssl_certfile": str(certificate),
        "ssl_keyfile": str(certificate.with_suffix(".key")),
    }
    url = f"rediss://h/0?{urlencode(files)}"

    found = shared_config(broker_url=url, result_backend=url, queue="gpu")
    options = redis.Redis.from_url(config.redis_url(url)).connection_pool.connection_kwargs
    app = IsolatedCelery("test", found)
    kombus = app.connection_for_write().ssl
    backend: Any = app.backend
    celerys = backend.connparams

    expected = files | {"ssl_cert_reqs": "required"}
    assert found["broker_use_ssl"] == found["redis_backend_use_ssl"] == expected
    for name, path in files.items():
        assert options[name] == kombus[name] == celerys[name] == path
    assert options["ssl_cert_reqs"] == "required"
    assert celerys["ssl_cert_reqs"] is ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("redis://h/0?ssl_ca_certs=/ca.pem", "expected a URL that begins with rediss://"),
        ("rediss://h/0?ssl_check_hostname=false", "ssl_check_hostname: expected ssl_cert_reqs, "),
        ("rediss://h/0?ssl_cert_reqs=maybe", "ssl_cert_reqs: expected required or none"),
        ("rediss://h/0?ssl_cert_reqs=optional", "ssl_cert_reqs: expected required or none"),
        ("rediss://h/0?ssl_ca_certs=/a%2525b.pem", "ssl_ca_certs: expected a path without %"),
        ("rediss://h/0?ssl_ca_certs=/nowhere", "ssl_ca_certs=/nowhere: No such file"),
        ("rediss://h/0?ssl_ca_certs={folder}", "ssl_ca_certs={folder}: Is a directory"),
        ("rediss://h/0?ssl_ca_certs={folder}/junk", "OpenSSL cannot use it"),
        ("rediss://h/0?ssl_keyfile=/nowhere", "ssl_keyfile: expected ssl_certfile, too"),
        ("rediss://h/0?ssl_certfile={folder}/ca.pem", "ssl_certfile={folder}/ca.pem: OpenSSL"),
        (
            "rediss://h/0?ssl_certfile={folder}/ca.pem&ssl_keyfile={folder}/client.key",
            "KEY_VALUES_MISMATCH",
        ),
        (
            "rediss://h/0?ssl_certfile={folder}/client.pem&ssl_keyfile={folder}/locked.key",
            "locked.key: OpenSSL cannot use it",
        ),
    ],
)
def test_options_for_tls_that_cannot_be_used_are_refused(
    url: str, reason: str, tmp_path: Path
) -> None:
    """An encrypted key too, for which OpenSSL would prompt."""
    Authority(tmp_path).certificate("client")
    (tmp_path / "junk").write_text("junk")
    locked = ["-aes256", "-passout", "pass:word", "-out", str(tmp_path / "locked.key")]
    key = str(tmp_path / "client.key")
    subprocess.run(["openssl", "pkey", "-in", key, *locked], check=True)
    url = url.format(folder=tmp_path)

    with pytest.raises(InvalidSetting) as raised:
        Client(url)

    assert str(raised.value).startswith("ZLORA_BROKER_URL: ")
    assert reason.format(folder=tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        "sentinel2://h:26379",
        "amqp://h//",
        "memory://",
        "cache+memory://",
        "sqs://",
        "redis://a/0;redis://b/0",
        "",
        "redis",
        "unix:///run/s",
        "http://h",
    ],
)
def test_a_url_of_anything_but_one_redis_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="expected one URL of redis, "):
        config.redis_url(url)


# --- parsers


def test_the_first_variable_that_is_set_is_read_and_not_shown_if_wrong() -> None:
    assert config.read_first({"A": "", "B": "7"}, "A", "B", parse=int) == 7
    assert config.read_first({"A": "6", "B": "7"}, "A", "B", parse=int) == 6
    assert config.read_first({}, "A", "B", parse=int, default="5") == 5
    with pytest.raises(InvalidSetting, match=r"^B: ") as raised:
        config.read_first({"B": "s3cret"}, "A", "B", parse=config.web_url)
    assert "s3cret" not in str(raised.value)


# --- Sentinels


def test_a_url_of_sentinels_names_the_primary_and_how_to_open_it() -> None:
    found = config.sentinels(
        "sentinel://user:p%40ss@one,two:26380,[::1]:3/2?master=zlora&sentinel_username=watcher"
        "&sentinel_password=w%2Fs&socket_timeout=3"
    )
    assert found is not None
    assert found.hosts == (("one", 26379), ("two", 26380), ("::1", 3))
    assert (found.name, found.username, found.password) == ("zlora", "watcher", "w/s")
    assert found.primary == "redis://user:p%40ss@localhost/2?socket_timeout=3"
    assert found.celery.split(";") == [
        "sentinel://user:p%40ss@one:26379/2?socket_timeout=3",
        "sentinel://user:p%40ss@two:26380/2?socket_timeout=3",
        "sentinel://user:p%40ss@[::1]:3/2?socket_timeout=3",
    ]


def test_an_option_of_tls_in_a_url_of_sentinels_means_tls() -> None:
    found = config.sentinels("sentinel://one/0?master=zlora&ssl_cert_reqs=none")
    assert found is not None
    assert found.primary == "rediss://localhost/0?ssl_cert_reqs=none"
    assert sentinel_options(found)["ssl"]


@pytest.mark.parametrize("url", ["redis://h/0", "rediss://h/0", "redis+socket:///s", "", "h"])
def test_any_other_url_names_no_sentinels(url: str) -> None:
    assert config.sentinels(url) is None
    assert config.celery_url(url) == url


@pytest.mark.parametrize(
    "url",
    [
        "sentinel://:s3cret@one/0",
        "sentinel://:s3cret@/0?master=zlora",
        "sentinel://:s3cret@one,,two/0?master=zlora",
        "sentinel://:s3cret@one:port/0?master=zlora",
        "sentinel://:s3cret@[one/0?master=zlora",
    ],
)
@pytest.mark.parametrize("name", [config.BROKER_URL, config.RESULT_BACKEND])
def test_a_wrong_url_of_sentinels_is_refused_and_not_shown(url: str, name: str) -> None:
    with pytest.raises(InvalidSetting, match=name) as raised:
        config.Connection.from_env({config.BROKER_URL: "redis://h/0", name: url})
    assert "s3cret" not in str(raised.value)


@pytest.mark.parametrize("text", ["-1", "one", "1.5", "1000", "\u0661"])
def test_a_wrong_number_of_replicas_is_refused(text: str) -> None:
    with pytest.raises(InvalidSetting, match=config.WAIT_REPLICAS):
        config.Connection.from_env({config.WAIT_REPLICAS: text})


def test_the_number_of_replicas_is_read() -> None:
    assert config.Connection.from_env({config.WAIT_REPLICAS: "2"}).wait_replicas == 2
    assert config.Connection.from_env({}).wait_replicas == 0
