"""What S3 is asked, and answers that it gives rarely; tests/integration and tests/faults have a real server."""

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
PICTURE: Final = "image/png"


@pytest.fixture(autouse=True)
def _s3_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What boto3 needs to sign a request, and nothing of this machine's own AWS; nobody waits."""
    variables = {
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }
    sign_as(monkeypatch, variables)


def s3_store(folder: Path, *hosts: Host, **variables: str) -> S3Store:
    """The store in `bucket`, of the host if there is one."""
    endpoint = {"ZLORA_S3_ENDPOINT": hosts[0].url} if hosts else {}
    store = open_store(settings(folder, **{"ZLORA_STORE": "s3://bucket"} | endpoint | variables))
    assert isinstance(store, S3Store)
    return store


def refusal(status: int, code: str) -> bytes:
    """S3's answer to a request that it does not grant."""
    return reply(
        f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode(), status=status
    )


def in_turn(*answers: bytes) -> Answer:
    """Each answer once; none is a dropped connection."""
    rest = iter(answers)
    return lambda _request: next(rest)


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
def test_a_url_is_signed_for_the_host_that_its_users_reach_and_nobody_is_asked(
    tmp_path: Path, variables: dict[str, str], origin: str
) -> None:
    with watched_connections() as connections:
        url = s3_store(tmp_path, **variables).url(KEY, 77)

    told = parse_qs(urlsplit(url).query)
    assert url.startswith(origin)
    assert told["X-Amz-Expires"] == ["77"]
    assert told["X-Amz-SignedHeaders"] == ["host"]  # a browser adds no others
    assert connections == []


def test_without_credentials_nothing_is_signed_or_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)

    with serving(reply()) as host:
        store = s3_store(tmp_path, host)
        for act in (
            lambda: store.url(KEY, 60),
            lambda: store.get(KEY),
            lambda: store.put_new(KEY, b"", PICTURE),
        ):
            with pytest.raises(StoreFailed, match="Unable to locate credentials"):
                act()

    assert host.asked == []


