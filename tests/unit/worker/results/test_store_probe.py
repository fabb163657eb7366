"""What a worker asks its store before it takes jobs: a wrong one ends it, one that is away for a moment does not."""

import errno
import json
import logging
import os
import re
import resource
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Final

import pytest
from support.fakes import settings as worker_settings
from support.servers import (
    SECRETS,
    Answer,
    Authority,
    Host,
    Request,
    reply,
    serving,
    settings,
    sign_as,
)
from zlora.errors import InvalidSetting
from zlora_worker.generate import Child
from zlora_worker.model import loader
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results import s3
from zlora_worker.results.store import FolderStore, open_store

KEY: Final = re.compile(r"/bucket/a/runs/\.probe-[0-9a-f]{32}")
WHOLE: Final = ["PUT", "GET", "DELETE", "GET"]


@pytest.fixture(autouse=True)
def _s3_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What boto3 needs to sign a request, and nothing of this machine's own AWS; nobody waits."""
    variables = {
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "us3r",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
    }
    sign_as(monkeypatch, variables)
    monkeypatch.setattr(
        "botocore.retries.bucket.TokenBucket.acquire", lambda *_, **__: True
    )  # of a server's rate


class Bucket:
    """A bucket of a server, but for the `fault` that a method meets: the so manieth time, counted from one."""

    def __init__(self, method: str = "", fault: bytes = b"", *, time: int = 1) -> None:
        self._method, self._fault, self._time = method, fault, time
        self.keys: set[str] = set()

    def __call__(self, request: Request) -> bytes:
        """The answer; a request's body is not looked at."""
        key = request.target.partition("?")[0]
        if request.method == self._method:
            self._time -= 1
            if self._time <= 0:
                return self._fault
        if request.method == "PUT":
            self.keys.add(key)
        elif request.method == "DELETE":
            self.keys.discard(key)
            return reply(status=204, length=None)
        elif key in self.keys:
            return reply(b"probe")
        else:
            return refusal(404, "NoSuchKey")
        return reply()


def refusal(status: int, code: str) -> bytes:
    """S3's answer to a request that it does not grant."""
    return reply(
        f"<Error><Code>{code}</Code><Message>as\ntold</Message></Error>".encode(), status=status
    )


def probe(folder: Path, endpoint: str, **variables: str) -> None:
    told = {"ZLORA_STORE": "s3://bucket/a", "ZLORA_S3_ENDPOINT": endpoint}
    open_store(settings(folder, **told | variables)).probe()


def refused(act: Callable[[], object]) -> str:
    """What the probe says of a store that is wrong: one line, and no secret."""
    with pytest.raises(InvalidSetting) as raised:
        act()
    assert raised.value.details == {"name": "ZLORA_STORE"}
    said = str(raised.value)
    assert said.startswith("ZLORA_STORE: ")
    assert said.isprintable()
    assert not [secret for secret in SECRETS if secret in said]
    return said


def warned(caplog: pytest.LogCaptureFixture, act: Callable[[], object]) -> str:
    """What the probe says of a store that may be well another time."""
    caplog.clear()
    act()
    (record,) = ours(caplog)
    assert record.levelno == logging.WARNING
    return record.getMessage()


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What this project has logged; botocore says where it has its credentials from."""
    return [record for record in caplog.records if record.name.startswith("zlora_worker")]


def methods(host: Host) -> list[str]:
    assert all(KEY.fullmatch(request.target.partition("?")[0]) for request in host.requests)
    return [request.method for request in host.requests]


# --- S3


def test_an_s3_that_takes_gives_and_forgets_an_object_is_a_store(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It says as well that an object is not there; each probe has a key of its own, and leaves nothing."""
    bucket = Bucket()
    with serving(bucket) as host:
        probe(tmp_path, host.url)
        assert methods(host) == WHOLE
        probe(tmp_path, host.url)

    assert len({request.target.partition("?")[0] for request in host.requests}) == 2
    assert bucket.keys == set()
    assert ours(caplog) == []


@pytest.mark.parametrize(
    ("method", "time", "status", "code"),
    [
        ("PUT", 1, 403, "SignatureDoesNotMatch"),
        ("PUT", 1, 404, "NoSuchBucket"),
        ("PUT", 1, 400, "InvalidStorageClass"),
        ("PUT", 1, 501, "NotImplemented"),
        ("GET", 1, 403, "AccessDenied"),
        ("GET", 2, 403, "AccessDenied"),
        ("DELETE", 1, 403, "AccessDenied"),
    ],
)
def test_an_s3_that_refuses_is_wrong(
    tmp_path: Path, method: str, time: int, status: int, code: str
) -> None:
    """The second GET is for what is not there: whoever may not list a bucket is told 403, and no job is drawn."""
    bucket = Bucket(method, refusal(status, code), time=time)
    with serving(bucket) as host:
        said = refused(lambda: probe(tmp_path, host.url))

    assert f"({code})" in said
    assert ("ListBucket" in said) is (time == 2)
    assert len(bucket.keys) == (method == "DELETE")


