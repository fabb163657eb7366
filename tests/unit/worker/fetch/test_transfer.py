"""Bodies over real sockets: counted, decoded, hashed and checked while they arrive."""

import gc
import gzip
import io
import itertools
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
from support.servers import (
    Answer,
    Host,
    Request,
    digest,
    downloaded,
    failure,
    failure_of,
    fetching,
    lora_bytes,
    reply,
    serving,
    settings,
    tensor_file,
)
from zlora.errors import LoraError, LoraTooLarge, LoraUnreachable, NotSafetensors
from zlora.http import client
from zlora.lora.safetensors_header import MAX_HEADER
from zlora_worker.fetch import transfer
from zlora_worker.fetch.fetcher import Fetcher

BODY = lora_bytes(1)
_ENCODER = zlib.compressobj(wbits=31)
GZIP_OPEN = _ENCODER.compress(BODY) + _ENCODER.flush(zlib.Z_SYNC_FLUSH)  # all of it, and no end
MEGABYTE = 2**20
DRIPS = 25
BUFFERS = 24 * MEGABYTE  # more than two sockets hold between them


@contextmanager
def hurried(folder: Path, host: Host) -> Iterator[Fetcher]:
    """Yield a fetcher with a deadline of less than a second."""
    own = settings(folder, ZLORA_ALLOW_HOSTS=host.name)
    yield Fetcher(replace(own, lora_deadline=0.3))  # type: ignore[arg-type] # settings take whole seconds


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PAUSES", (0.0, 0.0))


def chunked(*parts: bytes, extension: bytes = b"", trailer: bytes = b"") -> bytes:
    """Return a body in chunks (RFC 9112, 7.1)."""
    return (
        b"".join(b"%x%b\r\n%b\r\n" % (len(part), extension, part) for part in parts)
        + b"0\r\n"
        + trailer
        + b"\r\n"
    )


def endless(start: bytes, piece: bytes) -> Callable[[Request], Iterator[bytes]]:
    """Return an answer that does not end until the client disconnects."""
    return lambda _: itertools.chain([start], itertools.repeat(piece))


def dripping(
    start: bytes, end: bytes = b"", *, piece: bytes = b"x"
) -> Callable[[Request], Iterator[bytes]]:
    """Return an answer that sends a little now and then, for a second."""

    def answer(_: Request) -> Iterator[bytes]:
        yield start
        for _index in range(DRIPS):
            yield piece
            time.sleep(1 / DRIPS)
        yield end

    return answer


def held(start: bytes) -> tuple[Answer, Event]:
    """Return an answer whose rest waits for an event."""
    done = Event()

    def answer(_: Request) -> Iterator[bytes]:
        yield start
        done.wait(20)

    return answer, done


# --- encodings and lengths


@pytest.mark.parametrize(
    "answer",
    [
        reply(BODY, length=None),
        reply(chunked(BODY[:7], BODY[7:]), length=None, Transfer_Encoding="chunked"),
        reply(
            chunked(
                BODY[:7], BODY[7:], extension=b";x=" + b"y" * 1000, trailer=b"Expires: never\r\n"
            ),
            length=None,
            Transfer_Encoding="chunked",
        ),
        reply(gzip.compress(BODY), Content_Encoding="gzip"),
        reply(gzip.compress(BODY), Content_Encoding="x-gzip", length=None),
        reply(
            chunked(gzip.compress(BODY)),
            Content_Encoding="GZIP",
            length=None,
            Transfer_Encoding="chunked",
        ),
        reply(BODY, Content_Encoding=""),
        reply(BODY, Content_Encoding="identity"),
    ],
    ids=[
        "of unknown length",
        "chunks",
        "odd chunks",
        "gzip",
        "x-gzip",
        "gzip in chunks",
        "no encoding",
        "identity",
    ],
)
def test_a_body_is_read_with_each_encoding_and_framing(tmp_path: Path, answer: bytes) -> None:
    with serving(answer) as host, fetching(tmp_path, host) as fetcher:
        body, fetched = downloaded(fetcher, f"{host.url}/x")

    assert body == BODY
    assert (fetched.sha256, fetched.size) == (digest(BODY), len(BODY))


