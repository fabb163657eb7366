"""Flower with this project's configuration shows the jobs of a real worker, and changes none."""

import hashlib
import json
import runpy
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple
from unittest import mock

import pytest
import redis
import requests
from flower.options import options  # type: ignore[import-untyped]
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
TABLE: Final = (
    "draw=1&start=0&length=9&search[value]="
    "&order[0][column]=0&order[0][dir]=asc&columns[0][data]=name"
)
QUERY: Final = "?X-Amz-Signature=t0ken#fr4g"


class Watched(NamedTuple):
    """A Flower, its worker, and three jobs."""

    url: str
    scene: Scene
    worker: str
    finished: JobHandle
    failed: JobHandle
    waiting: JobHandle

    def get(self, path: str, **options: Any) -> requests.Response:
        """Request a page as the operator."""
        return requests.get(self.url + path, auth=ACCOUNT, timeout=30, **options)

    def info(self, job: JobHandle) -> dict[str, Any]:
        """Return what Flower knows of a job; empty until its first event."""
        answer = self.get(f"/api/task/info/{job.id}")
        return dict(answer.json()) if answer.ok else {}

    def scheduled(self) -> list[dict[str, Any]]:
        """Return the jobs that wait in the worker, as Flower requests them from the worker."""
        (worker,) = self.get(f"/api/workers?refresh=1&workername={self.worker}").json().values()
        return [item["request"] for item in worker.get("scheduled", [])]

    def pages(self) -> list[str]:
        """Return the paths of all pages, first the one that requests data from the worker."""
        jobs = [job.id for job in (self.finished, self.failed, self.waiting)]
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
    """Run three jobs with secrets in their LoRAs' addresses: finished, failed, and waiting."""
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
        failed, waiting, finished = (scene.submit(fields=with_loras(host, name)) for name in NAMES)
        stack.callback(waiting.cancel)
        finished.result(timeout=30)
        with pytest.raises(LoraNotAllowed):
            failed.result(timeout=30)
        made = Watched(page, scene, worker, finished, failed, waiting)
        wait_until(lambda: made.info(finished).get("state") == "SUCCESS", "Flower knows of the end")
        wait_until(made.scheduled, "a job waits")
        assert {f"GET /{name}.safetensors?X-Amz-Signature=t0ken" for name in NAMES[1:]} <= set(
            host.asked
        )
        yield made


def with_loras(host: Host, name: str) -> dict[str, Any]:
    """Return fields for two images with two LoRAs; a password in an address is refused."""
    address = host.url.replace("//", "//us3r:pa55@") if name == "refused" else host.url
    one = {"file": {"url": f"{address}/{name}.safetensors{QUERY}"}, "weight": 0.8}
    return {
        "loras": [one, {"file": {"url": f"{host.url}/ink{QUERY}"}, "adapter_name": "ink"}],
        "num_images": 2,
    }


def by_name(request: Request) -> bytes:
    """Answer 503 for a minute for one file."""
    return reply(status=503, Retry_After="60") if "away" in request.target else reply(lora_bytes())


@contextmanager
def flower(environ: dict[str, str], **variables: str) -> Iterator[str]:
    """Run Flower until it answers; return its base URL."""
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
    """Return whether the health check, which needs no account, succeeds."""
    try:
        return requests.get(f"{url}/healthcheck", timeout=5).text == "OK"
    except requests.ConnectionError:
        return False


def workers_of(url: str) -> list[str]:
    """Return the workers whose events have arrived."""
    found: dict[str, bool] = requests.get(
        f"{url}/api/workers?status=1", auth=ACCOUNT, timeout=30
    ).json()
    return [name for name, is_alive in found.items() if is_alive]


def test_a_finished_job_is_shown_with_its_loras_and_result(watched: Watched) -> None:
    shown = watched.info(watched.finished)

    assert (shown["name"], shown["state"], shown["worker"]) == (
        "zlora.generate",
        "SUCCESS",
        watched.worker,
    )
    assert shown["runtime"] > 0
    assert watched.finished.id in shown["args"]  # the fake engine's prompt contains the id
    assert "anime.safetensors' 0.8, lora='ink'" in shown["args"]
    result = shown["result"]
    assert result.startswith("2 images; base intact; ")
    assert f"; runs/{watched.finished.id}/outputs/0.png, 1.png; " in result
    anime, ink = (receipt.tier for receipt in watched.finished.result(timeout=5).loras)
    assert result.endswith(f"anime.safetensors' rank 4 0.8 ({anime}), 'ink' rank 4 1 ({ink})")


def test_a_failed_job_is_shown_with_its_error(watched: Watched) -> None:
    shown = watched.info(watched.failed)

    assert (shown["state"], shown["worker"]) == ("FAILURE", watched.worker)
    assert "refused.safetensors" in shown["args"]
    assert "LoraNotAllowed" in shown["exception"]


