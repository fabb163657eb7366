"""Requests to S3, and rare answers; tests/integration and tests/faults have a real server."""

import base64
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit

import pytest
from support.servers import (
    Answer,
    Host,
    Request,
    reply,
    serving,
    settings,
    sign_as,
    watched_connections,
)
from urllib3.exceptions import SSLError
from zlora.errors import InvalidSetting, StoreFailed
from zlora_worker.results import s3
from zlora_worker.results.s3 import S3Store
from zlora_worker.results.store import open_store

KEY: Final = "runs/job-1/outputs/0.png"
PNG: Final = "image/png"


@pytest.fixture(autouse=True)
def _s3_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sign as a made-up user, ignore this machine's own AWS settings, and wait for no retry."""
    variables = {
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    sign_as(monkeypatch, variables)


def s3_store(folder: Path, *hosts: Host, **variables: str) -> S3Store:
    """Return the store in `bucket`, on the host if there is one."""
    endpoint = {"ZLORA_S3_ENDPOINT": hosts[0].url} if hosts else {}
    store = open_store(settings(folder, **{"ZLORA_STORE": "s3://bucket"} | endpoint | variables))
    assert isinstance(store, S3Store)
    return store


def refusal(status: int, code: str) -> bytes:
    """Return S3's answer to a request that it refuses."""
    return reply(
        f"<Error><Code>{code}</Code><Message>because</Message></Error>".encode(), status=status
    )


def in_turn(*answers: bytes) -> Answer:
    """Give each answer once; an empty one drops the connection."""
    rest = iter(answers)
    return lambda _request: next(rest)


def crc(data: bytes) -> str:
    """Return a CRC32 as S3 writes it."""
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def crc_of_parts(*parts: bytes) -> str:
    """Return the CRC32 of an object in parts as S3 writes it."""
    sums = b"".join(zlib.crc32(part).to_bytes(4, "big") for part in parts)
    return f"{crc(sums)}-{len(parts)}"


STORED: Final = reply(x_amz_checksum_crc32=crc(b"content"))
TAKEN: Final = refusal(412, "PreconditionFailed")
BUSY: Final = refusal(409, "ConditionalRequestConflict")
CHANGED: Final = refusal(400, "BadDigest")


# --- URLs and settings


@pytest.mark.parametrize(("url", "prefix"), [("s3://bucket", ""), ("s3://bucket/a/b/", "a/b/")])
def test_an_s3_url_is_a_bucket_and_a_prefix(tmp_path: Path, url: str, prefix: str) -> None:
    store = s3_store(tmp_path, ZLORA_STORE=url)

    assert store.name(KEY) == f"{prefix}{KEY}"
    assert urlsplit(store.url(KEY, 60)).path == f"/{prefix}{KEY}"


@pytest.mark.parametrize(
    ("variables", "origin"),
    [
        ({}, "https://bucket.s3.eu-central-1.amazonaws.com/"),
        ({"ZLORA_STORE": "s3://b.ck.t"}, "https://s3.eu-central-1.amazonaws.com/b.ck.t/"),
        ({"ZLORA_S3_ADDRESSING": "path"}, "https://s3.eu-central-1.amazonaws.com/bucket/"),
        ({"ZLORA_S3_ENDPOINT": "http://s3:9000"}, "http://s3:9000/bucket/"),
        (
            {"ZLORA_S3_ENDPOINT": "http://s3:9000", "ZLORA_S3_ADDRESSING": "virtual"},
            "http://bucket.s3:9000/",
        ),
        (
            {"ZLORA_S3_ENDPOINT": "http://s3:9000", "ZLORA_S3_PUBLIC_ENDPOINT": "https://s3.test"},
            "https://s3.test/buc",
        ),
    ],
    ids=[
        "AWS",
        "a name that is no host",
        "AWS by path",
        "another server",
        "its buckets as hosts",
        "its public endpoint",
    ],
)
def test_a_url_is_signed_for_the_public_host_without_a_request(
    tmp_path: Path, variables: dict[str, str], origin: str
) -> None:
    with watched_connections() as connections:
        url = s3_store(tmp_path, **variables).url(KEY, 77)

    query = parse_qs(urlsplit(url).query)
    assert url.startswith(origin)
    assert query["X-Amz-Expires"] == ["77"]
    assert query["X-Amz-SignedHeaders"] == ["host"]  # a browser adds no others
    assert connections == []


def test_without_credentials_nothing_is_signed_or_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)

    with serving(reply()) as host:
        store = s3_store(tmp_path, host)
        for act in (
            lambda: store.url(KEY, 60),
            lambda: store.get(KEY),
            lambda: store.put_new(KEY, b"", PNG),
        ):
            with pytest.raises(StoreFailed, match="Unable to locate credentials"):
                act()

    assert host.asked == []