@pytest.mark.parametrize(
    "encoding", ["br", "deflate", "zstd", "identity, gzip", "gzip, gzip", "\xff"]
)
def test_a_body_in_another_encoding_is_refused(tmp_path: Path, encoding: str) -> None:
    error = failure_of(tmp_path, reply(BODY, Content_Encoding=encoding))

    assert type(error) is LoraUnreachable
    assert "encodes" in error.message


@pytest.mark.parametrize("length", ["\xb2", "9" * 5000, "-1", "x", "", "+1", "0x10"])
def test_a_malformed_content_length_breaks_nothing(tmp_path: Path, length: str) -> None:
    """The result is the body or a `LoraError`."""
    with (
        serving(reply(BODY, length=None, Content_Length=length)) as host,
        fetching(tmp_path, host, ZLORA_LORA_DEADLINE="5") as fetcher,
        suppress(LoraError),
    ):
        assert downloaded(fetcher, f"{host.url}/x")[0] == BODY


# urllib3 leaves the socket of such an answer to the garbage collector.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("lengths", [f"{len(BODY)}, 12", f"{len(BODY)}\r\nContent-Length: 12"])
def test_two_content_lengths_are_unreachable(tmp_path: Path, lengths: str) -> None:
    assert (
        type(failure_of(tmp_path, reply(BODY, length=None, Content_Length=lengths)))
        is LoraUnreachable
    )
    gc.collect()


# --- broken bodies, which a retry may mend


@pytest.mark.parametrize(
    "chunks",
    [
        b"zz\r\n",
        b"5\r\nab",
        b"-5\r\nabcde\r\n",
        b"FFFFFFFFFFFFFFFFFF\r\nab",
        b"\r\n",
        b"5;" + b"x" * 70_000,
    ],
)
def test_broken_chunks_are_unreachable(tmp_path: Path, chunks: bytes) -> None:
    answer = reply(chunks, length=None, Transfer_Encoding="chunked")

    assert type(failure_of(tmp_path, answer, ZLORA_LORA_MAX_BYTES=str(2**62))) is LoraUnreachable


@pytest.mark.parametrize(
    "answer",
    [
        reply(BODY[:-1], length=len(BODY)),
        reply(length=len(BODY)),
        reply(BODY[:-1], length=None),
        reply(BODY[:100], length=None),
        reply(length=None),
        reply(b"%x\r\n%b" % (len(BODY), BODY[:-1]), length=None, Transfer_Encoding="chunked"),
        reply(gzip.compress(BODY)[:-1], length=len(gzip.compress(BODY)), Content_Encoding="gzip"),
        reply(gzip.compress(BODY)[:-1], Content_Encoding="gzip"),
        reply(BODY, Content_Encoding="gzip"),
    ],
    ids=[
        "a byte",
        "all",
        "a byte of unknown many",
        "in its header",
        "all of unknown many",
        "a chunk",
        "gzip",
        "gzip inside",
        "no gzip",
    ],
)
def test_a_body_that_breaks_off_is_tried_three_times(tmp_path: Path, answer: bytes) -> None:
    """The error is `LoraUnreachable`: the same file may arrive whole a moment later."""
    with serving(answer) as host, fetching(tmp_path, host) as fetcher:
        assert type(failure(fetcher, f"{host.url}/x?sig=s3cret")) is LoraUnreachable

    assert len(host.requests) == 3


def test_a_retry_starts_from_the_first_byte(tmp_path: Path) -> None:
    answers = iter(
        [reply(BODY[:1000], length=len(BODY)), reply(BODY[:1500], length=None), reply(BODY)]
    )
    with serving(lambda _: next(answers)) as host, fetching(tmp_path, host) as fetcher:
        body, fetched = downloaded(fetcher, f"{host.url}/x")

    assert body == BODY
    assert (fetched.sha256, fetched.size) == (digest(BODY), len(BODY))


