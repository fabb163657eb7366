"""Hostile requests: each has the right status and a problem document, and nothing leaks."""

import base64
import gzip
import json
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import httpx
import pytest
from support.http_door import SECRET_PROMPT, Door, code_of
from support.http_server import running

OTHERS: Final = "{others_job}"  # stands for the id of another tenant's job
LARGE: Final = 2**20 + 1  # bytes: more than a body may have
GROWN: Final = 100 * 2**20  # bytes that all of these requests may leave in memory
HELD: Final = 300 * 2**20  # bytes that requests may take at the same time
SCRIPT: Final = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"


class Hostile(NamedTuple):
    """A request and its answer."""

    name: str
    status: int
    code: str
    method: str = "GET"
    path: str = "/v1/jobs"
    body: bytes | None = None
    headers: Mapping[str, str] = MappingProxyType({})
    tenant: str | None = "mine"


def body(name: str, content: bytes, *, status: int = 422, code: str = "invalid_request") -> Hostile:
    """Return a submission with this body."""
    return Hostile(f"body: {name}", status, code, method="POST", body=content)


def request(name: str, **fields: Any) -> Hostile:
    """Return a submission of a request with these fields."""
    return body(name, json.dumps({"prompt": "x"} | fields).encode())


def query(text: str, code: str = "invalid_request", *, method: str = "POST") -> Hostile:
    """Return a submission with this query."""
    content = b'{"prompt":"x"}' if method == "POST" else None
    return Hostile(f"?{text[:60]}", 422, code, method=method, path=f"/v1/jobs?{text}", body=content)


def path(text: str, status: int = 404, code: str = "not_found", *, method: str = "GET") -> Hostile:
    """Return a request of this path."""
    return Hostile(f"{method} {text[:60]}", status, code, method=method, path=text)


def key(name: str, header: str | None) -> Hostile:
    """Return a request with this header `Authorization`."""
    headers = {} if header is None else {"Authorization": header}
    return Hostile(f"key: {name}", 401, "unauthorized", headers=headers, tenant=None)


def other(method: str, text: str) -> Hostile:
    """Return a request of another tenant's job."""
    return Hostile(f"other's {method} {text}", 404, "unknown", method=method, path=text)


def limited(name: str, status: int = 422, code: str = "lora_not_allowed", **fields: Any) -> Hostile:
    """Return a submission of the tenant with limits."""
    content = json.dumps({"prompt": "x", "model": "small"} | fields).encode()
    return Hostile(f"limited: {name}", status, code, method="POST", body=content, tenant="limited")


def lora(address: str) -> Hostile:
    """Return a submission with a LoRA that the tenant with limits may not use."""
    return limited(address, 403, loras=[{"file": {"url": address}}])


def inspected(address: str) -> Hostile:
    """Return an inspection of an address that the server must not open."""
    content = json.dumps({"file": {"url": address}}).encode()
    return Hostile(
        f"inspect {address}", 403, "lora_not_allowed", "POST", "/v1/loras/inspect", content
    )