@pytest.mark.parametrize(
    ("value", "refused"),
    [
        ('{"StorageKlass": "STANDARD_IA"}', "StorageKlass"),
        ('{"StorageClass": 3}', "StorageClass"),
        ('{"Metadata": {"a": 1}}', "Metadata"),
        ('{"Key": "x", "Body": "x", "IfNoneMatch": "x"}', "Body, IfNoneMatch, Key"),
        ('{"ContentType": "x", "ChecksumCRC32": "AAAAAA=="}', "ChecksumCRC32, ContentType"),
        (
            '{"SSECustomerKey": "x", "SSECustomerAlgorithm": "AES256"}',
            "SSECustomerAlgorithm, SSECustomerKey",
        ),
    ],
)
def test_unknown_or_reserved_put_arguments_are_refused(
    tmp_path: Path, value: str, refused: str
) -> None:
    """When the worker starts, not with the first image.

    An object encrypted by a customer's key could not be read back.
    """
    with pytest.raises(InvalidSetting, match=refused) as raised:
        s3_store(tmp_path, ZLORA_S3_PUT=value)

    assert raised.value.details == {"name": "ZLORA_S3_PUT"}


def test_an_unknown_profile_is_an_invalid_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "absent")

    with pytest.raises(InvalidSetting, match="absent"):
        s3_store(tmp_path)