# --- files of another kind


LARGE = 2**31  # bytes


@pytest.mark.parametrize(
    "start",
    [
        pytest.param(b"<!DOCTYPE html><html>" + b" " * 100, id="a page"),
        pytest.param(b"PK\x03\x04" + bytes(100), id="a pickle"),
        pytest.param(b"\x80\x02}q\x00." + bytes(100), id="an old pickle"),
        pytest.param(
            (100 * MEGABYTE).to_bytes(8, "little") + b"{" + b" " * 100, id="100 MB of header"
        ),
        pytest.param(bytes(100), id="zeros"),
        pytest.param(tensor_file(b"{broken" + b" " * 100), id="no JSON"),
        pytest.param(tensor_file(b"[" * 5000), id="a deep header"),
        pytest.param(BODY, id="another length"),
    ],
)
def test_a_large_file_of_the_wrong_kind_is_refused_after_its_first_bytes(
    tmp_path: Path, start: bytes
) -> None:
    """Less than one megabyte of 2 GB is read, and nothing is written."""
    sink = io.BytesIO()
    answer, done = held(reply(length=LARGE) + start + bytes(MEGABYTE // 2))
    with serving(answer) as host, fetching(tmp_path, host) as fetcher:
        with pytest.raises(NotSafetensors):
            fetcher.fetch(f"{host.url}/x", sink)
        done.set()

    assert len(host.requests) == 1
    assert sink.getvalue() == b""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "0 bytes"),
        (b"short", "5 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n" + b"x" * 80, "git-lfs"),
        (b"<html>", "6 bytes"),
        (BODY + b"x", "but its header names"),
        (
            tensor_file({"a": {"dtype": "F16", "shape": [4], "data_offsets": [0, 7]}}, bytes(7)),
            "expected position",
        ),
    ],
)
def test_another_kind_of_file_is_named(tmp_path: Path, body: bytes, said: str) -> None:
    error = failure_of(tmp_path, reply(body))

    assert type(error) is NotSafetensors
    assert said in error.message


@pytest.mark.parametrize("wrong", [-1, 1, 1000])
def test_a_content_length_that_differs_from_the_header_is_refused(
    tmp_path: Path, wrong: int
) -> None:
    data = lora_bytes(size=2**24)
    with (
        serving(reply(data, length=len(data) + wrong)) as host,
        fetching(tmp_path, host) as fetcher,
    ):
        assert type(failure(fetcher, f"{host.url}/x")) is NotSafetensors

    assert len(host.requests) == 1


# --- sizes


@pytest.mark.parametrize("length", [-1, None], ids=["announced", "not announced"])
def test_a_body_may_have_exactly_the_maximum(tmp_path: Path, length: int | None) -> None:
    with serving(reply(BODY, length=length)) as host:
        with fetching(tmp_path, host, ZLORA_LORA_MAX_BYTES=str(len(BODY))) as fetcher:
            assert downloaded(fetcher, f"{host.url}/x")[0] == BODY
        with fetching(tmp_path, host, ZLORA_LORA_MAX_BYTES=str(len(BODY) - 1)) as fetcher:
            error = failure(fetcher, f"{host.url}/x?sig=s3cret")

    assert type(error) is LoraTooLarge
    assert error.details == {"max_bytes": len(BODY) - 1}


def test_a_body_that_announces_too_many_bytes_is_refused_before_it_is_sent(tmp_path: Path) -> None:
    """Announced by the server, or by the header of the file."""
    header = BODY[: -2048 + 8]
    for start in (reply(length=1001), reply(header, length=None)):
        answer, done = held(start)
        with (
            serving(answer) as host,
            fetching(tmp_path, host, ZLORA_LORA_MAX_BYTES="1000") as fetcher,
        ):
            assert type(failure(fetcher, f"{host.url}/x")) is LoraTooLarge
            done.set()


