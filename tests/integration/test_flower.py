"""Flower with this project's configuration, a real worker and a real broker: it shows jobs, and acts on none."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest
import redis
import requests
from flower.urls import handlers  # type: ignore[import-untyped]
from support.figures import Tally
from support.processes import clean_environ, free_port, wait_until
from support.scene import Scene, request
from support.servers import Host, Request, lora_bytes, reply, serving
from zlora import JobHandle
from zlora.errors import LoraNotAllowed

ROOT: Final = Path(__file__).parents[2]
CONFIG: Final = ROOT / "deploy" / "flower" / "flowerconfig.py"
ACCOUNT: Final = ("operator", "a:word")
NAMES: Final = ("refused", "away", "anime")  # of LoRAs
SECRETS: Final = ("us3r", "pa55", "t0ken", "fr4g", "br0ker", "a:word")
TABLE: Final = "draw=1&start=0&length=9&search[value]=&order[0][column]=0&order[0][dir]=asc&columns[0][data]=name"
QUERY: Final = "?X-Amz-Signature=t0ken#fr4g"


class Watched(NamedTuple):
    """What a Flower is asked about."""

    url: str
    scene: Scene
    worker: str
    drawn: JobHandle
    failed: JobHandle
    waiting: JobHandle

    def get(self, path: str, **options: Any) -> requests.Response:
        """As the operator."""
        return requests.get(self.url + path, auth=ACCOUNT, timeout=30, **options)

    def told(self, job: JobHandle) -> dict[str, Any]:
        """What Flower knows of a job; nothing at first."""
        answer = self.get(f"/api/task/info/{job.id}")
        return dict(answer.json()) if answer.ok else {}

    def scheduled(self) -> list[dict[str, Any]]:
        """The jobs that wait in the worker, which Flower asks for them."""
        (told,) = self.get(f"/api/workers?refresh=1&workername={self.worker}").json().values()
        return [item["request"] for item in told.get("scheduled", [])]

    def pages(self) -> list[str]:
        """All that can be read; what is asked of the worker first."""
        jobs = [job.id for job in (self.drawn, self.failed, self.waiting)]
        return [
            f"/api/workers?refresh=1&workername={self.worker}",
            "/api/workers",
            "/",
            "/workers",
            f"/worker/{self.worker}",
            "/tasks",
            *(f"/task/{job}" for job in jobs),
            "/broker",
            "/api/tasks",
            *(f"/api/task/info/{job}" for job in jobs),
            "/api/task/types",
            "/api/queues/length",
            "/metrics",
            f"/tasks/datatable?{TABLE}",
        ]


@pytest.fixture(scope="module")
def watched(broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Three jobs with secrets in their LoRAs' addresses: one is drawn, one fails, and one waits for a server."""
    with redis.Redis.from_url(broker_url) as broker:
        broker.config_set("requirepass", "br0ker")
    folder = tmp_path_factory.mktemp("flower")
    url = broker_url.replace("//", "//:br0ker@")
    scene = Scene(folder / "scene", Tally(), broker_url=url, queue="flower")
    accounts = folder / "accounts"
    accounts.write_text(f"other:word\n{':'.join(ACCOUNT)}\n")
    with ExitStack() as stack:
        stack.callback(scene.close)
        host = stack.enter_context(serving(by_name))
        page = stack.enter_context(flower(scene.environ, FLOWER_AUTH_FILE=str(accounts)))
        stack.enter_context(scene.worker(ZLORA_ALLOW_HOSTS=host.name))
        (worker,) = wait_until(lambda: workers_of(page), "Flower sees the worker")
        failed, waiting, drawn = (scene.submit(fields=with_loras(host, name)) for name in NAMES)
        stack.callback(waiting.cancel)
        drawn.result(timeout=30)
        with pytest.raises(LoraNotAllowed):
            failed.result(timeout=30)
        made = Watched(page, scene, worker, drawn, failed, waiting)
        wait_until(lambda: made.told(drawn).get("state") == "SUCCESS", "Flower knows of the end")
        wait_until(made.scheduled, "a job waits")
        assert {f"GET /{name}.safetensors?X-Amz-Signature=t0ken" for name in NAMES[1:]} <= set(
            host.asked
        )
        yield made