@pytest.mark.parametrize("part", [100, 4], ids=["in one piece", "in parts"])
def test_put_arguments_are_sent_with_each_upload(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(s3, "_PART", part)
    put = reply(ETag="part", x_amz_checksum_crc32=crc(b"content"))
    options = '{"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "mine"}'

    with serving(parts_by(lambda _: reply(COMPLETE), part=put)) as host:
        assert s3_store(tmp_path, host, ZLORA_S3_PUT=options).put_new(KEY, b"content", PNG)

    first = host.requests[0].headers
    assert (first["x-amz-server-side-encryption"], first["content-type"]) == ("aws:kms", PNG)
    assert first["x-amz-server-side-encryption-aws-kms-key-id"] == "mine"


# --- whole puts


@pytest.mark.parametrize(
    ("answers", "created"),
    [
        ([STORED], True),
        ([TAKEN], False),
        ([BUSY, BUSY, STORED], True),
        ([BUSY, TAKEN], False),
        ([b"", TAKEN], False),
        ([b"", STORED], True),
        ([CHANGED, STORED], True),
        ([refusal(500, "InternalError"), refusal(503, "Unavailable"), STORED], True),
    ],
    ids=[
        "free",
        "taken",
        "busy",
        "busy, taken",
        "dropped, taken",
        "dropped",
        "changed on the way",
        "server's fault",
    ],
)
def test_a_write_is_conditional_and_is_repeated(
    tmp_path: Path, answers: list[bytes], created: bool
) -> None:
    """After a lost answer the second try may meet the object of the first, which stays."""
    with serving(in_turn(*answers)) as host:
        assert s3_store(tmp_path, host).put_new(KEY, b"content", PNG) is created

    assert host.asked == [f"PUT /bucket/{KEY}"] * len(answers)
    assert all(request.headers["if-none-match"] == "*" for request in host.requests)
    assert all(
        request.headers["x-amz-checksum-crc32"] == crc(b"content") for request in host.requests
    )


def test_a_busy_server_gets_requests_at_a_lower_rate(tmp_path: Path) -> None:
    """boto3's adaptive mode lowers the rate if a server throttles, and raises it again."""
    config: Any = s3_store(tmp_path)._client.meta.config

    assert config.retries["mode"] == "adaptive"


@pytest.mark.parametrize(
    ("answer", "tries"),
    [
        (BUSY, 4),
        (CHANGED, 4),
        (refusal(403, "AccessDenied"), 1),
        (b"", 8),
        (refusal(500, "InternalError"), 8),
    ],
    ids=["busy", "changed", "no right", "dropped", "server's fault"],
)
def test_a_lasting_error_fails_the_store_after_some_tries(
    tmp_path: Path, answer: bytes, tries: int
) -> None:
    with (
        serving(answer) as host,
        pytest.raises(StoreFailed, match=f"{KEY} cannot be stored in bucket") as raised,
    ):
        s3_store(tmp_path, host).put_new(KEY, b"content", PNG)

    assert raised.value.retryable
    assert len(host.requests) == tries


# --- puts in parts

CREATE: Final = (
    b"<InitiateMultipartUploadResult><UploadId>one</UploadId></InitiateMultipartUploadResult>"
)
COMPLETE: Final = (
    f"<CompleteMultipartUploadResult><ChecksumCRC32>{crc_of_parts(b'cont', b'ent')}</ChecksumCRC32>"
    "</CompleteMultipartUploadResult>"
).encode()
GONE: Final = refusal(404, "NoSuchUpload")
WHOLE: Final = ("POST uploads", "PUT 1", "PUT 2", "POST")  # requests of an upload in two parts


def parts_by(complete: Answer, *, part: bytes = reply(ETag="part")) -> Answer:
    """Return a server of uploads that answers the last request of one by `complete`."""

    def answer(request: Request) -> bytes | Iterable[bytes]:
        if request.method == "POST":
            return reply(CREATE) if request.target.endswith("?uploads") else complete(request)
        return reply(status=204, length=None) if request.method == "DELETE" else part

    return answer


def steps(host: Host) -> list[str]:
    """Return each request's method, and the number of its part."""
    found = []
    for request in host.requests:
        query = urlsplit(request.target).query
        number = re.search(r"partNumber=(\d)", query)
        part = "uploads" if query == "uploads" else ""
        found.append(f"{request.method} {number[1] if number else part}".strip())
    return found


@pytest.mark.parametrize(
    ("answers", "created", "requests"),
    [
        ([reply(COMPLETE)], True, [*WHOLE]),
        ([TAKEN], False, [*WHOLE, "DELETE"]),
        ([BUSY, reply(COMPLETE)], True, [*WHOLE, "DELETE", *WHOLE]),
        ([b"", TAKEN], False, [*WHOLE, "POST", "DELETE"]),
        ([b"", GONE, TAKEN], False, [*WHOLE, "POST", "DELETE", *WHOLE, "DELETE"]),
        ([GONE, reply(COMPLETE)], True, [*WHOLE, "DELETE", *WHOLE]),
        ([refusal(200, "InternalError"), reply(COMPLETE)], True, [*WHOLE, "POST"]),
    ],
    ids=[
        "free",
        "taken",
        "busy",
        "answer lost",
        "answer lost, and the upload",
        "upload lost",
        "late error",
    ],
)
def test_an_upload_in_parts_creates_the_object_or_finds_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[bytes],
    created: bool,
    requests: list[str],
) -> None:
    """After a conflict S3 wants a new upload. An upload that is gone may have become the object."""
    monkeypatch.setattr(s3, "_PART", 4)

    with serving(parts_by(in_turn(*answers))) as host:
        assert s3_store(tmp_path, host).put_new(KEY, b"content", PNG) is created

    assert steps(host) == requests
    ends = [
        request
        for request in host.requests
        if request.method == "POST" and "uploadId" in request.target
    ]
    assert all(request.headers["if-none-match"] == "*" for request in ends)