def bomb(size: int, *, start: bytes = b"", piece: bytes = bytes(MEGABYTE)) -> bytes:
    """Return gzip that decodes to `size` bytes."""
    packer = zlib.compressobj(9, wbits=31)
    pieces = [
        packer.compress(start),
        *(packer.compress(piece) for _ in range(size // len(piece))),
        packer.flush(),
    ]
    return b"".join(pieces)


@contextmanager
def traced() -> Iterator[list[int]]:
    """Yield a list that holds the peak memory of the block in bytes after its end."""
    peak = [0]
    tracemalloc.start()
    try:
        yield peak
    finally:
        peak[0] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("make", "kind"),  # made in the test alone: it takes a while, and tests are read at each start
    [
        (lambda: bomb(64 * MEGABYTE), NotSafetensors),
        (lambda: bomb(64 * MEGABYTE, start=BODY), NotSafetensors),
        (
            lambda: bomb(
                64 * MEGABYTE,
                start=(MAX_HEADER - 8).to_bytes(8, "little") + b"{",
                piece=b" " * MEGABYTE,
            ),
            LoraTooLarge,
        ),
        (lambda: gzip.compress(bomb(64 * MEGABYTE, start=BODY)), NotSafetensors),
    ],
    ids=["of zeros", "behind a file", "in a header", "twice"],
)
def test_a_gzip_bomb_is_not_decoded_past_the_maximum(
    tmp_path: Path, make: Callable[[], bytes], kind: type[LoraError]
) -> None:
    body, sink, limit = make(), io.BytesIO(), 4 * MEGABYTE
    with (
        serving(reply(body, Content_Encoding="gzip")) as host,
        fetching(tmp_path, host, ZLORA_LORA_MAX_BYTES=str(limit)) as fetcher,
        traced() as peak,
        pytest.raises(kind),
    ):
        fetcher.fetch(f"{host.url}/x", sink)

    assert len(body) < MEGABYTE
    assert len(sink.getvalue()) <= limit
    assert peak[0] < (4 if kind is NotSafetensors else 24) * MEGABYTE


def test_a_file_of_zeros_in_gzip_is_refused_after_its_first_part(tmp_path: Path) -> None:
    """It is a file as its header says; a small one may be of zeros."""
    small, large = (
        tensor_file({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
        + bytes(size)
        for size in (MEGABYTE, 64 * MEGABYTE)
    )
    sinks = io.BytesIO(), io.BytesIO()
    answers = [reply(gzip.compress(data), Content_Encoding="gzip") for data in (small, large)]
    with (
        serving(lambda _: answers.pop(0)) as host,
        fetching(tmp_path, host) as fetcher,
    ):
        assert fetcher.fetch(f"{host.url}/x", sinks[0]).size == len(small)
        with pytest.raises(LoraUnreachable, match="more than 50 times"):
            fetcher.fetch(f"{host.url}/y", sinks[1])

    assert len(sinks[1].getvalue()) <= 17 * MEGABYTE


def test_the_maximum_counts_bytes_on_the_wire_too(tmp_path: Path) -> None:
    """Any number of encoded bytes may decode to none."""
    nothing = b"\x1f\x8b\x08\x04" + bytes(6) + b"\xff\xff"  # gzip's header with a field of 64 KiB
    with (
        serving(
            endless(reply(length=None, Content_Encoding="gzip") + nothing, gzip.compress(b"") * 50)
        ) as host,
        fetching(tmp_path, host, ZLORA_LORA_MAX_BYTES="50000") as fetcher,
    ):
        assert type(failure(fetcher, f"{host.url}/x")) is LoraTooLarge


def test_an_endless_body_is_cut(tmp_path: Path) -> None:
    sink = io.BytesIO()
    with (
        serving(endless(reply(BODY, length=None), bytes(MEGABYTE))) as host,
        fetching(tmp_path, host, ZLORA_LORA_MAX_BYTES="10000") as fetcher,
        pytest.raises((NotSafetensors, LoraTooLarge)),
    ):
        fetcher.fetch(f"{host.url}/x", sink)

    assert len(sink.getvalue()) <= len(BODY)
    assert host.sent < BUFFERS


# --- time


@pytest.mark.parametrize(
    ("start", "end", "piece"),
    [
        pytest.param(reply(BODY[:-100], length=len(BODY)), b"", b"x", id="body"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nX-Slow: ", b"\r\nContent-Length: 1\r\n\r\nx", b"x", id="headers"
        ),
        pytest.param(b"", reply(BODY), b"HTTP/1.1 100 Continue\r\n\r\n", id="continue"),
        pytest.param(
            reply(chunked(BODY)[:-2], length=None, Transfer_Encoding="chunked"),
            b"\r\n",
            b"X: y\r\n",
            id="trailers",
        ),
        pytest.param(
            reply(b"5;x=", length=None, Transfer_Encoding="chunked"),
            b"\r\nabcde\r\n0\r\n\r\n",
            b"x",
            id="extension",
        ),
        pytest.param(
            reply(gzip.compress(b"")[:10], length=None, Content_Encoding="gzip"),
            b"",
            b"\x00\x00\x00\xff\xff",  # a block of no bytes (RFC 1951, 3.2.4)
            id="gzip of nothing",
        ),
    ],
)
def test_a_dripping_answer_meets_the_deadline(
    tmp_path: Path, start: bytes, end: bytes, piece: bytes
) -> None:
    with (
        serving(dripping(start, end, piece=piece)) as host,
        hurried(tmp_path, host) as fetcher,
    ):
        assert type(failure(fetcher, f"{host.url}/x?sig=s3cret")) is LoraUnreachable

    assert host.sent < len(start) + DRIPS * len(piece)


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000),
        (reply(chunked(BODY)[:-2], length=None, Transfer_Encoding="chunked"), b"X: y\r\n" * 1000),
        (reply(length=None, Transfer_Encoding="chunked"), b"1;%b\r\n{\r\n" % (b"x" * 60_000)),
    ],
    ids=["continue", "trailers", "extensions"],
)
def test_an_endless_answer_without_a_body_meets_the_deadline(
    tmp_path: Path, start: bytes, piece: bytes
) -> None:
    with (
        serving(endless(start, piece)) as host,
        hurried(tmp_path, host) as fetcher,
    ):
        failure(fetcher, f"{host.url}/x?sig=s3cret")

    assert len(host.requests) == 1


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (reply(chunked(BODY)[:-2], length=None, Transfer_Encoding="chunked"), b"X: y\r\n"),
        (reply(gzip.compress(BODY), length=None, Content_Encoding="gzip"), bytes(4000)),
        (reply(GZIP_OPEN, length=None, Content_Encoding="gzip"), b"\x00\x00\x00\xff\xff"),
        (reply(BODY, length=None), b""),
    ],
    ids=["trailers", "after gzip", "gzip of nothing", "nothing"],
)
def test_an_answer_that_does_not_end_with_its_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: bytes, piece: bytes
) -> None:
    """Long before its deadline; the bytes after the file are not counted."""
    monkeypatch.setattr(transfer, "_END_SECONDS", 0.2)
    with (
        serving(dripping(start, piece=piece)) as host,
        fetching(tmp_path, host) as fetcher,
        suppress(LoraUnreachable),
    ):
        fetcher.fetch(f"{host.url}/x", io.BytesIO())

    assert host.sent <= len(host.requests) * (len(start) + DRIPS * len(piece))


def test_a_download_below_the_minimum_rate_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PACE_SECONDS", 0.2)
    with (
        serving(dripping(reply(BODY[:-100], length=len(BODY)))) as host,
        fetching(tmp_path, host, ZLORA_LORA_MIN_RATE="1000000") as fetcher,
    ):
        error = failure(fetcher, f"{host.url}/x?sig=s3cret")

    assert type(error) is LoraUnreachable
    assert "slower than" in error.message
    assert len(host.requests) == 1
