"""Probe of the store before a worker takes jobs.

A store that can never work ends the worker; one that may be away for a moment does not.
"""

import errno
import hashlib
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
from typing import Any, Final

import pytest
from botocore.exceptions import ClientError
from support.fakes import settings as worker_settings
from support.jobs import make_spool
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
from zlora.lora.catalogue import Catalogue
from zlora_worker.child import Child
from zlora_worker.model import loader
from zlora_worker.monitoring.metrics import Meter
from zlora_worker.results import s3
from zlora_worker.results.store import FolderStore, open_store

KEY: Final = re.compile(r"/bucket/a/runs/\.probe-[0-9a-f]{32}")
WHOLE: Final = ["PUT", "GET", "PUT", "DELETE", "GET"]
ETAG: Final = hashlib.md5(b"probe", usedforsecurity=False).hexdigest()


@pytest.fixture(autouse=True)
def _s3_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sign as a made-up user, ignore this machine's own AWS settings, and wait for no retry."""
    variables = {
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "us3r",
        "AWS_SECRET_ACCESS_KEY": "s3cret",
    }
    sign_as(monkeypatch, variables)
    # Do not wait for the rate that a busy server imposes.
    monkeypatch.setattr("botocore.retries.bucket.TokenBucket.acquire", lambda *_, **__: True)


class Bucket:
    """Serves a bucket; from its `time`th request on, a method gets `fault` as its answer."""

    def __init__(
        self, method: str = "", fault: bytes = b"", *, time: int = 1, replaces: bool = False
    ) -> None:
        self._method, self._fault, self._time, self._replaces = method, fault, time, replaces
        self.keys: set[str] = set()

    def __call__(self, request: Request) -> bytes:
        """Answer a request; its body is ignored."""
        key = request.target.partition("?")[0]
        if request.method == self._method:
            self._time -= 1
            if self._time <= 0:
                return self._fault
        if request.method == "PUT":
            if key in self.keys and not self._replaces:
                return refusal(412, "PreconditionFailed")
            self.keys.add(key)
        elif request.method == "DELETE":
            self.keys.discard(key)
            return reply(status=204, length=None)
        elif key in self.keys:
            return reply(b"probe", ETag=ETAG)
        else:
            return refusal(404, "NoSuchKey")
        return reply(ETag=ETAG)


def refusal(status: int, code: str) -> bytes:
    """Return S3's answer to a request that it refuses."""
    return reply(
        f"<Error><Code>{code}</Code><Message>two\nlines</Message></Error>".encode(), status=status
    )


def probe(folder: Path, endpoint: str, **variables: str) -> None:
    own = {"ZLORA_STORE": "s3://bucket/a", "ZLORA_S3_ENDPOINT": endpoint}
    open_store(settings(folder, **own | variables)).probe()


def refused(act: Callable[[], object]) -> str:
    """Return the error of a store that can never work: one line without secrets."""
    with pytest.raises(InvalidSetting) as raised:
        act()
    assert raised.value.details == {"name": "ZLORA_STORE"}
    message = str(raised.value)
    assert message.startswith("ZLORA_STORE: ")
    assert message.isprintable()
    assert not [secret for secret in SECRETS if secret in message]
    return message


def warned(caplog: pytest.LogCaptureFixture, act: Callable[[], object]) -> str:
    """Return the warning of a store that may work later."""
    caplog.clear()
    act()
    (record,) = ours(caplog)
    assert record.levelno == logging.WARNING
    return record.getMessage()


def ours(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Return the records of this project; botocore logs the source of its credentials."""
    return [record for record in caplog.records if record.name.startswith("zlora_worker")]


def methods(host: Host) -> list[str]:
    assert all(KEY.fullmatch(request.target.partition("?")[0]) for request in host.requests)
    return [request.method for request in host.requests]


# --- S3


def test_probe_creates_reads_and_deletes_an_object_of_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It also reads an absent object. Each probe has another key, and leaves nothing."""
    bucket = Bucket()
    with serving(bucket) as host:
        probe(tmp_path, host.url)
        assert methods(host) == WHOLE
        probe(tmp_path, host.url)

    assert len({request.target.partition("?")[0] for request in host.requests}) == 2
    assert bucket.keys == set()
    assert ours(caplog) == []


def test_probe_rejects_a_server_that_lets_a_second_put_replace_an_object(tmp_path: Path) -> None:
    """Of two workers that end a job, each would be told that its end is the first."""
    bucket = Bucket(replaces=True)
    with serving(bucket) as host:
        message = refused(lambda: probe(tmp_path, host.url))

    assert "ignores If-None-Match" in message
    assert bucket.keys == set()


@pytest.mark.parametrize(
    ("method", "time", "status", "code"),
    [
        ("PUT", 1, 403, "SignatureDoesNotMatch"),
        ("GET", 1, 403, "AccessDenied"),
        ("GET", 2, 403, "AccessDenied"),
        ("DELETE", 1, 403, "AccessDenied"),
    ],
)
def test_probe_rejects_a_server_that_refuses(
    tmp_path: Path, method: str, time: int, status: int, code: str
) -> None:
    """The second GET is for an absent object: without the right to list, S3 answers 403."""
    bucket = Bucket(method, refusal(status, code), time=time)
    with serving(bucket) as host:
        message = refused(lambda: probe(tmp_path, host.url))

    assert f"({code})" in message
    assert ("ListBucket" in message) is (time == 2)
    assert len(bucket.keys) == (method == "DELETE")


@pytest.mark.parametrize(
    ("method", "status", "code"),
    [
        ("PUT", 507, "XMinioStorageFull"),
        ("GET", 503, "SlowDown"),
        ("DELETE", 400, "RequestTimeout"),
    ],
)
def test_probe_warns_of_a_server_that_is_busy_or_has_a_fault(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str, status: int, code: str
) -> None:
    bucket = Bucket(method, refusal(status, code))
    with serving(bucket) as host:
        assert code in warned(caplog, lambda: probe(tmp_path, host.url))

    assert len(bucket.keys) == (method == "DELETE")


@pytest.mark.parametrize(
    ("status", "code", "final"),
    [
        (500, "InternalError", False),
        (503, "SlowDown", False),
        (400, "RequestTimeout", False),
        (400, "BadDigest", False),
        (408, "Timeout", False),
        (409, "OperationAborted", False),
        (429, "TooManyRequests", False),
        (400, "InvalidStorageClass", True),
        (403, "SignatureDoesNotMatch", True),
        (404, "NoSuchBucket", True),
        (501, "NotImplemented", True),
    ],
)
def test_a_refusal_is_final_by_its_status_and_code(status: int, code: str, final: bool) -> None:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}

    assert s3._is_final(ClientError(answer, "PutObject")) is final


