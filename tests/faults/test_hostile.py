"""Hostile addresses and servers against a real worker: each gets its typed error and harms nothing.

The variants of each kind are in the unit tests of `zlora.http`, `zlora.lora` and `fetch`. The
worker's names are made up and no connection leaves the machine; see `engines/sitecustomize.py`.
"""

import gzip
import itertools
import json
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Final

import pytest
from faults.test_messages import stored_meta, watched_events
from support.figures import Tally
from support.processes import PATIENCE
from support.scene import CLEAN, Scene
from support.servers import (
    SECRETS,
    Answer,
    Authority,
    Host,
    Request,
    digest,
    lora_bytes,
    reply,
    serving,
    tensor_file,
)
from support.valkey import Valkey
from zlora import JobHandle, JobState
from zlora.errors import ZloraError

pytestmark = pytest.mark.timeout(300)  # one fixture runs all cases

LIMIT: Final = 1_000_000  # bytes of a LoRA
GOOD: Final = lora_bytes(1)
WELL: Final = reply(GOOD)
LARGE: Final = lora_bytes(2, size=900_000)
QUERY: Final = "x.safetensors?X-Amz-Signature=s3cret&sig=s3cret#fr4g"
METADATA: Final = "latest/meta-data/iam?sig=s3cret"
NAMES: Final = {
    "right.test": ["127.0.0.1"],
    "private.test": ["10.0.0.1"],
    "metadata.test": ["169.254.169.254"],
    "mapped.test": ["::ffff:127.0.0.1"],
    "loopback.test": ["127.0.0.1"],
    "rebinding.test": ["9.9.9.9", "127.0.0.1"],
    "moving.test": ["149.112.112.112", "127.0.0.1"],  # the same, as the target of a redirect
}
REBINDING: Final = {(NAMES[name][0], 443) for name in ("rebinding.test", "moving.test")}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A LoRA's address and its server: `{host}` is that server, `{inside}` is not allowed."""

    code: str
    url: str = "{host}/" + QUERY
    answer: Answer | bytes = WELL
    fields: dict[str, str] = field(default_factory=dict)
    tls: str = ""  # the name in the server's certificate


def endless(start: bytes, piece: bytes, *, seconds: float = 0.0) -> Answer:
    def answer(_: Request) -> Iterator[bytes]:
        yield start
        for _index in itertools.count():
            time.sleep(seconds)
            yield piece

    return answer


def silent(start: bytes) -> Answer:
    def answer(_: Request) -> Iterator[bytes]:
        yield start
        Event().wait(3)

    return answer


def chunk(data: bytes, extension: bytes = b"") -> bytes:
    return b"%x%b\r\n%b\r\n" % (len(data), extension, data)


def in_chunks(start: bytes = b"") -> bytes:
    return reply(start, length=None, Transfer_Encoding="chunked")


def zipped(data: bytes, *, length: int | None = -1) -> bytes:
    return reply(data, length=length, Content_Encoding="gzip")


def bomb(start: bytes, piece: bytes) -> Answer:
    def answer(_: Request) -> bytes:
        packer = zlib.compressobj(1, wbits=31)  # fast: the client waits
        pieces = [packer.compress(start), *(packer.compress(piece * 2**20) for _ in range(64))]
        return zipped(b"".join(pieces) + packer.flush())

    return answer


def refused(*urls: str) -> dict[str, Case]:
    return {
        f"address {url.partition('?')[0]}": Case(code="lora_not_allowed", url=url) for url in urls
    }


def redirected(*targets: str) -> dict[str, Case]:
    return {
        f"redirect to {target.partition('?')[0]}": Case(
            code="lora_not_allowed",
            url=f"{{host}}/{QUERY}",
            answer=reply(status=302, Location=target.encode().decode("latin-1")),
        )
        for target in targets
    }


def answered(code: str, **answers: Answer | bytes) -> dict[str, Case]:
    return {
        name.replace("_", " "): Case(code=code, answer=answer) for name, answer in answers.items()
    }