JOB: Final = f"/v1/jobs/{OTHERS}"
HOSTILE: Final = [
    body("none", b""),
    body("no JSON", b"{"),
    body("NaN", b'{"prompt":"x","guidance_scale":NaN}'),
    body("Infinity", b'{"prompt":"x","guidance_scale":-Infinity}'),
    body("1e999", b'{"prompt":"x","guidance_scale":1e999}'),
    body("deep arrays", b"[" * 500_000),
    body("deep objects", b'{"a":' * 150_000 + b"1" + b"}" * 150_000),
    body("deep prompt", b'{"prompt":' + b"[" * 900 + b"]" * 900 + b"}"),
    body("half a surrogate pair", rb'{"prompt":"\ud800"}'),
    body("no UTF-8", b'{"prompt":"\xff\xfe"}'),
    body("UTF-16", '{"prompt":"x"}'.encode("utf-16")),
    body("compressed", gzip.compress(b'{"prompt":"x"}')),
    body("a form", b"prompt=x&width=64"),
    body("an array", b"[]"),
    body("null", b"null"),
    body("300,000 LoRAs", b'{"prompt":"x","loras":[' + b"{}," * 300_000 + b"{}]}"),
    body("70,000 names", b"{" + b",".join(b'"k%d":1' % n for n in range(70_000)) + b"}"),
    body("a long integer", b'{"prompt":"x","seed":' + b"9" * 10_000 + b"}"),
    body("too large", b" " * LARGE, status=413, code="body_too_large"),
    request("a number as prompt", prompt=1),
    request("a misspelt field", loras=[{"file": {"url": "https://h/f"}, "wieght": 1}]),
    request("an unknown field", __class__="x"),
    request("nine LoRAs", loras=[{"file": {"url": f"https://h/{n}"}} for n in range(9)]),
    request("a huge image", width=1_000_000),
    request("a million images", sweep={"seed": list(range(60)), "eta": [0.1] * 60}),
    request("a path out of the request", sweep={"__init__.__globals__": [1]}),
    request("an image of another tenant's job", image={"url": f"job:{OTHERS}#0"}),
    request(
        "a mask of another tenant's job",
        image={"url": "https://h/i"},
        mask={"url": f"job:{OTHERS}#0"},
    ),
    request("an image that was not uploaded", image={"url": f"upload:{'0' * 64}"}),
    query("wait=NaN"),
    query("wait=1e9"),
    query("wait=-1"),
    query("priority=urgent"),
    query("priority=high&priority=low"),
    query("expires_in=inf"),
    query("admin=true"),
    query("label=x"),
    query(f"label=x={'y' * 201}"),
    query("&".join(f"label=x{n}=y" for n in range(9))),
    query("label=%00=y"),
    query("webhook_url=file:///etc/passwd"),
    query("webhook_url=http://user:secret@host/"),
    query("limit=0", method="GET"),
    query("limit=1e9", method="GET"),
    query("cursor=-1", method="GET"),
    query("cursor=99999999999999999999999", method="GET"),
    Hostile("an empty Idempotency-Key", 422, "invalid_request", "POST", "/v1/jobs",
            b'{"prompt":"x"}', {"Idempotency-Key": ""}),
    Hostile("a long Idempotency-Key", 422, "invalid_request", "POST", "/v1/jobs",
            b'{"prompt":"x"}', {"Idempotency-Key": "k" * 1001}),
    key("none", None),
    key("wrong", "Bearer zl_" + "A" * 43),
    key("empty", "Bearer"),
    key("another scheme", "Basic dXNlcjpwYXNz"),
    key("long", "Bearer " + "A" * 8000),
    key("bytes", "Bearer \xff\xfe"),
    Hostile("key in the query", 401, "unauthorized", path="/v1/jobs?key={key}", tenant=None),
    path("/v1/jobs", 405, "method_not_allowed", method="DELETE"),
    path("/v1/jobs", 405, "method_not_allowed", method="OPTIONS"),
    path("/v1/jobs", 405, "method_not_allowed", method="TRACE"),
    path("/v1/queue", 405, "method_not_allowed", method="POST"),
    path("/v1/jobs/"),
    path("//evil.example/v1/jobs"),
    path("/v1/../../etc/passwd"),
    path("/v1/jobs/..%2f..%2f..%2fetc%2fpasswd"),
    path("/v1/jobs/%2e%2e/%2e%2e/etc/passwd"),
    path("/v1/jobs/..", 422, "invalid_job_id"),
    path("/v1/jobs/%00", 422, "invalid_job_id"),
    path("/v1/jobs/a%0d%0aSet-Cookie:x=1", 422, "invalid_job_id"),
    path("/v1/jobs/" + "a" * 65, 422, "invalid_job_id"),
    path("/v1/jobs/%F0%9F%92%A3", 422, "invalid_job_id"),
    path("/v1/jobs/a*", 422, "invalid_job_id"),
    path("/openapi.json%00"),
    path("/%3Cscript%3Ealert(1)%3C/script%3E"),
    other("GET", JOB),
    other("HEAD", JOB),
    other("GET", f"{JOB}?wait=1"),
    other("GET", f"{JOB}/result"),
    other("GET", f"{JOB}/events"),
    other("GET", f"{JOB}/images/0"),
    other("GET", f"{JOB}/images/" + "9" * 5000),
    other("POST", f"{JOB}/cancel"),
    lora("hf://elsewhere/repo/file.safetensors"),
    lora("hf://owner/../elsewhere/file.safetensors"),
    lora("hf://owner/%2e%2e/elsewhere/file.safetensors"),
    lora("hf://owner/%252e%252e/elsewhere/file.safetensors"),
    lora("hf://owner@elsewhere/repo"),
    lora("hf://ownership/repo"),
    lora("https://files.example/lorases/f.safetensors"),
    lora("https://files.example/loras/../f.safetensors"),
    lora("https://files.example/loras/.\t./f.safetensors"),
    lora("https://files.example\\@elsewhere/loras/f.safetensors"),
    lora("https://files.example:444/loras/f.safetensors"),
    lora("https://[::1/loras/f.safetensors"),
    lora("https://files.exampl\u2100/f.safetensors"),
    lora("file:///etc/passwd"),
    lora("lora://private"),
    lora("lora://PUBLIC-x"),
    lora(f"job:{OTHERS}#0"),
    limited("a name in the prompt", 403, prompt="<lora:private:1>", prompt_syntax="a1111"),
    limited("a file of a sweep", 403, loras=[{"file": {"url": "hf://owner/a"}}],
            sweep={"loras[0].file": [{"url": "hf://owner/b"}, {"url": "hf://elsewhere/c"}]}),
    limited("an embedding", 403, embeddings=[{"file": {"url": "hf://elsewhere/c"}}]),
    limited("an image", 403, image={"url": "https://elsewhere/i.png"}),
    limited("a model", 422, "invalid_request", model="large"),
    limited("no model", 422, "invalid_request", model=None),
    inspected("file:///etc/passwd"),
    inspected("http://127.0.0.1:{broker_port}/"),
    inspected("http://localhost:{broker_port}/"),
    inspected("https://169.254.169.254/latest/meta-data"),
]  # fmt: skip