def test_probe_warns_of_a_server_that_is_away_after_one_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        closed = f"http://127.0.0.1:{taken.getsockname()[1]}"
    assert "Could not connect" in warned(caplog, lambda: probe(tmp_path, closed))

    with serving(b"") as host:
        assert "closed" in warned(caplog, lambda: probe(tmp_path, host.url))
    assert set(methods(host)) == {"PUT"}


def test_probe_sends_nothing_after_its_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_SMALL", -1.0)
    with serving(Bucket()) as host:
        assert "in time" in warned(caplog, lambda: probe(tmp_path, host.url))

    assert host.asked == []


@pytest.mark.parametrize(
    "names", [["AWS_SECRET_ACCESS_KEY"], ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"]]
)
def test_probe_rejects_a_worker_without_credentials_and_sends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    for name in names:
        monkeypatch.delenv(name)
    with serving(Bucket()) as host:
        assert "credentials" in refused(lambda: probe(tmp_path, host.url))

    assert host.asked == []


def test_probe_rejects_a_put_argument_of_boto3_without_its_value(tmp_path: Path) -> None:
    options = json.dumps({"Metadata": {"team": "s3cret é"}})
    with serving(Bucket()) as host:
        assert "ZLORA_S3_PUT" in refused(lambda: probe(tmp_path, host.url, ZLORA_S3_PUT=options))

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
def test_probe_rejects_a_server_that_is_not_s3(tmp_path: Path, answer: Answer) -> None:
    with serving(answer) as host:
        refused(lambda: probe(tmp_path, host.url))


def test_probe_rejects_an_untrusted_certificate(tmp_path: Path) -> None:
    with serving(Bucket(), tls=Authority(tmp_path).server("localhost")) as host:
        message = refused(lambda: probe(tmp_path, f"https://localhost:{host.port}"))

    assert "CERTIFICATE_VERIFY_FAILED" in message
    assert host.asked == []


# --- a folder


def files(folder: Path) -> list[Path]:
    """Return all files under a folder, with drafts."""
    return [path for path in folder.rglob("*") if path.is_file()]


def test_several_workers_may_probe_one_folder_at_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder is created, and the probes leave nothing."""
    workers = 4
    start = Barrier(workers)

    def probe_folder(_worker: int) -> None:
        store = FolderStore(tmp_path / "a" / "store")
        start.wait(60)
        store.probe()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(probe_folder, range(workers)))

    assert (tmp_path / "a" / "store").is_dir()
    assert files(tmp_path) == []
    assert ours(caplog) == []


def test_probe_rejects_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    for place in ("file", "file/store"):
        assert f"{tmp_path / place}: " in refused(FolderStore(tmp_path / place).probe)
    assert "/proc/nosuch: " in refused(FolderStore(Path("/proc/nosuch")).probe)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOSYS])
def test_probe_rejects_a_folder_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", failing(number))

    assert os.strerror(number) in refused(FolderStore(tmp_path).probe)
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.EMFILE]
)
def test_probe_warns_of_a_disk_that_is_full_or_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    monkeypatch.setattr(os, "link", failing(number))

    assert os.strerror(number) in warned(caplog, FolderStore(tmp_path).probe)
    assert files(tmp_path) == []


def test_probe_warns_of_a_disk_without_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, hard))
    try:
        message = warned(caplog, FolderStore(tmp_path).probe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert "File too large" in message
    assert files(tmp_path) == []


def failing(number: int) -> Callable[..., None]:
    """Return a system call that fails."""

    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# --- the worker's start


def test_a_wrong_store_ends_the_worker_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []
    monkeypatch.setattr(loader, "load", loads.append)

    refused(
        lambda: Child.open(
            worker_settings(tmp_path, ZLORA_STORE="file:///proc/nosuch"),
            make_spool(tmp_path),
            Meter(),
            Catalogue(),
        )
    )

    assert loads == []