PRIVATE = [
    "127.0.0.1", "10.0.0.1", "[::1]", "[fe80::1%25lo]", "169.254.169.254", "168.63.129.16",
    "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "2130706433", "0177.0.0.1", "0xa9fea9fe",
    "localhost", "127\u30020\u30020\u30021", "private.test", "metadata.test", "mapped.test",
    "loopback.test",
]  # fmt: skip

CASES: dict[str, Case] = {
    # Addresses
    **refused(*(f"https://{host}/{METADATA}" for host in PRIVATE)),
    **refused(
        f"http://{{inside}}/{QUERY}",
        f"https://huggingface.co@{{inside}}/{QUERY}",
        f"https://us3r:s3cret@8.8.8.8/{QUERY}",
        f"http://8.8.8.8/{QUERY}",
        f"https://8.8.8.8:8443/{QUERY}",
        f"https://rebinding.test/{QUERY}",
        f"ftp://us3r:s3cret@8.8.8.8/{QUERY}",
        f"file:///etc/passwd?{QUERY}",
        "file:///proc/self/environ",
        f"s3://us3r:s3cret@bucket/{QUERY}",
        f"demo://us3r:s3cret@anime-style/{QUERY}",
        f"https://8.8.8.8/x\r\nX-Injected: 1\r\n{QUERY}",
    ),
    # Redirects
    **redirected(
        f"http://{{inside}}/{QUERY}",
        f"https://us3r:s3cret@{{inside}}/{QUERY}",
        f"https://169.254.169.254/{METADATA}",
        f"https://2130706433/{METADATA}",
        f"https://metadata.test/{METADATA}",
        f"https://127%E3%80%820%E3%80%820%E3%80%821/{METADATA}",
        f"https://moving.test/{QUERY}",
        "file:///etc/passwd",
    ),
    "a circle of redirects": Case(
        code="lora_not_allowed", answer=reply(status=307, Location="/again?sig=s3cret")
    ),
    # TLS
    "a certificate of another name": Case(
        code="lora_not_allowed", url=f"https://right.test:{{port}}/{QUERY}", tls="other.test"
    ),
    # Statuses
    "status 404": Case(code="lora_not_found", answer=reply(b"s3cret", status=404)),
    "status 401": Case(code="lora_forbidden", answer=reply(b"s3cret", status=401)),
    "status 206": Case(code="lora_unreachable", answer=reply(b"s3cret", status=206)),
    "status 503": Case(code="lora_unreachable", answer=reply(b"s3cret", status=503)),
    "a long Retry-After": Case(
        code="lora_unreachable", answer=reply(status=429, Retry_After="3000")
    ),
    "a status that a library warns of": Case(
        code="lora_forbidden", answer=b"HTTP/1.1 403 No\r\nno header\r\n\r\n"
    ),
    # Answers that do not end, or end too early
    **answered(
        "lora_unreachable",
        a_dripping_body=endless(reply(LARGE[:1000], length=len(LARGE)), b"x", seconds=0.05),
        dripping_headers=endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", seconds=0.1),
        endless_trailers=endless(in_chunks(chunk(GOOD) + b"0\r\n"), b"X: y\r\n" * 100),
        silence=silent(b""),
        a_truncated_body=reply(LARGE[:-1], length=len(LARGE)),
        truncated_gzip=zipped(gzip.compress(LARGE)[:-9]),
        another_encoding=reply(GOOD, Content_Encoding="br"),
        no_http=b"SSH-2.0-OpenSSH_9.9\r\n",
    ),
    # Bodies
    **answered(
        "not_safetensors",
        a_page=reply(b"<!DOCTYPE html><title>Log in</title>" + b" " * 100),
        a_pickle=reply(b"PK\x03\x04" + bytes(10_000)),
        a_large_header=endless(
            reply((100 * 2**20).to_bytes(8, "little") + b'{"a":' + b" " * 100, length=None),
            b" " * 2**16,
        ),
        a_header_that_lies=reply(
            tensor_file({"a": {"dtype": "F16", "shape": [9], "data_offsets": [0, 4]}}, bytes(4))
        ),
        a_deep_header=reply(tensor_file(b'{"a":' * 50_000)),
        no_bytes=reply(b""),
        endless_chunks=endless(in_chunks(chunk(GOOD)), chunk(b"x" * 2**16)),
        a_gzip_bomb_behind_a_file=bomb(GOOD, b"\0"),
    ),
    **answered(
        "lora_too_large",
        a_large_length=endless(reply(GOOD, length=2**40), bytes(2**16)),
        a_large_file=endless(reply(lora_bytes(size=2 * LIMIT)[:5000], length=None), bytes(2**16)),
        a_gzip_bomb_in_the_header=bomb((15 * 2**20).to_bytes(8, "little") + b"{", b" "),
    ),
    # Checksums and references
    "another checksum": Case(code="lora_corrupt", fields={"sha256": "0" * 64}),
    "another checksum of a hub": Case(code="lora_corrupt", fields={"cozy_ref": "loras/other"}),
    "a checksum that is a path": Case(code="lora_corrupt", fields={"cozy_ref": "loras/path"}),
    "a reference that climbs": Case(
        code="lora_not_found", fields={"cozy_ref": "../../admin?sig=s3cret"}
    ),
}