def with_loras(host: Host, name: str) -> dict[str, Any]:
    """Two pictures with two LoRAs: one has a name of the request's own; a password in an address is refused."""
    address = host.url.replace("//", "//us3r:pa55@") if name == "refused" else host.url
    one = {"file": {"url": f"{address}/{name}.safetensors{QUERY}"}, "weight": 0.8}
    return {
        "loras": [one, {"file": {"url": f"{host.url}/ink{QUERY}"}, "adapter_name": "ink"}],
        "num_images": 2,
    }


def by_name(request: Request) -> bytes:
    """Of a server's files one is away for a minute."""
    return reply(status=503, Retry_After="60") if "away" in request.target else reply(lora_bytes())


@contextmanager
def flower(environ: dict[str, str], **variables: str) -> Iterator[str]:
    """A Flower that answers; its base URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = started(environ | {"FLOWER_PORT": str(port)} | variables)
    try:
        wait_until(lambda: process.poll() is None and answers(url), "Flower answers")
        yield url
    finally:
        process.terminate()
        process.communicate(timeout=30)


def started(environ: dict[str, str]) -> "subprocess.Popen[str]":
    command = [
        sys.executable,
        "-m",
        "celery",
        "-A",
        "zlora_worker.app",
        "flower",
        f"--conf={CONFIG}",
    ]
    return subprocess.Popen(command, env=clean_environ(environ), stderr=subprocess.PIPE, text=True)


def answers(url: str) -> bool:
    """Without an account: whoever runs it asks so."""
    try:
        return requests.get(f"{url}/healthcheck", timeout=5).text == "OK"
    except requests.ConnectionError:
        return False


def workers_of(url: str) -> list[str]:
    """Those whose events have arrived."""
    found: dict[str, bool] = requests.get(
        f"{url}/api/workers?status=1", auth=ACCOUNT, timeout=30
    ).json()
    return [name for name, is_alive in found.items() if is_alive]


def test_a_job_that_was_drawn_is_told_with_its_loras_and_what_it_came_to(watched: Watched) -> None:
    told = watched.told(watched.drawn)

    assert (told["name"], told["state"], told["worker"]) == (
        "zlora.generate",
        "SUCCESS",
        watched.worker,
    )
    assert told["runtime"] > 0
    assert watched.drawn.id in told["args"]  # which the fake's prompt names
    assert "anime.safetensors' 0.8, lora='ink'" in told["args"]
    result = told["result"]
    assert result.startswith("2 pictures; base intact; ")
    assert f"; runs/{watched.drawn.id}/outputs/0.png, 1.png; " in result
    anime, ink = (receipt.tier for receipt in watched.drawn.result(timeout=5).loras)
    assert result.endswith(f"anime.safetensors' rank 4 0.8 ({anime}), 'ink' rank 4 1 ({ink})")


def test_a_job_that_failed_is_told_with_its_error(watched: Watched) -> None:
    told = watched.told(watched.failed)

    assert (told["state"], told["worker"]) == ("FAILURE", watched.worker)
    assert "refused.safetensors" in told["args"]
    assert "LoraNotAllowed" in told["exception"]


def test_a_job_that_waits_in_the_worker_is_told_as_it_may_be_shown(watched: Watched) -> None:
    """Flower asks the worker itself, which has the job's whole address."""
    (waiting,) = watched.scheduled()

    assert waiting["id"] == watched.waiting.id
    assert "away.safetensors' 0.8" in waiting["args"]


def test_nothing_that_can_be_read_has_a_secret(watched: Watched) -> None:
    answers = {path: watched.get(path) for path in watched.pages()}

    assert {
        path: answer.status_code for path, answer in answers.items() if answer.status_code != 200
    } == {}
    assert [
        (path, word) for path, answer in answers.items() for word in SECRETS if word in answer.text
    ] == []


@pytest.mark.parametrize("account", [None, ("operator", "word"), ("nobody", "a:word")])
def test_nothing_is_read_without_an_account(
    watched: Watched, account: tuple[str, str] | None
) -> None:
    answers = asked_as(watched, account)

    assert {answer.status_code for answer in answers} == {401}


def test_an_account_that_is_no_ascii_is_answered_nothing(watched: Watched) -> None:
    """Flower fails over it."""
    answers = asked_as(watched, ("operator", "w\u00f6rd".encode()))

    assert [answer.url for answer in answers if answer.status_code < 400] == []
    assert [answer.url for answer in answers if watched.drawn.id in answer.text] == []