@pytest.mark.parametrize(
    ("method", "status", "code"),
    [
        ("PUT", 500, "InternalError"),
        ("PUT", 503, "SlowDown"),
        ("GET", 503, "SlowDown"),
        ("DELETE", 503, "SlowDown"),
        ("PUT", 400, "RequestTimeout"),
        ("GET", 400, "BadDigest"),
        ("PUT", 408, "Timeout"),
        ("PUT", 409, "OperationAborted"),
        ("PUT", 429, "TooManyRequests"),
        ("PUT", 507, "XMinioStorageFull"),
    ],
)
def test_an_s3_that_is_busy_or_harmed_may_be_well_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, status: int, code: str
) -> None:
    bucket = Bucket(method, refusal(status, code))
    with serving(bucket) as host:
        assert code in warned(caplog, lambda: probe(tmp_path, host.url))

    assert len(bucket.keys) == (method == "DELETE")


def test_an_s3_that_is_away_may_be_back_and_is_asked_for_one_thing_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert "Could not connect" in warned(caplog, lambda: probe(tmp_path, closed))

    with serving(b"") as host:
        assert "closed" in warned(caplog, lambda: probe(tmp_path, host.url))
    assert set(methods(host)) == {"PUT"}


def test_an_s3_that_does_not_answer_in_time_is_asked_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_SMALL", -1.0)
    with serving(Bucket()) as host:
        assert "in time" in warned(caplog, lambda: probe(tmp_path, host.url))

    assert host.asked == []


@pytest.mark.parametrize(
    "names", [["AWS_SECRET_ACCESS_KEY"], ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]]
)
def test_without_credentials_an_s3_is_wrong_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    for name in names:
        monkeypatch.delenv(name)
    with serving(Bucket()) as host:
        assert "credentials" in refused(lambda: probe(tmp_path, host.url))

    assert host.asked == []


def test_a_put_argument_that_boto3_refuses_is_wrong_and_is_not_shown(tmp_path: Path) -> None:
    told = json.dumps({"Metadata": {"team": "s3cret é"}})
    with serving(Bucket()) as host:
        assert "ZLORA_S3_PUT" in refused(lambda: probe(tmp_path, host.url, ZLORA_S3_PUT=told))

    assert host.asked == []


@pytest.mark.parametrize(
    "answer",
    [
        lambda _request: reply(b"<html>Welcome</html>", status=404),
        lambda request: reply(b"Welcome") if request.method == "GET" else reply(),
        lambda request: reply(status=301, Location=f"https://s3.test{request.target}"),
    ],
    ids=["nothing", "other bytes", "a redirect"],
)
def test_what_is_no_s3_is_wrong(tmp_path: Path, answer: Answer) -> None:
    with serving(answer) as host:
        refused(lambda: probe(tmp_path, host.url))


def test_a_certificate_that_nobody_trusts_is_wrong(tmp_path: Path) -> None:
    with serving(Bucket(), tls=Authority(tmp_path).server("localhost")) as host:
        said = refused(lambda: probe(tmp_path, f"https://localhost:{host.port}"))

    assert "CERTIFICATE_VERIFY_FAILED" in said
    assert host.asked == []


# --- a folder


def files(folder: Path) -> list[Path]:
    """All files under a folder, drafts included."""
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_folder_that_can_be_written_is_a_store_for_several_workers_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is made, and the probes leave nothing."""
    hands = 8
    start = Barrier(hands)

    def ask(_hand: int) -> None:
        store = FolderStore(tmp_path / "a" / "store")
        start.wait(60)
        store.probe()

    with ThreadPoolExecutor(hands) as pool:
        list(pool.map(ask, range(hands)))

    assert (tmp_path / "a" / "store").is_dir()
    assert files(tmp_path) == []
    assert ours(caplog) == []


def test_a_folder_that_cannot_be_made_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    for place in ("file", "file/store"):
        assert f"{tmp_path / place}: " in refused(FolderStore(tmp_path / place).probe)
    assert "/proc/nosuch: " in refused(FolderStore(Path("/proc/nosuch")).probe)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOSYS])
def test_a_folder_that_takes_no_links_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", failing(number))

    assert os.strerror(number) in refused(FolderStore(tmp_path).probe)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE]
)
def test_a_disk_that_is_full_or_away_may_be_well_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr(os, "link", failing(number))

    assert os.strerror(number) in warned(caplog, FolderStore(tmp_path).probe)
    assert files(tmp_path) == []


def test_a_disk_that_takes_no_byte_more_may_have_room_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        said = warned(caplog, FolderStore(tmp_path).probe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert "File too large" in said
    assert files(tmp_path) == []


def failing(number: int) -> Callable[..., None]:
    """A call of the system that does not succeed."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# --- the start


def test_a_wrong_store_costs_no_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[object] = []
    monkeypatch.setattr(loader, "load", loads.append)

    refused(
        lambda: Child.open(worker_settings(tmp_path, ZLORA_STORE="file:///proc/nosuch"), Meter())
    )

    assert loads == []
