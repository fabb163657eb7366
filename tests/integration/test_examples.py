"""The examples, run by the commands in their docstrings, on one worker with a fake engine."""

import ast
import hashlib
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import pytest
import redis
import requests
from support.figures import Tally
from support.processes import clean_environ, free_port, path_of, wait_until
from support.scene import Scene
from support.servers import lora_bytes
from zlora import GenerateResult, JobState, job_id_of, webhook
from zlora.broker.keys import job_key
from zlora.errors import JobRevoked, OutOfMemory

ROOT: Final = Path(__file__).parents[2]
PROMPT: Final = "a lighthouse at dusk"  # in the docstrings of the examples
AT_ONCE: Final = '{"step": 0}'  # instructions to the fake engine
SLOWLY: Final = '{"step": 0.1}'
SERVERS: Final = {
    "api": "fastapi_app.py",
    "api_without_redis": "fastapi_app.py",
    "shop": "django_shop/__init__.py",
    "receiver": "webhook_receiver.py",
}
SECRET: Final = webhook.new_secret()
NO_REDIS: Final = "redis://127.0.0.1:1/0"
PATIENCE: Final = 60.0  # seconds


class Stack(NamedTuple):
    """A worker, the environment of producers, the folder of all files, and the URLs of servers."""

    scene: Scene
    environ: dict[str, str]
    folder: Path
    api: str
    api_without_redis: str
    shop: str
    receiver: str
    http: str

    def log(self, server: str) -> str:
        """Return the output of a server."""
        return (self.folder / f"{server}.log").read_text()


