"""Loopback servers with any answer, a watch on connections, and LoRA files to serve."""

import hashlib
import io
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, Final

import hypothesis
import pytest
from zlora.errors import LoraError
from zlora.schema import Asset
from zlora_worker.fetch.cache import Cache, CachedFile
from zlora_worker.fetch.fetcher import Fetcher
from zlora_worker.fetch.transfer import Fetched
from zlora_worker.settings import Settings

_PATIENCE: Final = 30.0  # seconds without any byte until a connection is closed
_TLS_HANDSHAKE: Final = b"\x16"  # first byte of a TLS record of that kind (RFC 8446, 5.1)

# For hypothesis: a busy machine is no failure.
untimed: Final = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A client's request; the names of headers are in lower case."""

    method: str
    target: str
    headers: Mapping[str, str]


Answer = Callable[
    [Request], bytes | Iterable[bytes]
]  # the bytes of a whole answer, or of its pieces


def reply(
    body: bytes = b"", *, status: int = 200, length: int | None = -1, **headers: str
) -> bytes:
    """Return an HTTP answer. `length` None omits Content-Length; `X_Y` is the header `X-Y`."""
    lines = [f"HTTP/1.1 {status} As Told", "Connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if length is not None:
        lines.append(f"Content-Length: {len(body) if length < 0 else length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass
class Host:
    """A server on a loopback port, its requests, and the bytes that clients took."""

    port: int
    answer: Answer
    requests: list[Request] = field(default_factory=list)
    connections: int = 0
    sent: int = 0
    tls: ssl.SSLContext | None = None

    @property
    def name(self) -> str:
        """`host:port`."""
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{self.name}"

    @property
    def asked(self) -> list[str]:
        """Requests so far, each as method and target."""
        return [f"{request.method} {request.target}" for request in self.requests]

    def serve(self, listener: socket.socket) -> None:
        """Answer one connection after the other until the listener is shut down."""
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                connection.settimeout(_PATIENCE)
                self._greet(connection)

    def _greet(self, connection: socket.socket) -> None:
        try:
            if self.tls:
                with self.tls.wrap_socket(connection, server_side=True) as secured:
                    self._talk(secured)
            elif connection.recv(1, socket.MSG_PEEK) == _TLS_HANDSHAKE:
                connection.sendall(reply(status=400))
            else:
                self._talk(connection)
        except OSError:  # the client has closed the connection, or rejects the certificate
            return

    def _talk(self, connection: socket.socket) -> None:
        with connection.makefile("rb") as lines:
            if not (first := lines.readline().decode("latin-1").split()):
                return
            pairs = (
                line.decode("latin-1").partition(":") for line in iter(lines.readline, b"\r\n")
            )
            headers = {name.lower(): value.strip() for name, _, value in pairs}
        request = Request(method=first[0], target=first[1], headers=headers)
        self.requests.append(request)
        answer = self.answer(request)
        for piece in [answer] if isinstance(answer, bytes) else answer:
            connection.sendall(piece)
            self.sent += len(piece)


@contextmanager
def serving(answer: Answer | bytes, *, tls: ssl.SSLContext | None = None) -> Iterator[Host]:
    """Run a server on a free loopback port inside the block, with TLS if `tls` is given."""
    fixed = answer if isinstance(answer, bytes) else b""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host = Host(
            listener.getsockname()[1], (lambda _: fixed) if isinstance(answer, bytes) else answer
        )
        host.tls = tls
        thread = Thread(target=host.serve, args=(listener,))
        thread.start()
        try:
            yield host
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(_PATIENCE)


class Authority:
    """A certificate authority, made by `openssl`, that is trusted only by its `bundle`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.bundle = folder / "ca.pem"
        self._make(self.bundle, "/CN=An authority of tests", "-addext", "keyUsage=keyCertSign")

    def server(self, name: str) -> ssl.SSLContext:
        """Return the TLS context of a server with a certificate for `name`."""
        certificate = self.certificate(name)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, certificate.with_suffix(".key"))
        return context

    def certificate(self, name: str) -> Path:
        """Return the certificate for `name`; its key is beside it, with the suffix `.key`."""
        certificate = self._folder / f"{name}.pem"
        if not certificate.exists():
            signer = ["-CA", str(self.bundle), "-CAkey", str(self.bundle.with_suffix(".key"))]
            facts = [
                "-addext",
                f"subjectAltName=DNS:{name}",
                "-addext",
                "basicConstraints=critical,CA:FALSE",
            ]
            self._make(certificate, f"/CN={name}", *signer, *facts)
        return certificate

    def _make(self, certificate: Path, subject: str, *options: str) -> None:
        kind = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc", "-days", "2"]
        files = ["-keyout", str(certificate.with_suffix(".key")), "-out", str(certificate)]
        command = ["openssl", "req", "-x509", *kind, "-subj", subject, *files, *options]
        subprocess.run(command, check=True, capture_output=True)


_watches: list[
    tuple[list[str], set[int]]
] = []  # what was seen, and the threads that were there before
_hooks: list[Callable[[str, tuple[Any, ...]], None]] = []


def _on_audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and _watches:
        address, thread = str(arguments[1]), threading.get_ident()
        for seen, earlier in _watches:
            if thread not in earlier:
                seen.append(address)
        if not address.startswith(("('127.", "('::1", "/")):
            raise ConnectionRefusedError(f"a test must not connect to {address}")


@contextmanager
def watched_connections() -> Iterator[list[str]]:
    """Record the address of every connection that the block attempts; none leaves the machine.

    An audit hook (PEP 578) sees the connections of this thread and of threads that begin in the
    block; threads of other tests are left out.
    """
    if not _hooks:
        _hooks.append(_on_audit)
        sys.addaudithook(_on_audit)  # a hook cannot be removed
    seen: list[str] = []
    watch = (
        seen,
        {thread.ident or 0 for thread in threading.enumerate()} - {threading.get_ident()},
    )
    _watches.append(watch)
    try:
        yield seen
    finally:
        _watches.remove(watch)


def open_files() -> int:
    """Return the number of open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def settings(folder: Path, **variables: str) -> Settings:
    """Return settings with a data folder and `variables`, without this process's environment."""
    return Settings.from_env({"ZLORA_HOME": str(folder), **variables})


@contextmanager
def fetching(folder: Path, *hosts: Host, **variables: str) -> Iterator[Fetcher]:
    """Open a fetcher that may connect to `hosts`."""
    allowed = ",".join(host.name for host in hosts)
    yield Fetcher(settings(folder, **{"ZLORA_ALLOW_HOSTS": allowed} | variables))


SECRETS: Final = (
    "s3cret",
    "us3r",
    "t0ken",
    "fr4g",
)  # in addresses and settings of tests; no message may show them


def downloaded(
    fetcher: Fetcher, address: str, known: Fetched | None = None
) -> tuple[bytes, Fetched]:
    """Return the downloaded bytes and what `fetch` returns."""
    sink = io.BytesIO()
    fetched = fetcher.fetch(address, sink, known=known)
    return sink.getvalue(), fetched


def failure(fetcher: Fetcher, address: str, **options: Any) -> LoraError:
    """Return the error of a fetch, which must not show a secret of its address."""
    with pytest.raises(LoraError) as raised:
        fetcher.fetch(address, io.BytesIO(), **options)
    said = f"{raised.value} {raised.value.details} {raised.value!r}"
    assert not [secret for secret in SECRETS if secret in said]
    return raised.value


def failure_of(folder: Path, answer: Answer | bytes, **variables: str) -> LoraError:
    """Return the error of a fetch from a host with this answer."""
    with serving(answer) as host, fetching(folder, host, **variables) as fetcher:
        return failure(fetcher, f"{host.url}/x?sig=s3cret#fr4g")


def tensor_file(header: object, data: bytes = b"") -> bytes:
    """Return a safetensors file with any header, valid or not; bytes are used as they are."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def lora_bytes(fill: int = 0, *, size: int = 2048, trigger: str = "") -> bytes:
    """Return a valid LoRA file with `size` bytes of tensors, all equal to `fill`.

    `trigger` is the trigger phrase in its header.
    """
    metadata = {"modelspec.trigger_phrase": trigger} if trigger else {}
    half = size // 2
    factors = {
        f"unet.to_q.lora_{letter}.weight": {
            "dtype": "F16",
            "shape": shape,
            "data_offsets": [index * half, (index + 1) * half],
        }
        for index, (letter, shape) in enumerate({"A": [4, half // 8], "B": [half // 8, 4]}.items())
    }
    return tensor_file(
        {"__metadata__": {"format": "pt", **metadata}, **factors}, bytes([fill]) * size
    )


def digest(data: bytes) -> str:
    """Return the SHA-256 checksum that names a file of these bytes."""
    return hashlib.sha256(data).hexdigest()


def with_etag(data: bytes) -> Answer:
    """Return a host of one file that answers 304 to its ETag."""
    tag = f'"{digest(data)}"'

    def answer(request: Request) -> bytes:
        return (
            reply(status=304, length=None)
            if request.headers.get("if-none-match") == tag
            else reply(data, ETag=tag)
        )

    return answer


def by_path(contents: Mapping[str, bytes]) -> Answer:
    """Return a host of files with ETags; the query is ignored if no content has that query."""

    def answer(request: Request) -> bytes:
        data = contents.get(request.target, contents.get(request.target.partition("?")[0]))
        whole = reply(status=404) if data is None else with_etag(data)(request)
        return whole if isinstance(whole, bytes) else b"".join(whole)

    return answer


@contextmanager
def caching(
    folder: Path, *hosts: Host, max_bytes: int = 10**9, free_bytes: int = 0, **variables: str
) -> Iterator[Cache]:
    """Open a cache in `folder / "loras"` that may connect to `hosts`."""
    with fetching(folder, *hosts, **variables) as fetcher:
        yield Cache(folder / "loras", max_bytes=max_bytes, free_bytes=free_bytes, fetcher=fetcher)


def got(cache: Cache, asset: Asset, **options: Any) -> CachedFile:
    """Return the file of one asset, released at once."""
    with cache.files([asset], **options) as (file,):
        return file


def told(file: CachedFile) -> tuple[str, int, str, bytes]:
    """Return checksum, size, tier and bytes of a cached file."""
    return file.sha256, file.size, file.tier, file.path.read_bytes()


def kept(folder: Path) -> dict[str, bytes]:
    """Return the files of a cache by name; no draft and no lock may be left."""
    assert [
        path for part in ("drafts", "locks") for path in (folder / "loras" / part).iterdir()
    ] == []
    return {path.name: path.read_bytes() for path in (folder / "loras/files").iterdir()}


def named(*contents: bytes) -> dict[str, bytes]:
    """Return contents under the names that a cache gives them."""
    return {f"{digest(data)}.safetensors": data for data in contents}


def sign_as(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    """Set boto3's credentials without this machine's own, and remove pauses between tries."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    files = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    for name, value in {**variables, **files, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)
    monkeypatch.setattr("zlora_worker.results.s3._PAUSES", (0, 0, 0))
