"""The API `/v1`: jobs of several tenants, their lists, events, results and limits."""

import base64
import hashlib
import json
import socket
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import msgspec
import pytest
from jsonschema import Draft202012Validator
from prometheus_client.parser import text_string_to_metric_families
from support.http_door import code_of
from support.http_server import Server, running, write_keys
from support.inline_worker import InlineWorker, inline_worker
from support.processes import wait_until
from zlora.broker.keys import queue_info_key
from zlora.queue_info import QueueInfo
from zlora.schema import parse_request
from zlora.server import tenants
from zlora.server.app import APIS
from zlora.server.tenants import Tenant
from zlora.testing import fake_result

REQUEST: Final = {"prompt": "a castle", "seed": 1}
RIGHTS: Final = {
    "one": Tenant(),
    "two": Tenant(),
    "few": Tenant(max_jobs=2),
    "seldom": Tenant(requests_per_minute=3),
    "narrow": Tenant(catalogue=("public-*",), models=("small",)),
}
INFO: Final = QueueInfo(
    base="SDXL", model="small", models=("small", "large"), base_sha256="0" * 64,
    width=1024, height=1024, scheduler="EulerDiscreteScheduler", num_inference_steps=28,
    guidance_scale=7.5, schedulers=("Euler",), timeout=300, url_policies=("presigned",),
    url_expires_in=3600, catalogue=("private-x", "public-y"), versions={}, loaded_at=0.0,
)  # fmt: skip
IMAGE: Final = b"the bytes of an image"


class Place(NamedTuple):
    """A server, a worker of its queue, and a client of each tenant."""

    server: Server
    worker: InlineWorker
    clients: dict[str, httpx.Client]
    keys: dict[str, str]
    file: Path

    def submit(self, tenant: str = "one", **options: Any) -> str:
        """Submit a request; return the id."""
        answer = self.clients[tenant].post("/v1/jobs", json=REQUEST, **options)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def store(self, job_id: str, state: str, value: object) -> None:
        """Write a state of a job as a worker does."""
        self.worker.app.backend.store_result(job_id, value, state)