def asked_as(watched: Watched, account: Any) -> list[requests.Response]:
    """Each page, for somebody else."""
    paths = [*watched.pages(), f"/api/task/result/{watched.drawn.id}"]
    return [requests.get(watched.url + path, auth=account, timeout=30) for path in paths]


def test_a_whole_result_is_not_told(watched: Watched) -> None:
    """It has URLs that open the pictures."""
    answer = watched.get(f"/api/task/result/{watched.drawn.id}?timeout=1")

    assert answer.status_code == 403
    assert "outputs" not in answer.text


def test_nothing_acts(watched: Watched) -> None:
    acting = [
        str(route[0])
        for route in handlers
        if isinstance(route, tuple) and hasattr(route[1], "post")
    ]
    paths = [
        route.replace("(.+)", watched.worker)
        for route in acting
        if route.startswith("/api/") and "(.+)" in route
    ]
    codes = {
        path: requests.post(watched.url + path, auth=ACCOUNT, timeout=30).status_code
        for path in paths
    }

    posts = {path: code for path, code in codes.items() if code != 405}
    assert {"shutdown", "revoke", "send-task"} <= {path.split("/")[-2] for path in posts}
    assert set(posts.values()) == {403}


def test_it_listens_on_this_machine_alone_unless_told_otherwise(watched: Watched) -> None:
    with pytest.raises(requests.ConnectionError):
        requests.get(watched.url.replace("127.0.0.1", "127.0.0.2") + "/healthcheck", timeout=5)


def test_prompts_are_hashed_where_that_is_set(watched: Watched, tmp_path: Path) -> None:
    """By the client in the message, and by the worker in all that Flower hears of it."""
    broker_url = watched.scene.environ["ZLORA_BROKER_URL"]
    scene = Scene(
        tmp_path / "scene", Tally(), broker_url=broker_url, queue="hashed", ZLORA_PROMPTS="hashed"
    )
    with closing(scene):
        job = scene.submit(fields={"negative_prompt": "fog"})
        (message,) = waiting_on(scene)
        with scene.worker("two"):
            job.result(timeout=30)
            told = wait_until(lambda: ended(watched.told(job)), "Flower knows of the end")

    digests = [
        hashlib.sha256(text.encode()).hexdigest()[:12]
        for text in (request(job.id)["prompt"], "fog")
    ]
    for shown in (message["headers"]["argsrepr"], told["args"]):
        assert "prompt=sha256:{}, negative_prompt=sha256:{}, ".format(*digests) in shown
        assert job.id not in shown
        assert "fog" not in shown


def ended(told: dict[str, Any]) -> dict[str, Any] | None:
    return told if told.get("state") == "SUCCESS" else None


def waiting_on(scene: Scene) -> list[dict[str, Any]]:
    """The messages on a queue."""
    with scene.broker() as broker:
        return [
            json.loads(text) for name in scene.queue_lists() for text in broker.lrange(name, 0, -1)
        ]


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What Flower says, started side by side with accounts that are none."""
    folder = tmp_path_factory.mktemp("accounts")
    files = {
        "empty": "",
        "blank": "operator:word\n\n",
        "nameless": "word\n",
        "accent": "operator:w\u00f6rd\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    cases = {name: {"FLOWER_AUTH_FILE": str(folder / name)} for name in (*files, "gone")}
    cases["none"] = {}
    cases["both"] = {"FLOWER_AUTH_FILE": str(folder / "gone"), "FLOWER_BASIC_AUTH": "a:b"}
    running = {
        name: started({"FLOWER_PORT": str(free_port()), **variables})
        for name, variables in cases.items()
    }
    return {
        name: f"{process.communicate(timeout=60)[1]}{process.returncode}"
        for name, process in running.items()
    }


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("none", "expected one of"),
        ("both", "expected one of"),
        ("gone", "No such file"),
        ("empty", "expected `user"),
        ("blank", "expected `user"),
        ("nameless", "expected `user"),
        ("accent", "expected `user"),
    ],
)
def test_it_does_not_start_for_everybody(refused: dict[str, str], case: str, reason: str) -> None:
    line, status = refused[case].splitlines()

    assert line.startswith("flower: ")
    assert reason in line
    assert "word" not in line.replace("`user:password`", "")
    assert status == "1"
