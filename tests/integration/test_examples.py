"""The examples, run by the commands that they name, on one worker whose engine is the fake one."""

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
PROMPT: Final = "a lighthouse at dusk"  # of the examples
AT_ONCE: Final = '{"step": 0}'  # as the fake engine takes its orders
SLOWLY: Final = '{"step": 0.1}'
SERVERS: Final = {
    "api": "fastapi_app.py",
    "api_without_redis": "fastapi_app.py",
    "shop": "django_shop/__init__.py",
    "receiver": "webhook_receiver.py",
}
SECRET: Final = webhook.new_secret()
NOBODY: Final = "redis://127.0.0.1:1/0"
PATIENCE: Final = 60.0  # seconds


class Stack(NamedTuple):
    """A worker's scene, the variables of its producers, the folder of all that is written, and where servers are."""

    scene: Scene
    environ: dict[str, str]
    folder: Path
    api: str
    api_without_redis: str
    shop: str
    receiver: str

    def log(self, server: str) -> str:
        """What a server has printed."""
        return (self.folder / f"{server}.log").read_text()


@pytest.fixture(scope="module")
def stack(broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """All that the tests need, started at the same time; no server may have broken off an answer by the end."""
    folder = tmp_path_factory.mktemp("examples")
    urls = {name: f"http://127.0.0.1:{free_port()}" for name in SERVERS}
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
            redis_url = NOBODY if name == "api_without_redis" else broker_url
            log = folder / f"{name}.log"
            started.enter_context(serving(command, environ | {"ZLORA_BROKER_URL": redis_url}, log))
        for url in urls.values():
            wait_until(partial(answers, url), f"{url} answers")
        worker.wait_ready()
        yield Stack(scene, environ, folder, **urls)
    for name in SERVERS:
        assert "Traceback" not in (folder / f"{name}.log").read_text()


def environ_of(broker_url: str, folder: Path) -> dict[str, str]:
    """The variables of a reader whose virtual environment is active."""
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
    """The commands in an example's docstring that start Python, with other words for some of theirs."""
    lines = docstring(example).splitlines()
    found = [
        shlex.split(line) for line in lines if line.startswith(("    python ", "    uvicorn "))
    ]
    assert instead.keys() <= {word for command in found for word in command}
    return [[instead.get(word, word) for word in command] for command in found]


def docstring(example: str) -> str:
    """What an example says of itself."""
    text = ast.get_docstring(ast.parse((ROOT / "examples" / example).read_text()))
    assert text is not None
    return text


@contextmanager
def serving(command: list[str], environ: dict[str, str], log: Path) -> Iterator[None]:
    """A server that is started, and ended at the end."""
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
    """Whether a server listens."""
    try:
        return bool(requests.get(url, timeout=PATIENCE).status_code)
    except requests.ConnectionError:
        return False


def ran(command: list[str], environ: dict[str, str], told: str = "") -> str:
    """What a command prints; it must succeed."""
    over = run(command, environ, told)
    assert over.returncode == 0, over.stderr
    return over.stdout


def run(
    command: list[str], environ: dict[str, str], told: str = ""
) -> "subprocess.CompletedProcess[str]":
    """A command that has ended."""
    return subprocess.run(
        command, cwd=ROOT, env=environ, input=told, text=True, capture_output=True, check=False
    )


def post(url: str, document: object, **headers: str) -> requests.Response:
    """Ask for a picture; `X_Y` is the header `X-Y`."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.post(f"{url}/pictures", json=document, headers=named, timeout=PATIENCE)


def events(answer: requests.Response) -> list[tuple[str, Any]]:
    """Server-sent events until the stream ends: names and data."""
    found = []
    for block in answer.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        assert name.startswith("event: ")
        assert data.startswith("data: ")
        found.append(
            (name.removeprefix("event: "), msgspec.json.decode(data.removeprefix("data: ")))
        )
    return found


def test_fastapi_accepts_a_picture_and_streams_its_events_until_the_result(stack: Stack) -> None:
    """202 and a Location; statuses to the last step and SUCCESS; then the end, which the Location has from then on."""
    accepted = post(
        stack.api, {"prompt": '{"step": 0.05}', "num_inference_steps": 6, "num_images": 2}
    )
    assert accepted.status_code == 202
    location = accepted.headers["Location"]
    assert location == f"/pictures/{accepted.json()['id']}"

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


def test_fastapi_takes_one_idempotency_key_for_one_job(stack: Stack) -> None:
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


def test_fastapi_says_what_is_wrong_by_status_and_field(stack: Stack) -> None:
    """A wrong field 422, with path, value and bound; what nobody knows 404; no Redis 503, and when to come again."""
    wrong = post(stack.api, {"prompt": "a cat", "num_inference_steps": 0})
    misspelt = post(stack.api, {"prompt": "a cat", "num_inference_step": 4})
    unknown = [
        requests.get(f"{stack.api}/pictures/{name}", timeout=PATIENCE)
        for name in ("nobody", "no.id")
    ]
    stream = requests.get(f"{stack.api}/pictures/nobody/events", timeout=PATIENCE)
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


def test_fastapi_watches_no_job_whose_reader_has_gone_and_cancels_one(stack: Stack) -> None:
    """A reader who leaves in the middle takes the subscription along; the job goes on until it is cancelled."""
    job_id = post(stack.api, {"prompt": SLOWLY, "num_inference_steps": 200}).json()["id"]
    path = f"{stack.api}/pictures/{job_id}"
    channel = f"celery-task-meta-{job_id}"
    with redis.Redis.from_url(stack.environ["ZLORA_BROKER_URL"]) as broker:

        def watchers() -> int:
            return int(dict(broker.pubsub_numsub(channel))[channel.encode()])

        with requests.get(f"{path}/events", stream=True, timeout=PATIENCE) as stream:
            lines = stream.iter_lines()
            assert next(lines) == b"event: status"
            wait_until(lambda: watchers() == 1, "the job is watched")
        wait_until(lambda: watchers() == 0, "nobody watches")
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
    """Somebody with a browser."""

    def __init__(self, shop: str) -> None:
        self.shop, self.session = shop, requests.Session()

    def orders(self) -> list[dict[str, Any]]:
        """All that the shop has."""
        found: list[dict[str, Any]] = self.session.get(
            f"{self.shop}/orders", timeout=PATIENCE
        ).json()["orders"]
        return found

    def buy(self, prompt: str, card: str) -> requests.Response:
        """Order a picture."""
        self.orders()  # sets the cookie
        headers = {"X-CSRFToken": self.session.cookies["csrftoken"]}
        told = {"prompt": prompt, "card": card}
        return self.session.post(
            f"{self.shop}/orders", data=told, headers=headers, timeout=PATIENCE
        )

    def order(self, location: str) -> dict[str, Any]:
        """One order."""
        found: dict[str, Any] = self.session.get(f"{self.shop}{location}", timeout=PATIENCE).json()
        return found


def jobs(stack: Stack) -> set[str]:
    """The jobs that were ever submitted."""
    with stack.scene.broker() as broker:
        return set(broker.scan_iter(job_key("*")))


def test_django_submits_at_the_commit_and_never_without_one(stack: Stack) -> None:
    """A card that is refused leaves neither an order nor a job; a good one leaves one of each, and no more."""
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


def test_django_writes_a_picture_down_once_and_believes_no_forged_webhook(stack: Stack) -> None:
    """The worker's webhook fills the order in, and what is forged before does not; sent again it mails nobody."""
    customer = Customer(stack.shop)
    location = customer.buy('{"step": 0.02}', card="good").headers["Location"]
    job_id = customer.order(location)["job_id"]

    forged = webhook.body_of(job_id, OutOfMemory(), at=time.time())
    refused = deliver(f"{stack.shop}/webhook", forged, secret=webhook.new_secret())
    drawn = wait_until(lambda: ended(customer.order(location)), "the order is drawn")
    image = stack.scene.client.job(job_id).result(timeout=PATIENCE).images[0]
    again = deliver(
        f"{stack.shop}/webhook", forged
    )  # by whoever has the secret: believed, and too late

    assert (refused.status_code, again.status_code) == (400, 204)
    assert (drawn["state"], drawn["picture"], drawn["url"]) == ("drawn", image.key, image.url)
    assert customer.order(location) == drawn
    assert stack.log("shop").count(f"{job_id}: job.succeeded") == 1


def ended(order: dict[str, Any]) -> dict[str, Any] | None:
    """An order that is open no more."""
    return None if order["state"] == "open" else order


def deliver(
    url: str, body: bytes, *, secret: str = SECRET, name: str = "msg_1", late: float = 0
) -> requests.Response:
    """Send a webhook as a worker does."""
    headers = webhook.sign(body, secret, message_id=name, timestamp=time.time() + late)
    return requests.post(url, data=body, headers=headers, timeout=PATIENCE)


def test_the_receiver_has_one_effect_for_each_event_and_none_for_what_is_not_signed(
    stack: Stack,
) -> None:
    """A worker's webhook is one row, also when it comes again; a body that was changed on its way is 400 and none."""
    handle = stack.scene.client.submit({"prompt": AT_ONCE}, webhook_url=stack.receiver)
    rows = wait_until(lambda: received(stack), "the webhook has come")
    result = handle.result(timeout=PATIENCE)
    ((event, *told),) = rows
    assert told == [handle.id, result.images[0].url, None]

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
    """What the receiver has written down."""
    with closing(sqlite3.connect(stack.environ["RECEIVER_DATABASE"])) as database:
        known = database.execute("SELECT name FROM sqlite_master").fetchall()
        return database.execute("SELECT * FROM ended").fetchall() if known else []


def test_the_script_tells_its_steps_and_saves_what_it_says(stack: Stack, tmp_path: Path) -> None:
    """Each file has the sha256 that is printed beside it; the receipt names the LoRA with its weight."""
    lora = stack.folder / "style.safetensors"
    lora.write_bytes(lora_bytes())
    (command,) = commands("script.py", {PROMPT: '{"step": 0.02}', "pictures": str(tmp_path)})

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


def test_the_script_says_what_went_wrong_and_cancels_its_job_at_a_ctrl_c(stack: Stack) -> None:
    """Redis that is away, a LoRA that is not there: one line, and status 1. A Ctrl-C leaves no job behind."""
    (command,) = commands("script.py")
    away = run(command, stack.environ | {"ZLORA_BROKER_URL": NOBODY})
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
    assert away.stderr.endswith("does `zlora up` run?\n")
    assert (nothing.returncode, nothing.stderr.partition(":")[0]) == (1, "lora_not_found")
    with pytest.raises(JobRevoked):
        stack.scene.client.job(first.decode().partition(":")[0]).result(timeout=PATIENCE)


def test_gather_draws_eight_seeds_from_a_command_and_from_a_notebook(stack: Stack) -> None:
    """One line for each as it ends, and a table in the order of the seeds; the same in a loop that runs already."""
    (command,) = commands("gather.py", {PROMPT: AT_ONCE})
    lines = re.findall(r"^ +>>> (.*)$", docstring("gather.py"), re.MULTILINE)
    cell = "\n".join(lines).replace(f'"{PROMPT}"', repr(AT_ONCE))

    for printed in (
        ran(command, stack.environ),
        ran(["python", "-m", "asyncio"], stack.environ, told=f"{cell}\n"),
    ):
        ends = re.findall(r"seed (\d+): (file:\S+)$", printed, re.MULTILINE)
        table = re.findall(r"^ +(\d+) +\d+\.\d\d +\d+\.\d\d$", printed, re.MULTILINE)
        assert sorted(seed for seed, _ in ends) == table == [str(seed) for seed in range(8)]
        assert len({path_of(url).read_bytes() for _, url in ends}) == 8


def test_the_index_names_every_example() -> None:
    """And each of its links is a file or a folder."""
    folder = ROOT / "examples"
    linked = re.findall(r"\]\(([^)]+)\)", (folder / "README.md").read_text())

    assert all((folder / link).exists() for link in linked)
    assert {path.name for path in folder.iterdir()} - {"README.md", "__pycache__"} == {
        link.partition("/")[0] for link in linked if not link.startswith("..")
    }