@pytest.fixture(scope="module")
def stack(broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Start worker and servers at the same time; check at the end that no server failed."""
    folder = tmp_path_factory.mktemp("examples")
    urls = {name: f"http://127.0.0.1:{free_port()}" for name in (*SERVERS, "http")}
    environ = environ_of(broker_url, folder)
    scene = Scene(
        folder / "scene",
        Tally(),
        broker_url=broker_url,
        queue="gpu",
        ZLORA_ALLOW_HOSTS=",".join(url.removeprefix("http://") for url in urls.values()),
        ZLORA_LORA_ROOTS=str(folder),
        ZLORA_WEBHOOK_SECRET=SECRET,
    )
    with ExitStack() as started:
        started.enter_context(closing(scene))
        worker = started.enter_context(scene.starting_worker())
        migrate, _ = commands("django_shop/__init__.py")
        ran(migrate, environ)
        for name, example in SERVERS.items():
            *_, command = commands(example, {"8000": urls[name].rpartition(":")[2]})
            redis_url = NO_REDIS if name == "api_without_redis" else broker_url
            log = folder / f"{name}.log"
            started.enter_context(serving(command, environ | {"ZLORA_BROKER_URL": redis_url}, log))
        serve = ["zlora", "serve", "--port", urls["http"].rpartition(":")[2]]
        started.enter_context(serving(serve, environ, folder / "http.log"))
        for url in urls.values():
            wait_until(partial(answers, url), f"{url} answers")
        worker.wait_ready()
        yield Stack(scene, environ, folder, **urls)
    for name in urls:
        assert "Traceback" not in (folder / f"{name}.log").read_text()


def environ_of(broker_url: str, folder: Path) -> dict[str, str]:
    """Return an environment with an active virtual environment."""
    return clean_environ(
        {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "ZLORA_BROKER_URL": broker_url,
            "ZLORA_WEBHOOK_SECRET": SECRET,
            "SHOP_DATABASE": str(folder / "shop"),
            "RECEIVER_DATABASE": str(folder / "receiver"),
        }
    )


def commands(example: str, instead: Mapping[str, str] = {}) -> list[list[str]]:
    """Return the Python commands in an example's docstring, with some words replaced."""
    lines = docstring(example).splitlines()
    found = [
        shlex.split(line) for line in lines if line.startswith(("    python ", "    uvicorn "))
    ]
    assert instead.keys() <= {word for command in found for word in command}
    return [[instead.get(word, word) for word in command] for command in found]


def docstring(example: str) -> str:
    """Return the docstring of an example."""
    text = ast.get_docstring(ast.parse((ROOT / "examples" / example).read_text()))
    assert text is not None
    return text


@contextmanager
def serving(command: list[str], environ: dict[str, str], log: Path) -> Iterator[None]:
    """Run a server during the block."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            command, cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield
    finally:
        server.terminate()
        server.wait(30)


def answers(url: str) -> bool:
    """Return whether a server listens."""
    try:
        return bool(requests.get(url, timeout=PATIENCE).status_code)
    except requests.ConnectionError:
        return False


def ran(command: list[str], environ: dict[str, str], text: str = "") -> str:
    """Run a command that must succeed; return its output."""
    over = run(command, environ, text)
    assert over.returncode == 0, over.stderr
    return over.stdout


def run(
    command: list[str], environ: dict[str, str], text: str = ""
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return subprocess.run(
        command,
        cwd=ROOT,
        env=environ,
        input=text,
        encoding="utf-8",
        capture_output=True,
        check=False,
    )


def post(url: str, document: object, **headers: str) -> requests.Response:
    """Request an image; `X_Y` is the header `X-Y`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.post(f"{url}/images", json=document, headers=named, timeout=PATIENCE)


def events(answer: requests.Response) -> list[tuple[str, Any]]:
    """Return the names and data of server-sent events until the stream ends."""
    found = []
    for block in answer.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        assert name.startswith("event: ")
        assert data.startswith("data: ")
        found.append(
            (name.removeprefix("event: "), msgspec.json.decode(data.removeprefix("data: ")))
        )
    return found


def test_fastapi_streams_events_until_the_result(stack: Stack) -> None:
    """The stream has all steps, then SUCCESS, then the result, which the Location has too."""
    accepted = post(
        stack.api, {"prompt": '{"step": 0.05}', "num_inference_steps": 6, "num_images": 2}
    )
    assert accepted.status_code == 202
    location = accepted.headers["Location"]
    assert location == f"/images/{accepted.json()['id']}"

    stream = requests.get(f"{stack.api}{location}/events", timeout=PATIENCE)
    assert stream.headers["Content-Type"].startswith("text/event-stream")
    *statuses, (name, end) = events(stream)
    assert {name for name, _ in statuses} == {"status"}
    steps = [status["step"] for _, status in statuses if "step" in status]
    assert steps == sorted(steps) != []
    assert statuses[-1][1]["state"] == JobState.SUCCESS
    assert name == "end"
    result = msgspec.convert(end["result"], GenerateResult)
    for image in result.images:
        assert hashlib.sha256(path_of(image.url).read_bytes()).hexdigest() == image.sha256

    shown = requests.get(f"{stack.api}{location}", timeout=PATIENCE)
    assert shown.status_code == 200
    assert shown.json() == {"id": result.job_id, "status": {"state": "SUCCESS"}, **end}


def test_fastapi_runs_one_job_for_an_idempotency_key(stack: Stack) -> None:
    prompt = '{"label": "once", "step": 0}'
    first = post(stack.api, {"prompt": prompt}, Idempotency_Key="order-17")
    stack.scene.client.job(first.json()["id"]).result(timeout=PATIENCE)

    again = post(stack.api, {"prompt": prompt}, Idempotency_Key="order-17")
    other = post(stack.api, {"prompt": "another"}, Idempotency_Key="order-17")

    assert (again.status_code, again.json()) == (202, first.json())
    assert (other.status_code, other.json()["code"]) == (409, "conflict")
    assert (
        len([event for event in stack.scene.events("begin") if event.get("label") == "once"]) == 1
    )


def test_fastapi_reports_errors_by_status_and_field(stack: Stack) -> None:
    """A wrong field is 422 with path, value and bound; an unknown job 404; an outage 503."""
    wrong = post(stack.api, {"prompt": "a cat", "num_inference_steps": 0})
    misspelt = post(stack.api, {"prompt": "a cat", "num_inference_step": 4})
    unknown = [
        requests.get(f"{stack.api}/images/{name}", timeout=PATIENCE)
        for name in ("unknown", "no.id")
    ]
    stream = requests.get(f"{stack.api}/images/unknown/events", timeout=PATIENCE)
    away = post(stack.api_without_redis, {"prompt": "a cat"})

    assert (wrong.status_code, misspelt.status_code) == (422, 422)
    assert wrong.json()["details"] == {
        "path": "$.num_inference_steps",
        "value": "0",
        "expected": "Expected `int` >= 1",
    }
    assert "num_inference_step`" in misspelt.json()["message"]
    assert [answer.status_code for answer in (*unknown, stream)] == [404, 404, 404]
    assert (away.status_code, away.json()["code"], away.headers["Retry-After"]) == (
        503,
        "broker_unavailable",
        "5",
    )


def test_fastapi_unsubscribes_after_the_reader_disconnects_and_cancels_a_job(stack: Stack) -> None:
    """The job goes on without a reader, until it is cancelled."""
    job_id = post(stack.api, {"prompt": SLOWLY, "num_inference_steps": 200}).json()["id"]
    path = f"{stack.api}/images/{job_id}"
    channel = f"celery-task-meta-{job_id}"
    with redis.Redis.from_url(stack.environ["ZLORA_BROKER_URL"]) as broker:

        def watchers() -> int:
            return int(dict(broker.pubsub_numsub(channel))[channel.encode()])

        with requests.get(f"{path}/events", stream=True, timeout=PATIENCE) as stream:
            lines = stream.iter_lines()
            assert next(lines) == b"event: status"
            wait_until(lambda: watchers() == 1, "the job is watched")
        wait_until(lambda: watchers() == 0, "the job is not watched")
    wait_until(
        lambda: requests.get(path, timeout=PATIENCE).json()["status"]["state"] == "PROGRESS",
        "the job runs",
    )

    cancelled = requests.delete(path, timeout=PATIENCE)
    *_, (name, end) = events(requests.get(f"{path}/events", timeout=PATIENCE))

    assert (cancelled.status_code, cancelled.json()["was"]) == (202, "running")
    assert (name, end["error"]["code"]) == ("end", "job_revoked")
    assert requests.get(path, timeout=PATIENCE).json()["error"] == end["error"]
    assert requests.delete(path, timeout=PATIENCE).status_code == 409


class Customer:
    """A customer with a browser."""

    def __init__(self, shop: str) -> None:
        self.shop, self.session = shop, requests.Session()

    def orders(self) -> list[dict[str, Any]]:
        """Return all orders of the shop."""
        found: list[dict[str, Any]] = self.session.get(
            f"{self.shop}/orders", timeout=PATIENCE
        ).json()["orders"]
        return found

    def buy(self, prompt: str, card: str) -> requests.Response:
        """Order an image."""
        self.orders()  # sets the cookie
        headers = {"X-CSRFToken": self.session.cookies["csrftoken"]}
        fields = {"prompt": prompt, "card": card}
        return self.session.post(
            f"{self.shop}/orders", data=fields, headers=headers, timeout=PATIENCE
        )

    def order(self, location: str) -> dict[str, Any]:
        """Return one order."""
        found: dict[str, Any] = self.session.get(f"{self.shop}{location}", timeout=PATIENCE).json()
        return found


def jobs(stack: Stack) -> set[str]:
    """Return the keys of all job records."""
    with stack.scene.broker() as broker:
        return set(broker.scan_iter(job_key("*")))


def test_django_submits_a_job_only_after_the_commit(stack: Stack) -> None:
    """A refused card leaves neither an order nor a job; a good one leaves one of each."""
    customer, before = Customer(stack.shop), jobs(stack)

    refused = customer.buy("a cat", card="bad")
    assert (refused.status_code, customer.orders(), jobs(stack)) == (402, [], before)
    wrong = customer.buy("", card="good")
    assert (wrong.status_code, jobs(stack)) == (422, before)

    bought = customer.buy('{"label": "bought", "step": 0}', card="good")
    assert bought.status_code == 202
    order = customer.order(bought.headers["Location"])
    job_id = job_id_of(order["key"])
    assert jobs(stack) - before == {job_key(job_id)}
    assert stack.scene.client.job(job_id).result(timeout=PATIENCE).job_id == order["job_id"]
    assert (
        len([event for event in stack.scene.events("begin") if event.get("label") == "bought"]) == 1
    )


def test_django_records_an_image_once_and_refuses_a_forged_webhook(stack: Stack) -> None:
    """A webhook with another secret changes nothing; a repeated one sends no second mail."""
    customer = Customer(stack.shop)
    location = customer.buy('{"step": 0.02}', card="good").headers["Location"]
    job_id = customer.order(location)["job_id"]

    forged = webhook.body_of(job_id, OutOfMemory(), at=time.time())
    refused = deliver(f"{stack.shop}/webhook", forged, secret=webhook.new_secret())
    drawn = wait_until(lambda: ended(customer.order(location)), "the order is drawn")
    image = stack.scene.client.job(job_id).result(timeout=PATIENCE).images[0]
    again = deliver(f"{stack.shop}/webhook", forged)  # with the right secret, but too late

    assert (refused.status_code, again.status_code) == (400, 204)
    assert (drawn["state"], drawn["image"], drawn["url"]) == ("drawn", image.key, image.url)
    assert customer.order(location) == drawn
    assert stack.log("shop").count(f"{job_id}: job.succeeded") == 1


def ended(order: dict[str, Any]) -> dict[str, Any] | None:
    """Return the order if it is closed."""
    return None if order["state"] == "open" else order


def deliver(
    url: str, body: bytes, *, secret: str = SECRET, name: str = "msg_1", late: float = 0
) -> requests.Response:
    """Send a webhook as a worker does."""
    headers = webhook.sign(body, secret, message_id=name, timestamp=time.time() + late)
    return requests.post(url, data=body, headers=headers, timeout=PATIENCE)


def test_the_receiver_records_each_event_once_and_refuses_unsigned_ones(
    stack: Stack,
) -> None:
    """A repeated webhook adds no row; a body that was changed is refused with 400."""
    handle = stack.scene.client.submit({"prompt": AT_ONCE}, webhook_url=stack.receiver)
    rows = wait_until(lambda: received(stack), "the webhook is recorded")
    result = handle.result(timeout=PATIENCE)
    ((event, *columns),) = rows
    assert columns == [handle.id, result.images[0].url, None]

    body = webhook.body_of(handle.id, result, at=time.time())
    again = deliver(stack.receiver, body, name=event, late=1)
    replayed = deliver(stack.receiver, body, name=event, late=1)
    headers = webhook.sign(body, SECRET, message_id="msg_2")
    tampered = requests.post(stack.receiver, data=body + b" ", headers=headers, timeout=PATIENCE)
    unsigned = requests.post(stack.receiver, data=body, timeout=PATIENCE)

    assert [
        again.status_code,
        replayed.status_code,
        tampered.status_code,
        unsigned.status_code,
    ] == [204, 400, 400, 400]
    assert received(stack) == rows
    assert stack.log("receiver").count(f"job {handle.id} has ended") == 1


def received(stack: Stack) -> list[tuple[str, ...]]:
    """Return the rows of the receiver's table."""
    with closing(sqlite3.connect(stack.environ["RECEIVER_DATABASE"])) as database:
        known = database.execute("SELECT name FROM sqlite_master").fetchall()
        return database.execute("SELECT * FROM ended").fetchall() if known else []


def test_the_script_prints_steps_and_saves_the_images_it_names(
    stack: Stack, tmp_path: Path
) -> None:
    """Each file has the printed sha256; the receipt names the LoRA with its weight."""
    lora = stack.folder / "style.safetensors"
    lora.write_bytes(lora_bytes())
    (command,) = commands("script.py", {PROMPT: '{"step": 0.02}', "images": str(tmp_path)})

    printed = ran([*command, "--lora", f"{lora.as_uri()}:0.8"], stack.environ)

    saved = re.findall(r"^(\S+): 64x64, seed \d+, sha256 (\w+)$", printed, re.MULTILINE)
    assert {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path, _ in saved} == dict(
        saved
    )
    assert sorted(Path(path) for path, _ in saved) == sorted(tmp_path.iterdir())
    assert len(saved) == 2
    assert re.search(r": step \d+ of 56$", printed, re.MULTILINE)
    assert re.search(r": success$", printed, re.MULTILINE)
    assert re.search(rf"^{re.escape(lora.as_uri())}: weight 0.8, ", printed, re.MULTILINE)
    assert printed.endswith("base intact: True\n")


def test_the_script_explains_errors_and_cancels_its_job_at_ctrl_c(stack: Stack) -> None:
    """Without Redis, or with a missing LoRA, the script prints one line and exits with 1."""
    (command,) = commands("script.py")
    away = run(command, stack.environ | {"ZLORA_BROKER_URL": NO_REDIS})
    missing = [*command, "--lora", f"{(stack.folder / 'none.safetensors').as_uri()}:1"]
    nothing = run(missing, stack.environ)
    (slow,) = commands("script.py", {PROMPT: SLOWLY})
    stopped = subprocess.Popen(
        slow, cwd=ROOT, env=stack.environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with stopped:
        assert stopped.stdout is not None
        first = next(line for line in stopped.stdout if b": step " in line)
        stopped.send_signal(signal.SIGINT)

    assert (away.returncode, away.stderr.count("\n")) == (1, 1)
    assert away.stderr.endswith("is `zlora up` running?\n")
    assert (nothing.returncode, nothing.stderr.partition(":")[0]) == (1, "lora_not_found")
    with pytest.raises(JobRevoked):
        stack.scene.client.job(first.decode().partition(":")[0]).result(timeout=PATIENCE)


def test_gather_draws_eight_seeds_in_a_command_and_in_a_notebook(stack: Stack) -> None:
    """Both print a line for each job, and a table in order of the seeds."""
    (command,) = commands("gather.py", {PROMPT: AT_ONCE})
    lines = re.findall(r"^ +>>> (.*)$", docstring("gather.py"), re.MULTILINE)
    cell = "\n".join(lines).replace(f'"{PROMPT}"', repr(AT_ONCE))

    for printed in (
        ran(command, stack.environ),
        ran(["python", "-m", "asyncio"], stack.environ, text=f"{cell}\n"),
    ):
        ends = re.findall(r"seed (\d+): (file:\S+)$", printed, re.MULTILINE)
        table = re.findall(r"^ +(\d+) +\d+\.\d\d +\d+\.\d\d$", printed, re.MULTILINE)
        assert sorted(seed for seed, _ in ends) == table == [str(seed) for seed in range(8)]
        assert len({path_of(url).read_bytes() for _, url in ends}) == 8


def test_typescript_draws_over_http_and_prints_what_each_lora_changed(
    stack: Stack, tmp_path: Path
) -> None:
    lora = stack.folder / "style.safetensors"
    lora.write_bytes(lora_bytes())
    script = ROOT / "examples" / "typescript" / "draw.ts"

    printed = subprocess.run(
        ["node", str(script), '{"step": 0.05}', lora.as_uri()],
        cwd=tmp_path,
        env=stack.environ | {"ZLORA_SERVER": stack.http},
        encoding="utf-8",
        capture_output=True,
        check=True,
    ).stdout

    *_, change, file = printed.splitlines()
    assert change.startswith(f"{lora.as_uri()} changes ")
    assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")
    assert "denoising" in printed


def test_typescript_types_are_those_of_the_server(stack: Stack, tmp_path: Path) -> None:
    """`make types` has been run since the API changed, and the example compiles with them."""
    folder = ROOT / "examples" / "typescript"
    programs = ROOT / "build" / "typescript" / "node_modules" / ".bin"
    document, types = tmp_path / "openapi.json", tmp_path / "zlora.d.ts"
    document.write_text(ran(["zlora", "schema", "openapi"], stack.environ))
    generate = [str(programs / "openapi-typescript"), "--default-non-nullable", "false"]

    ran([*generate, str(document), "--output", str(types)], stack.environ)
    ran([str(programs / "tsc"), "--project", str(folder)], stack.environ)

    assert types.read_text() == (folder / "zlora.d.ts").read_text()


def test_the_index_names_each_example() -> None:
    """Each of its links is a file or a folder."""
    folder = ROOT / "examples"
    linked = re.findall(r"\]\(([^)]+)\)", (folder / "README.md").read_text())

    assert all((folder / link).exists() for link in linked)
    assert {path.name for path in folder.iterdir()} - {"README.md", "__pycache__"} == {
        link.partition("/")[0] for link in linked if not link.startswith("..")
    }