def hub(request: Request) -> bytes:
    named = "../../../../x" if request.target.endswith("path") else "0" * 64
    return reply(GOOD if request.method == "GET" else b"", length=len(GOOD), X_Cozy_SHA256=named)


@dataclass(kw_only=True)
class Outcome:
    """Results of all cases with one worker."""

    codes: dict[str, str]
    texts: dict[str, str]  # all places that might contain a secret
    good: Any
    pids: tuple[int, int]  # of the child process, before and after
    inside: int
    connections: set[tuple[str, int]]
    allowed: set[tuple[str, int]]
    left: list[Path]
    files: list[str]  # of the cache, with their sources
    sources: list[str]
    source: str  # of the good LoRA


@pytest.fixture(scope="module")
def outcome(
    tmp_path_factory: pytest.TempPathFactory, valkey: Valkey, tally: Tally
) -> Iterator[Outcome]:
    """Run all cases in the queue of one worker, then a job with a good LoRA."""
    folder = tmp_path_factory.mktemp("hostile")
    network = folder / "network"
    network.mkdir()
    (network / "names.json").write_text(json.dumps(NAMES))
    authority = Authority(network)
    scene = Scene(
        folder / "scene", tally, broker_url=valkey.url, queue="hostile", FAKE_NETWORK=str(network)
    )
    with ExitStack() as stack:
        inside, files, own = (
            stack.enter_context(serving(answer)) for answer in (reply(GOOD), reply(GOOD), hub)
        )
        hosts = {name: _host(case, stack, authority, inside) for name, case in CASES.items()}
        ports = [host.port for host in (*hosts.values(), files)]
        variables = {
            "ZLORA_ALLOW_HOSTS": ",".join(
                f"{name}:{port}" for port in ports for name in ("127.0.0.1", "right.test")
            ),
            "ZLORA_CA_BUNDLE": str(authority.bundle),
            "ZLORA_LORA_DEADLINE": "1",
            "ZLORA_LORA_MIN_RATE": "1000",
            "ZLORA_LORA_MAX_BYTES": str(LIMIT),
            "ZLORA_LOOK_AHEAD": "0",
            "COZY_HUB_URL": own.url,
            "COZY_HUB_TOKEN": "t0ken",
            "HF_TOKEN": "t0ken",
            "CIVITAI_TOKEN": "t0ken",
        }
        running = stack.enter_context(scene.worker(**variables))
        events = stack.enter_context(watched_events(scene))
        child = scene.child(running)
        handles = {name: _submit(scene, CASES[name], hosts[name], inside) for name in CASES}
        codes, errors = _ends(scene, handles)
        good = scene.submit(fields={"loras": [{"file": {"url": f"{files.url}/{QUERY}"}}]})
        result = good.result(timeout=PATIENCE)
        texts = {
            "errors": " ".join(errors),
            "results": " ".join(
                [str(result), *(stored_meta(scene, handle) for handle in (*handles.values(), good))]
            ),
            "events": json.dumps(events),
            "log": running.log.read_text(),
            "journal": scene.journal.read_text(),
            "cache": " ".join(
                path.read_text("latin-1")
                for path in (scene.folder / "loras").rglob("*.json")
                if path.is_file()
            ),
        }
        lines = (network / "connections").read_text().split("\n")[:-1]
        tried = {(host, int(port)) for host, port in (line.rsplit(" ", 1) for line in lines)}
        cache = scene.folder / "loras"
        yield Outcome(
            codes=codes,
            texts=texts,
            good=result,
            pids=(child, scene.child(running)),
            inside=inside.connections,
            connections=tried,
            allowed={("127.0.0.1", port) for port in (*ports, own.port, valkey.port)},
            left=list((cache / "drafts").iterdir()),
            files=[path.name for path in (cache / "files").iterdir()],
            sources=[
                json.loads(path.read_text())["source"] for path in (cache / "index").iterdir()
            ],
            source=f"{files.url}/x.safetensors",
        )
        assert scene.audit() == CLEAN
        scene.close()