def test_a_job_that_waits_in_the_worker_is_shown_without_secrets(watched: Watched) -> None:
    """Flower requests this job from the worker, which has the whole address."""
    (waiting,) = watched.scheduled()

    assert waiting["id"] == watched.waiting.id
    assert "away.safetensors' 0.8" in waiting["args"]


def test_no_page_contains_a_secret(watched: Watched) -> None:
    answers = {path: watched.get(path) for path in watched.pages()}

    assert {
        path: answer.status_code for path, answer in answers.items() if answer.status_code != 200
    } == {}
    assert [
        (path, word) for path, answer in answers.items() for word in SECRETS if word in answer.text
    ] == []


@pytest.mark.parametrize("account", [None, ("operator", "word"), ("nobody", "a:word")])
def test_no_page_is_served_without_an_account(
    watched: Watched, account: tuple[str, str] | None
) -> None:
    answers = pages_as(watched, account)

    assert {answer.status_code for answer in answers} == {401}


def test_an_account_that_is_not_ascii_gets_no_page(watched: Watched) -> None:
    """Flower answers with an error."""
    answers = pages_as(watched, ("operator", "w\u00f6rd".encode()))

    assert [answer.url for answer in answers if answer.status_code < 400] == []
    assert [answer.url for answer in answers if watched.finished.id in answer.text] == []


def pages_as(watched: Watched, account: Any) -> list[requests.Response]:
    """Request each page with another account."""
    paths = [*watched.pages(), f"/api/task/result/{watched.finished.id}"]
    return [requests.get(watched.url + path, auth=account, timeout=30) for path in paths]


def test_the_complete_result_is_not_served(watched: Watched) -> None:
    """Its URLs open the images."""
    answer = watched.get(f"/api/task/result/{watched.finished.id}?timeout=1")

    assert answer.status_code == 403
    assert "outputs" not in answer.text


def test_no_action_is_allowed(watched: Watched) -> None:
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


def test_flower_listens_on_loopback_only_by_default(watched: Watched) -> None:
    with pytest.raises(requests.ConnectionError):
        requests.get(watched.url.replace("127.0.0.1", "127.0.0.2") + "/healthcheck", timeout=5)


def test_prompts_are_hashed_if_set(watched: Watched, tmp_path: Path) -> None:
    """By the client in the message, and by the worker in its events."""
    broker_url = watched.scene.environ["ZLORA_BROKER_URL"]
    scene = Scene(
        tmp_path / "scene", Tally(), broker_url=broker_url, queue="hashed", ZLORA_PROMPTS="hashed"
    )
    with closing(scene):
        job = scene.submit(fields={"negative_prompt": "fog"})
        (message,) = waiting_on(scene)
        with scene.worker("two"):
            job.result(timeout=30)
            info = wait_until(lambda: ended(watched.info(job)), "Flower knows of the end")

    digests = [
        hashlib.sha256(text.encode()).hexdigest()[:12]
        for text in (request(job.id)["prompt"], "fog")
    ]
    for shown in (message["headers"]["argsrepr"], info["args"]):
        assert "prompt=sha256:{}, negative_prompt=sha256:{}, ".format(*digests) in shown
        assert job.id not in shown
        assert "fog" not in shown


def ended(info: dict[str, Any]) -> dict[str, Any] | None:
    return info if info.get("state") == "SUCCESS" else None


def waiting_on(scene: Scene) -> list[dict[str, Any]]:
    """Return the messages on the queue of a scene."""
    with scene.broker() as broker:
        return [
            json.loads(text) for name in scene.queue_lists() for text in broker.lrange(name, 0, -1)
        ]


@pytest.mark.parametrize(
    ("text", "auth", "reason"),
    [
        (None, [], "expected one of"),
        ("operator:word", ["a:b"], "expected one of"),
        ("", [], "expected `user"),
        ("operator:word\n\n", [], "expected `user"),
        ("word\n", [], "expected `user"),
        ("operator:w\u00f6rd\n", [], "expected `user"),
    ],
    ids=["none", "both", "empty", "blank line", "no user", "not ascii"],
)
def test_invalid_accounts_are_refused_and_not_shown(
    text: str | None,
    auth: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("FLOWER_AUTH_FILE", raising=False)
    if text is not None:
        (tmp_path / "accounts").write_text(text)
        monkeypatch.setenv("FLOWER_AUTH_FILE", str(tmp_path / "accounts"))
    with (
        mock.patch.object(options.mockable(), "basic_auth", auth),
        pytest.raises(SystemExit) as end,
    ):
        runpy.run_path(str(CONFIG))

    line = str(end.value.code)
    assert line.startswith("flower: ")
    assert reason in line
    assert "word" not in line.replace("`user:password`", "")


def test_flower_does_not_start_without_accounts(tmp_path: Path) -> None:
    missing = str(tmp_path / "accounts")
    process = started({"FLOWER_PORT": str(free_port()), "FLOWER_AUTH_FILE": missing})

    _, errors = process.communicate(timeout=60)

    assert process.returncode == 1
    assert errors == f"flower: FLOWER_AUTH_FILE={missing}: No such file or directory\n"