@pytest.fixture(scope="module")
def place(broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Return a running server with a worker."""
    folder = tmp_path_factory.mktemp("place")
    keys = write_keys(folder / "keys.json", **RIGHTS)
    with ExitStack() as stack:
        worker = stack.enter_context(inline_worker(broker_url, folder))
        worker.redis.set(queue_info_key(worker.queue), msgspec.json.encode(INFO))
        variables = {"ZLORA_QUEUE": worker.queue, "ZLORA_API_KEYS": str(folder / "keys.json")}
        server = stack.enter_context(running(broker_url, log=folder / "log", **variables))
        clients = {name: stack.enter_context(server.client(key)) for name, key in keys.items()}
        yield Place(server, worker, clients, keys, folder / "keys.json")


# Submissions


def test_the_same_key_is_the_same_job(place: Place) -> None:
    """Also with other labels; another request under the key is a conflict."""
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    first = place.submit(headers=headers, params={"label": "a=1"})
    again = place.submit(headers=headers, params={"label": "a=2"})
    other = place.clients["one"].post("/v1/jobs", json=REQUEST | {"seed": 2}, headers=headers)

    assert again == first
    assert (other.status_code, code_of(other)) == (409, "conflict")
    assert place.clients["one"].get(f"/v1/jobs/{first}").json()["labels"] == {"a": "1"}


def test_two_tenants_with_the_same_key_have_two_jobs(place: Place) -> None:
    headers = {"Idempotency-Key": "order 1"}
    assert place.submit("one", headers=headers) != place.submit("two", headers=headers)


def test_long_keys_that_differ_at_their_end_are_two_jobs(place: Place) -> None:
    keys = [{"Idempotency-Key": "k" * 999 + end} for end in "ab"]
    assert place.submit(headers=keys[0]) != place.submit(headers=keys[1])


def test_a_key_that_comes_many_times_at_once_is_one_job(place: Place) -> None:
    """All answers have the same job, which is then in the tenant's list."""
    headers, found = {"Idempotency-Key": uuid.uuid4().hex}, list[str]()
    threads = [
        threading.Thread(target=lambda: found.append(place.submit(headers=headers)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 8
    assert len(set(found)) == 1
    listed = place.clients["one"].get("/v1/jobs", params={"limit": 100}).json()["jobs"]
    assert [job["id"] for job in listed].count(found[0]) == 1


def test_a_refused_job_is_not_in_the_list(place: Place) -> None:
    """The queue refuses a model that it does not serve, after the job was recorded."""
    client = place.clients["two"]
    before = client.get("/v1/jobs").json()
    refused = client.post("/v1/jobs", json=REQUEST | {"model": "unknown"})

    assert refused.status_code == 422
    assert refused.json()["path"] == "$.model"
    assert client.get("/v1/jobs").json() == before


# Lists


def test_lists_have_pages_and_labels(place: Place) -> None:
    """Pages have every job once, the newest first; several labels all hold."""
    mark = uuid.uuid4().hex
    ids = [
        place.submit("two", params={"label": [f"batch={mark}", f"even={index % 2 == 0}"]})
        for index in range(5)
    ]
    client = place.clients["two"]

    found, cursor = list[str](), 0
    while cursor is not None:
        query: dict[str, Any] = {"label": f"batch={mark}", "limit": 2, "cursor": cursor}
        page = client.get("/v1/jobs", params=query).json()
        found += [job["id"] for job in page["jobs"]]
        cursor = page["cursor"]
    even = client.get("/v1/jobs", params={"label": [f"batch={mark}", "even=True"]}).json()["jobs"]

    assert found == ids[::-1]
    assert [job["id"] for job in even] == [ids[4], ids[2], ids[0]]
    assert place.clients["one"].get("/v1/jobs", params={"label": f"batch={mark}"}).json() == {
        "jobs": [],
        "cursor": None,
    }


# Limits


def test_max_jobs_counts_what_has_not_ended(place: Place) -> None:
    """The end of a job makes room at once; a refused one counts for nothing."""
    client = place.clients["few"]
    first, _ = place.submit("few"), place.submit("few")
    refused = client.post("/v1/jobs", json=REQUEST)
    assert (refused.status_code, code_of(refused)) == (429, "too_many_jobs")
    assert refused.json()["details"] == {"max_jobs": 2}
    assert int(refused.headers["Retry-After"]) > 0

    client.post(f"/v1/jobs/{first}/cancel")
    message = wait_until(place.worker.take, "the message of a job")
    while message is not None:  # those of other tests, too
        place.worker.run(message)
        message = place.worker.take()

    place.submit("few")
    place.submit("few")
    assert client.post("/v1/jobs", json=REQUEST).status_code == 429


def test_an_open_job_may_be_sent_again_at_the_limit(place: Place, broker_url: str) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    place.worker.redis.delete(f"zlora:http:{place.worker.queue}:open:few")
    first = place.submit("few", headers=headers)
    place.submit("few")
    assert place.submit("few", headers=headers) == first


def test_requests_per_minute(place: Place) -> None:
    """Beyond them: 429, and when to come again; other tenants are served."""
    answers = [place.clients["seldom"].get("/v1/jobs") for _ in range(5)]

    assert [answer.status_code for answer in answers] == [200] * 3 + [429] * 2
    assert code_of(answers[-1]) == "too_many_requests"
    assert 0 < int(answers[-1].headers["Retry-After"]) <= 60
    assert place.clients["one"].get("/v1/jobs").status_code == 200


def test_names_that_a_tenant_may_not_use_are_not_shown(place: Place) -> None:
    narrow, wide = place.clients["narrow"], place.clients["one"]

    assert narrow.get("/v1/loras").json() == {"names": ["public-y"], "is_complete": True}
    assert wide.get("/v1/loras").json()["names"] == ["private-x", "public-y"]
    assert narrow.get("/v1/queue").json()["models"] == ["small"]
    assert "private-x" not in narrow.get("/v1/queue").text
    assert wide.get("/v1/queue").json()["unfinished"] > 0


def test_a_base_model_that_a_tenant_may_not_use_is_not_shown(place: Place) -> None:
    """Not as the one of requests that name none either, in any API."""
    narrow, key = place.clients["narrow"], queue_info_key(place.worker.queue)
    info = msgspec.structs.replace(INFO, model="large", base_sha256="a" * 64)
    place.worker.redis.set(key, msgspec.json.encode(info))
    try:
        shown = [
            narrow.get(path)
            for path in ("/v1/queue", "/v1/models", "/sdapi/v1/sd-models", "/sdapi/v1/options")
        ]
        refused = narrow.post("/v1/jobs", json=REQUEST)
    finally:
        place.worker.redis.set(key, msgspec.json.encode(INFO))

    assert [answer.status_code for answer in shown] == [200] * 4
    assert (refused.status_code, refused.json()["path"]) == (422, "$.model")
    for answer in (*shown, refused):
        assert "large" not in answer.text
        assert "aaaa" not in answer.text
    assert [row["title"] for row in shown[2].json()] == ["small"]


def test_a_tenant_with_some_base_models_may_inspect(place: Place) -> None:
    """A LoRA that is read has no base model to be refused for; its source may be."""
    names = [f"https://127.0.0.1/{name}" for name in ("a.safetensors", "b.safetensors")]
    answers = [
        place.clients["narrow"].post("/v1/loras/inspect", json={"file": {"url": address}})
        for address in (*names, "lora://private-x")
    ]

    assert [answer.status_code for answer in answers] == [403] * 3
    assert [answer.json().get("path") for answer in answers] == [None, None, "$.file"]


def test_inspections_that_hang_stop_nothing_else(
    broker_url: str, tmp_path: Path, place: Place
) -> None:
    """A tenant has two at a time, and images are read meanwhile."""
    job_id = place.submit()
    place.store(job_id, "SUCCESS", succeeded(job_id))
    silent = socket.create_server(("127.0.0.1", 0), backlog=100)
    address = f"127.0.0.1:{silent.getsockname()[1]}"
    lora = {"file": {"url": f"http://{address}/x.safetensors"}}
    variables = {
        "ZLORA_QUEUE": place.worker.queue,
        "ZLORA_API_KEYS": str(place.file),
        "ZLORA_ALLOW_HOSTS": address,
    }
    with (
        running(broker_url, log=tmp_path / "log", **variables) as server,
        server.client(place.keys["one"]) as client,
        ThreadPoolExecutor(12) as threads,
    ):
        asked = [threads.submit(client.post, "/v1/loras/inspect", json=lora) for _ in range(12)]
        refused = [answer.result() for answer in islice(as_completed(asked), 10)]
        image = client.get(f"/v1/jobs/{job_id}/images/0")
        are_waiting = [answer for answer in asked if not answer.done()]
        silent.close()

    assert (image.status_code, image.content) == (200, IMAGE)
    assert len(are_waiting) == 2
    assert {(answer.status_code, code_of(answer)) for answer in refused} == {
        (429, "too_many_requests")
    }


@pytest.mark.parametrize(
    ("path", "value"),
    [("/v1/jobs?limit=nan", "nan"), ("/v1/queue?x=1", "1"), ("/v1/loras?label=y", "y"),
     ("/v1/models?x=1", "1"), ("/sdapi/v1/samplers?x=1", "1")],
)  # fmt: skip
def test_a_wrong_query_is_refused_with_its_value(place: Place, path: str, value: str) -> None:
    answer = place.clients["one"].get(path)

    assert answer.status_code in (400, 422)
    assert f"the value is '{value}'" in answer.text


def test_a_changed_file_of_keys_counts_at_once(place: Place) -> None:
    """A key is revoked, and a broken file lets nobody in, without a word of its content."""
    content, key = tenants.read(place.file), place.clients["two"]
    others = tuple(known for known in content.keys if known.tenant != "two")
    try:
        tenants.write(place.file, msgspec.structs.replace(content, keys=others))
        assert key.get("/v1/jobs").status_code == 401
        assert place.clients["one"].get("/v1/jobs").status_code == 200

        place.file.write_text('{"tenants": {"secret name": {}}}')
        broken = place.clients["one"].get("/v1/jobs")
        assert (broken.status_code, code_of(broken)) == (503, "misconfigured")
        assert "secret name" not in broken.text
        assert str(place.file) not in broken.text
        assert int(broken.headers["Retry-After"]) > 0
    finally:
        tenants.write(place.file, content)
    assert key.get("/v1/jobs").status_code == 200


# Events


class Event(NamedTuple):
    """One server-sent event."""

    name: str
    id: str | None
    data: Any


def events(answer: httpx.Response) -> Iterator[Event]:
    """Yield the events of a stream as a browser reads them."""
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if not line and "data" in fields:
            yield Event(fields["event"], fields.get("id"), json.loads(fields["data"]))
        if not line:
            fields = {}
        else:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")


def succeeded(job_id: str, **changes: Any) -> dict[str, Any]:
    """Return the document of a result whose image is `IMAGE`, inline."""
    result = fake_result(job_id, parse_request(REQUEST))
    image = msgspec.structs.replace(
        result.images[0],
        size=len(IMAGE),
        sha256=hashlib.sha256(IMAGE).hexdigest(),
        data_uri=f"data:image/png;base64,{base64.b64encode(IMAGE).decode()}",
        url=None,
    )
    found: dict[str, Any] = msgspec.to_builtins(
        msgspec.structs.replace(result, images=(image,), **changes)
    )
    return found


def test_events_are_progress_previews_and_the_end(place: Place) -> None:
    """A second connection with the last id is not sent the same status again."""
    job_id, client = place.submit(), place.clients["one"]
    preview = "data:image/jpeg;base64,AAAA"
    with client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        stream = events(answer)
        queued = next(stream)
        place.store(job_id, "PROGRESS", {"phase": "denoising", "step": 1, "preview": preview})
        drawn = next(event for event in stream if event.data["state"] == "PROGRESS")
    with client.stream(
        "GET", f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": str(drawn.id)}
    ) as answer:
        stream = events(answer)
        place.store(job_id, "PROGRESS", {"phase": "denoising", "step": 2})
        later = next(stream)
        place.store(job_id, "SUCCESS", succeeded(job_id))
        *_, end = stream

    assert (queued.name, queued.data["state"]) == ("status", "PENDING")
    assert (drawn.data["step"], drawn.data["preview"]) == (1, preview)
    assert later.data["step"] == 2
    assert (end.name, end.id) == ("end", "end")
    assert end.data["status"]["state"] == "SUCCESS"
    assert end.data["result"]["job_id"] == job_id


def test_after_the_end_a_browser_stops(place: Place) -> None:
    """204 is the answer to the id of the end; the same id is sent for each end."""
    job_id, client = place.submit(), place.clients["one"]
    place.store(job_id, "FAILURE", {"exc_type": "OutOfMemory", "exc_message": ["x", {}],
                                    "exc_module": "zlora.errors"})  # fmt: skip
    for _ in range(2):
        with client.stream("GET", f"/v1/jobs/{job_id}/events") as answer:
            (end,) = events(answer)
            assert end.data["error"]["code"] == "out_of_memory"
    closed = client.get(f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": str(end.id)})
    assert (closed.status_code, closed.content) == (204, b"")


# Results and images


def test_an_image_has_an_etag(place: Place) -> None:
    """Its bytes are sent once; `If-None-Match` in any spelling is answered with 304."""
    job_id, client = place.submit(), place.clients["one"]
    waiting = client.get(f"/v1/jobs/{job_id}/images/0")
    assert (waiting.status_code, code_of(waiting)) == (409, "result_timeout")
    place.store(job_id, "SUCCESS", succeeded(job_id))
    path = f"/v1/jobs/{job_id}/images/0"

    image = client.get(path)
    assert (image.status_code, image.content) == (200, IMAGE)
    assert image.headers["content-type"] == "image/png"
    assert image.headers["vary"] == "Authorization"
    tag = image.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get(path, headers={"If-None-Match": known})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
    for index in ("1", "00", "+0", "x", "%d9%a0", "9" * 5000, "sheet"):
        missing = client.get(f"/v1/jobs/{job_id}/images/{index}")
        assert (missing.status_code, code_of(missing)) == (404, "not_found")


def test_an_image_with_a_url_is_redirected(place: Place) -> None:
    job_id = place.submit()
    result = msgspec.to_builtins(fake_result(job_id, parse_request(REQUEST)))
    place.store(job_id, "SUCCESS", result)

    answer = place.clients["one"].get(f"/v1/jobs/{job_id}/images/0")

    assert (answer.status_code, answer.headers["cache-control"]) == (307, "no-store")
    assert answer.headers["location"] == result["images"][0]["url"]


def test_a_path_of_the_server_is_in_no_result(place: Place) -> None:
    """An image of a folder store has no URL that a client could open."""
    job_id, client = place.submit(), place.clients["one"]
    result = succeeded(job_id)
    result["images"][0]["url"] = "file:///var/lib/zlora/0.png"
    place.store(job_id, "SUCCESS", result)

    answers = [client.get(f"/v1/jobs/{job_id}{part}") for part in ("", "/result", "/events")]

    assert all(answer.status_code == 200 for answer in answers)
    assert not any("/var/lib" in answer.text for answer in answers)
    assert client.get(f"/v1/jobs/{job_id}/images/0").content == IMAGE


def test_head_is_get_without_a_body(place: Place) -> None:
    """Also of the events of a job that goes on, which are not waited for."""
    job_id, client = place.submit(), place.clients["one"]
    for path in ("/v1/jobs", f"/v1/jobs/{job_id}", f"/v1/jobs/{job_id}/events", "/health/live"):
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")


def test_answers_are_those_of_the_openapi_document(place: Place) -> None:
    """The status, the media type and the JSON of answers and errors of each API are in it."""
    client, job_id = place.clients["one"], place.submit()
    place.store(job_id, "SUCCESS", succeeded(job_id))
    linked = place.submit()
    place.store(linked, "SUCCESS", msgspec.to_builtins(fake_result(linked, parse_request(REQUEST))))
    job, fal = "/v1/jobs/{job_id}", "/fal/queue/{owner}/{alias}/requests/{job_id}"
    paths = {"job_id": job_id, "index": "0", "owner": "fal-ai", "alias": "lora"}
    answered: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "/health/ready", {}),
        ("GET", "/openapi.json", {}),
        ("GET", "/metrics", {}),
        ("GET", "/v1/jobs", {}),
        ("POST", "/v1/jobs", {"json": REQUEST}),
        ("POST", "/v1/jobs", {"json": {}}),
        ("GET", job, {}),
        ("GET", f"{job}/events", {}),
        ("GET", f"{job}/events", {"headers": {"Last-Event-ID": "end"}}),
        ("GET", f"{job}/images/{{index}}", {}),
        ("GET", f"{job}/images/{{index}}", {"headers": {"If-None-Match": "*"}}),
        ("GET", f"{fal}/status", {}),
        ("GET", fal, {}),
        ("PUT", f"{fal}/cancel", {}),
        ("POST", "/v1/images/generations", {"json": {}}),
        ("GET", "/sdapi/v1/progress", {}),
        ("POST", "/sdapi/v1/txt2img", {"json": {"tiling": True}}),
    ]
    answers = [
        (method, path, client.request(method, path.format(**paths), **options))
        for method, path, options in answered
    ]
    headers = {"Idempotency-Key": "once"}
    once = place.submit(headers=headers)
    place.store(once, "SUCCESS", succeeded(once))
    answers.append(("POST", "/v1/jobs", client.post("/v1/jobs", json=REQUEST, headers=headers)))
    answers.append(("GET", f"{job}/images/{{index}}", client.get(f"/v1/jobs/{linked}/images/0")))

    document = client.get("/openapi.json").json()
    for method, path, answer in answers:
        described = document["paths"][path][method.lower()]["responses"]
        is_error = answer.status_code >= 400
        found = described["default" if is_error else str(answer.status_code)]
        media_type = answer.headers.get("Content-Type", "").partition(";")[0]
        kind = "image/*" if media_type.startswith("image/") else media_type
        assert bool(answer.content) == ("content" in found), (path, answer.status_code)
        if answer.content:
            schema = {**document, **found["content"][kind].get("schema", {})}
            value = answer.json() if kind.endswith("json") else answer.text
            Draft202012Validator(schema).validate(value)
    assert {answer.status_code for *_, answer in answers} == {
        200, 202, 204, 304, 307, 400, 422,
    }  # fmt: skip


def test_errors_are_counted_from_zero(place: Place) -> None:
    """An alert sees the first error of an endpoint as an increase."""
    families = text_string_to_metric_families(place.clients["one"].get("/metrics").text)
    samples = [s for f in families for s in f.samples if s.name == "zlora_http_requests_total"]
    counted = {
        (labels["method"], labels["path"], labels["status"])
        for labels in (sample.labels for sample in samples)
    }
    for endpoint in (endpoint for api in APIS for endpoint in api.endpoints):
        for status in ("500", "503"):
            assert (endpoint.method, endpoint.path, status) in counted


# Other sites


def test_other_sites_are_allowed_by_name_only(broker_url: str) -> None:
    """CORS: the origin of the setting gets its headers, any other gets none."""
    asked = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-fal-queue-priority, x-stainless-os",
    }
    with (
        running(broker_url, ZLORA_HTTP_ORIGINS="https://shop.example") as server,
        server.client() as client,
    ):
        answers = [
            client.options("/v1/jobs", headers=asked | {"Origin": f"https://{name}.example"})
            for name in ("shop", "evil")
        ]
    allowed = [answer.headers.get("access-control-allow-origin") for answer in answers]
    assert allowed == ["https://shop.example", None]
    assert [answer.status_code for answer in answers] == [200, 403]