def test_the_table_has_every_kind() -> None:
    assert len(HOSTILE) >= 60
    assert len({hostile.name for hostile in HOSTILE}) == len(HOSTILE)


def filled(door: Door, text: str) -> str:
    """Return a text with the ids and addresses of this run."""
    text = text.replace(OTHERS, door.others_job).replace("{key}", door.keys["mine"])
    return text.replace("{broker_port}", str(door.broker_port))


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_a_hostile_request_has_the_right_answer(door: Door, hostile: Hostile) -> None:
    """It is a small problem document, without anything of the server or of other tenants."""
    answer = sent(door, hostile)

    assert answer.status_code == hostile.status, answer.text[:500]
    if hostile.method != "HEAD":
        assert code_of(answer) == hostile.code
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert len(answer.content) < 10_000
    for secret in secrets_of(door):
        assert secret not in answer.text


def test_the_server_lives_after_hostile_requests(door: Door) -> None:
    """All requests once more: memory is bounded, nothing is queued, and the log has no secret."""
    before = door.server.memory()
    for hostile in HOSTILE:
        sent(door, hostile)

    assert door.server.process.poll() is None
    with door.client() as client:
        assert client.get("/v1/jobs").json() == {"jobs": [], "cursor": None}
    assert door.server.memory() - before < GROWN
    log = door.log.read_text()
    for secret in secrets_of(door):
        assert secret not in log