@pytest.mark.parametrize(
    ("told", "said"),
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
def test_put_arguments_that_s3_does_not_know_or_the_store_sets_are_refused(
    tmp_path: Path, told: str, said: str
) -> None:
    """At the start of the worker, not with the first picture. Of a customer's key the store could read nothing back."""
    with pytest.raises(InvalidSetting, match=said) as raised:
        s3_store(tmp_path, ZLORA_S3_PUT=told)

    assert raised.value.details == {"name": "ZLORA_S3_PUT"}


def test_a_profile_that_is_not_there_is_an_invalid_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_PROFILE", "absent")

    with pytest.raises(InvalidSetting, match="absent"):
        s3_store(tmp_path)


@pytest.mark.parametrize("part", [100, 4], ids=["in one piece", "in parts"])
def test_an_object_is_encrypted_as_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(s3, "_PART", part)
    told = '{"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "mine"}'

    with serving(parts_by(lambda _: reply(COMPLETE))) as host:
        assert s3_store(tmp_path, host, ZLORA_S3_PUT=told).put_new(KEY, b"picture", PICTURE)

    first = host.requests[0].headers
    assert (first["x-amz-server-side-encryption"], first["content-type"]) == ("aws:kms", PICTURE)
    assert first["x-amz-server-side-encryption-aws-kms-key-id"] == "mine"


# --- whole puts


@pytest.mark.parametrize(
    ("answers", "created"),
    [
        ([reply()], True),
        ([TAKEN], False),
        ([BUSY, BUSY, reply()], True),
        ([BUSY, TAKEN], False),
        ([b"", TAKEN], False),
        ([b"", reply()], True),
        ([CHANGED, reply()], True),
        ([refusal(500, "InternalError"), refusal(503, "Unavailable"), reply()], True),
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
def test_a_write_is_conditional_and_is_tried_again(
    tmp_path: Path, answers: list[bytes], created: bool
) -> None:
    """Where the answer is lost, the second try may meet what the first has stored: it is there, and stays."""
    with serving(in_turn(*answers)) as host:
        assert s3_store(tmp_path, host).put_new(KEY, b"picture", PICTURE) is created

    assert host.asked == [f"PUT /bucket/{KEY}"] * len(answers)
    assert all(request.headers["if-none-match"] == "*" for request in host.requests)
    assert all(
        request.headers["x-amz-checksum-crc32"] == crc(b"picture") for request in host.requests
    )


def test_a_server_that_is_busy_is_asked_more_slowly(tmp_path: Path) -> None:
    """boto3 has a mode for it: the rate goes down where a server throttles, and up again."""
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
def test_an_answer_that_stays_so_is_a_failed_store_after_some_tries(
    tmp_path: Path, answer: bytes, tries: int
) -> None:
    with (
        serving(answer) as host,
        pytest.raises(StoreFailed, match=f"{KEY} cannot be stored in bucket") as raised,
    ):
        s3_store(tmp_path, host).put_new(KEY, b"picture", PICTURE)

    assert raised.value.retryable
    assert len(host.requests) == tries


# --- puts in parts

CREATE: Final = (
    b"<InitiateMultipartUploadResult><UploadId>one</UploadId></InitiateMultipartUploadResult>"
)
COMPLETE: Final = (
    b"<CompleteMultipartUploadResult><ETag>whole</ETag></CompleteMultipartUploadResult>"
)
GONE: Final = refusal(404, "NoSuchUpload")
WHOLE: Final = ("POST uploads", "PUT 1", "PUT 2", "POST")  # what an upload of two parts asks


def parts_by(complete: Answer, *, part: bytes = reply(ETag="part")) -> Answer:
    """A server of uploads that answers a complete one so."""

    def answer(request: Request) -> bytes | Iterable[bytes]:
        if request.method == "POST":
            return reply(CREATE) if request.target.endswith("?uploads") else complete(request)
        return reply(status=204, length=None) if request.method == "DELETE" else part

    return answer


def steps(host: Host) -> list[str]:
    """Each request's method, and the number of its part."""
    found = []
    for request in host.requests:
        query = urlsplit(request.target).query
        number = re.search(r"partNumber=(\d)", query)
        found.append(
            f"{request.method} {number[1] if number else 'uploads' if query == 'uploads' else ''}".strip()
        )
    return found


@pytest.mark.parametrize(
    ("answers", "created", "asked"),
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
def test_an_upload_in_parts_ends_as_the_object_or_meets_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[bytes],
    created: bool,
    asked: list[str],
) -> None:
    """S3 wants a conflict to begin anew. An upload that is gone may have become the object, and so meets it."""
    monkeypatch.setattr(s3, "_PART", 4)

    with serving(parts_by(in_turn(*answers))) as host:
        assert s3_store(tmp_path, host).put_new(KEY, b"picture", PICTURE) is created

    assert steps(host) == asked
    ends = [
        request
        for request in host.requests
        if request.method == "POST" and "uploadId" in request.target
    ]
    assert all(request.headers["if-none-match"] == "*" for request in ends)


@pytest.mark.parametrize(
    ("answer", "asked"),
    [
        (refusal(403, "AccessDenied"), ["POST uploads", "PUT 1", "DELETE"]),
        (b"", ["POST uploads", *["PUT 1"] * 8]),
    ],
    ids=["refused", "dropped"],
)
def test_an_upload_that_cannot_go_on_is_a_failed_store_and_is_given_up_where_s3_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes, asked: list[str]
) -> None:
    monkeypatch.setattr(s3, "_PART", 4)

    with (
        serving(parts_by(lambda _: TAKEN, part=answer)) as host,
        pytest.raises(StoreFailed, match="cannot be stored"),
    ):
        s3_store(tmp_path, host).put_new(KEY, b"picture", PICTURE)

    assert steps(host) == asked


# --- reads


def crc(data: bytes) -> str:
    """S3's spelling of a CRC32."""
    return base64.b64encode(zlib.crc32(data).to_bytes(4, "big")).decode()


def crc_of_parts(*parts: bytes) -> str:
    """S3's spelling of that of an object in parts."""
    sums = b"".join(zlib.crc32(part).to_bytes(4, "big") for part in parts)
    return f"{crc(sums)}-{len(parts)}"


@pytest.mark.parametrize(
    "answer",
    [
        refusal(403, "AccessDenied"),
        refusal(404, "NoSuchBucket"),
        reply(b"not found", status=404),
        reply(b"half a pic", length=20),
        reply(b"Picture", x_amz_checksum_crc32=crc(b"picture")),
        reply(b"Picture", x_amz_checksum_crc32=crc_of_parts(b"pict", b"ure")),
    ],
    ids=[
        "no right",
        "no bucket",
        "no S3",
        "half an object",
        "another byte",
        "another byte in parts",
    ],
)
def test_no_other_answer_of_s3_is_taken_for_nothing_or_for_the_object(
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
        (reply(b"pict", length=7), ""),
        (b"", ""),
        (reply(b"Picture", x_amz_checksum_crc32=crc(b"picture")), crc(b"picture")),
        (
            reply(b"Picture", x_amz_checksum_crc32=crc_of_parts(b"pict", b"ure")),
            crc_of_parts(b"pict", b"ure"),
        ),
        (reply(b"pict", length=7), crc_of_parts(b"pi", b"ctu", b"re")),
    ],
    ids=["half an object", "dropped", "another byte", "another byte in parts", "another's parts"],
)
def test_a_read_that_comes_to_harm_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: bytes, checksum: str
) -> None:
    """What others have uploaded in parts of their own size has no checksum that tells."""
    monkeypatch.setattr(s3, "_PART", 4)
    good = reply(b"picture", x_amz_checksum_crc32=checksum) if checksum else reply(b"picture")

    with serving(in_turn(bad, good)) as host:
        assert s3_store(tmp_path, host).get(KEY) == b"picture"


def test_a_record_of_tls_that_comes_to_harm_is_a_failed_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """urllib3 raises it in the middle of a body, and botocore lets it through."""
    reads: list[None] = []

    def read(*_: object) -> bytes:
        reads.append(None)
        raise SSLError("bad record mac")

    monkeypatch.setattr("botocore.response.StreamingBody.read", read)

    with serving(reply(b"picture")) as host, pytest.raises(StoreFailed, match="bad record mac"):
        s3_store(tmp_path, host).get(KEY)
    assert len(reads) == 4


def test_a_key_that_s3_does_not_know_has_nothing(tmp_path: Path) -> None:
    with serving(refusal(404, "NoSuchKey")) as host:
        assert s3_store(tmp_path, host).get(KEY) is None


Act = Callable[[S3Store], object]


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda store: store.put_new(KEY, b"picture", PICTURE), "stored in"),
        (lambda store: store.get(KEY), "read from"),
        (lambda store: store.delete(KEY), "deleted from"),
    ],
    ids=["put", "get", "delete"],
)
def test_a_server_that_is_away_is_a_failed_store(tmp_path: Path, act: Act, said: str) -> None:
    with serving(reply()) as host:
        store = s3_store(tmp_path, host)

    with pytest.raises(
        StoreFailed, match=f"{KEY} cannot be {said} bucket bucket: Could not connect"
    ) as raised:
        act(store)
    assert raised.value.retryable