def _host(case: Case, stack: ExitStack, authority: Authority, inside: Host) -> Host:
    answer = case.answer
    if isinstance(answer, bytes):
        answer = answer.replace(b"{inside}", inside.name.encode())
    return stack.enter_context(
        serving(answer, tls=authority.server(case.tls) if case.tls else None)
    )


def _submit(scene: Scene, case: Case, host: Host, inside: Host) -> JobHandle:
    scene.tally.fault()
    url = case.url.format(host=host.url, port=host.port, inside=inside.name)
    file = case.fields if "cozy_ref" in case.fields else {"url": url, **case.fields}
    return scene.submit(fields={"loras": [{"file": file}]})


def _ends(scene: Scene, handles: dict[str, JobHandle]) -> tuple[dict[str, str], list[str]]:
    """Return the code of each job's end, or of its first retry, and the texts of the errors."""
    codes: dict[str, str] = {}
    said: list[str] = []
    end = time.monotonic() + PATIENCE
    while len(codes) < len(handles) and time.monotonic() < end:
        for name, handle in handles.items():
            if name in codes:
                continue
            status = handle.status()
            if status.state is JobState.RETRY:
                codes[name] = str(status.code)
                said += [str(status), stored_meta(scene, handle)]
                handle.cancel()
            elif status.state in (JobState.FAILURE, JobState.SUCCESS):
                codes[name] = _end(handle, said)
        time.sleep(0.05)
    return codes, said


def _end(handle: JobHandle, said: list[str]) -> str:
    try:
        handle.result(timeout=5)
    except ZloraError as error:
        said.append(f"{error!r} {error.details}")
        return error.code
    return "drawn"


def test_each_hostile_address_or_server_gets_its_typed_error(outcome: Outcome) -> None:
    assert outcome.codes == {name: case.code for name, case in CASES.items()}


def test_the_same_child_process_draws_the_next_job(outcome: Outcome) -> None:
    assert outcome.good.base_intact
    assert outcome.good.loras[0].source.endswith("/x.safetensors")
    assert outcome.pids[0] == outcome.pids[1]


def test_no_refused_address_gets_a_connection(outcome: Outcome) -> None:
    """A name that resolves differently the second time is tried at its public address only."""
    assert outcome.inside == 0
    assert outcome.connections - outcome.allowed == REBINDING


def test_no_error_event_log_or_file_contains_a_secret(outcome: Outcome) -> None:
    assert {
        place: [secret for secret in SECRETS if secret in text]
        for place, text in outcome.texts.items()
    } == {place: [] for place in outcome.texts}
    assert all(outcome.texts.values())


def test_the_cache_keeps_nothing_of_a_refused_body(outcome: Outcome) -> None:
    """It has the good file and its source only; some refused sources sent the same bytes."""
    assert outcome.left == []
    assert outcome.files == [f"{digest(GOOD)}.safetensors"]
    assert outcome.sources == [outcome.source]