def test_a_body_of_two_lengths_ends_the_connection(door: Door) -> None:
    """Else what a proxy takes for its rest would be a request of its own (RFC 9112, 6.3)."""
    hidden = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n"
    lengths = b"Content-Length: %d\r\nTransfer-Encoding: chunked" % (5 + len(hidden))
    with socket.create_connection(("127.0.0.1", door.server.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\n%b\r\n\r\n" % lengths)
        connection.sendall(b"0\r\n\r\n" + hidden)
        answer = b"".join(iter(partial(connection.recv, 65_536), b""))

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"HTTP/1.1 200 " not in answer


# Small bodies that would take much time or memory

CROWD: Final = 40  # requests at the same time


def dense(path: str, size: int, unit: bytes) -> tuple[str, bytes]:
    """Return a body with as many objects as fit, and its path."""
    head, end = b'{"prompt":"x","loras":[', unit + b"]}"
    return path, head + (unit + b",") * ((size - len(head) - len(end)) // (len(unit) + 1)) + end


def png_info(text: str) -> tuple[str, bytes]:
    """Return the body of a question for the text in a PNG, and its path."""
    data = b"parameters\0" + text.encode()
    chunk = struct.pack(">I4s", len(data), b"tEXt") + data + b"\0\0\0\0"
    image = base64.b64encode(b"\x89PNG\r\n\x1a\n" + chunk).decode()
    return "/sdapi/v1/png-info", json.dumps({"image": image}).encode()


def test_the_fields_of_a_form_are_bounded_too(door: Door) -> None:
    """They are JSON, each of a size of which a body may have few objects."""
    dense_field = "[" + "{}," * 300_000 + "{}]"
    with door.client() as client:
        answer = client.post(
            "/v1/images/edits", files={"image": b"x"}, data={"prompt": "x", "loras": dense_field}
        )

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "loras")
    assert "commas" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("request_of", "statuses"),
    [
        (partial(dense, "/v1/jobs", 2**20, b"{}"), {422}),
        (partial(dense, "/v1/jobs", 150_000, b'{"a":{}}'), {422, 429, 503}),
        (partial(dense, "/fal/run/fal-ai/lora", 21 * 2**20, b"[]"), {422, 429, 503}),
        (partial(dense, "/sdapi/v1/img2img", 2**20, b'"\xf0\x9f\x98\x80"'), {422, 429, 503}),
        (partial(png_info, "a" * 65_000), {200}),
        (partial(png_info, 'a:"\\"' * 13_000), {200}),
        (partial(png_info, "a" * 66_000), {422}),
    ],
    ids=["objects", "nested", "arrays", "wide letters", "a name", "quotes", "a long text"],
)
def test_small_bodies_take_neither_time_nor_memory(
    door: Door, request_of: Callable[[], tuple[str, bytes]], statuses: set[int]
) -> None:
    """Many at once are answered, the server answers others meanwhile, and memory is bounded."""
    path, content = request_of()
    before, most = door.server.memory(), 0
    with door.client() as client, ThreadPoolExecutor(CROWD) as threads:
        client.get("/health/live")
        sent = [threads.submit(client.post, path, content=content) for _ in range(CROWD)]
        while not all(answer.done() for answer in sent):
            assert client.get("/health/live", timeout=10).status_code == 200
            most = max(most, door.server.memory())

    assert {answer.result().status_code for answer in sent} <= statuses
    assert most - before < HELD


def secrets_of(door: Door) -> list[str]:
    """Return texts that no answer and no log has."""
    return [SECRET_PROMPT, "Traceback", "root:x:0", *door.keys.values()]


def sent(door: Door, hostile: Hostile) -> httpx.Response:
    """Send the request with the path as it is written, which httpx would normalise."""
    headers, content = dict(hostile.headers), hostile.body
    if hostile.tenant is not None:
        headers["Authorization"] = f"Bearer {door.keys[hostile.tenant]}"
    if content is not None:
        content = filled(door, content.decode("latin-1")).encode("latin-1")
    with door.server.client() as client:
        built = client.build_request(
            hostile.method,
            "/",
            content=content,
            headers=[(name.encode(), value.encode("latin-1")) for name, value in headers.items()],
            extensions={"target": filled(door, hostile.path).encode()},
        )
        return client.send(built)


# What is not HTTP

HEAD: Final = "GET /health/live HTTP/1.1\r\nHost: localhost\r\n"
RAW: Final[dict[str, tuple[bytes, int]]] = {
    "no Host": (b"GET /health/live HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (f"{HEAD}Host: evil\r\n\r\n".encode(), 400),
    "two lengths": (f"{HEAD}Content-Length: 1\r\nContent-Length: 2\r\n\r\n".encode(), 400),
    "a negative length": (f"{HEAD}Content-Length: -1\r\n\r\n".encode(), 400),
    "a wrong chunk": (
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n", 400,
    ),
    "another encoding": (f"{HEAD}Transfer-Encoding: gzip\r\n\r\n".encode(), 400),
    "a NUL in a header": (f"{HEAD}X: \0\r\n\r\n".encode(), 400),
    "a space in a name": (f"{HEAD}X Y: 1\r\n\r\n".encode(), 400),
    "headers of 17 KB": (f"{HEAD}X: {'a' * 17_000}\r\n\r\n".encode(), 431),
    "5,000 headers": ((HEAD + "X: 1\r\n" * 5000 + "\r\n").encode(), 431),
    "a long path": (f"GET /{'a' * 17_000} HTTP/1.1\r\nHost: x\r\n\r\n".encode(), 431),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\n", 404),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "TLS": (bytes.fromhex("16030100c4010000c00303") + b"\0" * 200, 400),
    "noise": (bytes(range(256)) * 80, 400),
    "another host's URL": (b"GET http://evil/v1/jobs HTTP/1.1\r\nHost: evil\r\n\r\n", 404),
    "a web socket": (
        f"{HEAD}Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode(), 200,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
def test_what_is_not_http_has_an_answer(door: Door, name: str) -> None:
    """The status is 400 with a problem document; other connections are served."""
    content, status = RAW[name]
    with socket.create_connection(("127.0.0.1", door.server.port), 30) as connection:
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65_536):
            received += piece

    head, _, rest = received.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    if status != 200:
        codes = {400: "not_http", 404: "not_found", 431: "headers_too_large"}
        assert json.loads(rest)["code"] == codes[status]
        assert b"application/problem+json" in head
    assert "Invalid HTTP request" not in door.log.read_text()
    with door.client() as client:
        assert client.get("/health/live").status_code == 200


def test_scripts_in_texts_come_back_as_json_only(door: Door) -> None:
    """Prompts, labels and names are text in JSON, which a browser neither runs nor guesses."""
    with door.client() as client:
        loras = [{"file": {"url": f"https://files.example/{SCRIPT}"}, "adapter_name": SCRIPT}]
        submitted = client.post(
            "/v1/jobs", json={"prompt": SCRIPT, "loras": loras}, params={"label": f"a={SCRIPT}"}
        )
        job = f"/v1/jobs/{submitted.json()['id']}"
        answers = [
            submitted,
            client.get(job),
            client.get("/v1/jobs", params={"label": f"a={SCRIPT}"}),
            client.get("/v1/jobs", params={"label": SCRIPT}),
            client.get(f"/v1/jobs/{SCRIPT}"),
            client.post("/v1/jobs", json={"prompt": "x", SCRIPT: 1}),
            client.post("/v1/jobs", json={"prompt": "x", "scheduler": SCRIPT}),
            client.get(f"{job}/images/{SCRIPT}"),
        ]
    for answer in answers:
        assert answer.headers["content-type"] in ("application/json", "application/problem+json")
        assert answer.headers["x-content-type-options"] == "nosniff"
        answer.json()
    assert answers[2].json()["jobs"][0]["labels"] == {"a": SCRIPT}


# A browser on this machine, and a page of another site


@pytest.fixture(scope="module")
def open_door(broker_url: str) -> Iterator[httpx.Client]:
    """Return a client of a server without API keys."""
    with running(broker_url) as server, server.client() as client:
        yield client


SIMPLE: Final = {"Content-Type": "text/plain"}  # which a page of another site may send


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Host": "localhost.evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost:8000.evil.example"},
        {"Host": "10.0.0.1"},
        {"Host": "[::ffff:8.8.8.8]"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost.evil.example"},
        {"Origin": "http://localhost@evil.example"},
        {"Origin": "http://evil.example", "X-Forwarded-Host": "localhost"},
    ],
    ids=str,
)
def test_a_page_of_another_site_can_do_nothing(
    open_door: httpx.Client, headers: dict[str, str]
) -> None:
    """A rebound name in Host, and another site's Origin, are refused, and nothing is queued."""
    before = open_door.get("/v1/jobs").json()
    read = open_door.get("/v1/jobs", headers=headers)
    written = open_door.post("/v1/jobs", content=b'{"prompt":"x"}', headers=headers | SIMPLE)

    assert [code_of(answer) for answer in (read, written)] == ["forbidden", "forbidden"]
    assert "access-control-allow-origin" not in read.headers
    assert open_door.get("/v1/jobs").json() == before


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8000", "[::1]:8000"])
def test_a_local_name_is_served(open_door: httpx.Client, host: str) -> None:
    headers = {"Host": host, "Origin": f"http://{host}"}
    assert open_door.get("/v1/jobs", headers=headers).status_code == 200