@pytest.mark.parametrize(
    ("answer", "requests"),
    [
        (refusal(403, "AccessDenied"), ["POST uploads", "PUT 1", "DELETE"]),
        (b"", ["POST uploads", *["PUT 1"] * 8]),
    ],
    ids=["refused", "dropped"],
)
def test_a_failed_upload_is_aborted_if_s3_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, requests: list[str]
) -> None:
    monkeypatch.setattr(s3, "_PART", 4)

    with (
        serving(parts_by(lambda _: TAKEN, part=answer)) as host,
        pytest.raises(StoreFailed, match="cannot be stored"),
    ):
        s3_store(tmp_path, host).put_new(KEY, b"content", PNG)

    assert steps(host) == requests


# --- reads


@pytest.mark.parametrize(
    "answer",
    [
        refusal(403, "AccessDenied"),
        refusal(404, "NoSuchBucket"),
        reply(b"not found", status=404),
        reply(b"half a con", length=20),
        reply(b"<html>Welcome</html>"),
        reply(b"Content", x_amz_checksum_crc32=crc(b"content")),
        reply(b"Content", x_amz_checksum_crc32=crc_of_parts(b"cont", b"ent")),
    ],
    ids=[
        "no right",
        "no bucket",
        "no S3",
        "half an object",
        "a page",
        "another byte",
        "another byte in parts",
    ],
)
def test_any_other_answer_fails_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes
) -> None:
    monkeypatch.setattr(s3, "_PART", 4)

    with (
        serving(answer) as host,
        pytest.raises(StoreFailed, match=f"{KEY} cannot be read from bucket bucket"),
    ):
        s3_store(tmp_path, host).get(KEY)


@pytest.mark.parametrize(
    ("bad", "checksum"),
    [
        (reply(b"cont", length=7), ""),
        (reply(b"Content"), ""),
        (b"", ""),
        (reply(b"Content", x_amz_checksum_crc32=crc(b"content")), crc(b"content")),
        (
            reply(b"Content", x_amz_checksum_crc32=crc_of_parts(b"cont", b"ent")),
            crc_of_parts(b"cont", b"ent"),
        ),
        (reply(b"cont", length=7), crc_of_parts(b"co", b"nte", b"nt")),
    ],
    ids=[
        "half an object",
        "a page",
        "dropped",
        "another byte",
        "another byte in parts",
        "another's parts",
    ],
)
def test_a_damaged_read_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: bytes, checksum: str
) -> None:
    """Objects that others uploaded in parts of another size cannot be checked."""
    monkeypatch.setattr(s3, "_PART", 4)
    good = reply(b"content", ETag="1")
    if checksum:
        good = reply(b"content", ETag="1", x_amz_checksum_crc32=checksum)

    with serving(in_turn(bad, good)) as host:
        assert s3_store(tmp_path, host).get(KEY) == b"content"


def test_a_damaged_tls_record_fails_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """urllib3 raises it within a body, and botocore does not wrap it."""
    reads: list[None] = []

    def read(*_: object) -> bytes:
        reads.append(None)
        raise SSLError("bad record mac")

    monkeypatch.setattr("botocore.response.StreamingBody.read", read)

    with serving(reply(b"content")) as host, pytest.raises(StoreFailed, match="bad record mac"):
        s3_store(tmp_path, host).get(KEY)
    assert len(reads) == 4


def test_an_unknown_key_has_no_object(tmp_path: Path) -> None:
    with serving(refusal(404, "NoSuchKey")) as host:
        assert s3_store(tmp_path, host).get(KEY) is None


Act = Callable[[S3Store], object]


@pytest.mark.parametrize(
    ("act", "failed"),
    [
        (lambda store: store.put_new(KEY, b"content", PNG), "stored in"),
        (lambda store: store.get(KEY), "read from"),
        (lambda store: store.delete(KEY), "deleted from"),
    ],
    ids=["put", "get", "delete"],
)
def test_a_server_that_is_away_fails_the_store(tmp_path: Path, act: Act, failed: str) -> None:
    with serving(reply()) as host:
        store = s3_store(tmp_path, host)

    with pytest.raises(
        StoreFailed, match=f"{KEY} cannot be {failed} bucket bucket: Could not connect"
    ) as raised:
        act(store)
    assert raised.value.retryable
