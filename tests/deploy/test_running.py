"""The services of docker-compose.yml work together, run as plain processes.

`make check-deploy` runs this file; it needs Debian's docker-compose, prometheus, chromium, curl,
openssl and wget. Screenshots of Flower's and Prometheus' pages are left in build/deploy.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest
import redis
import requests
from deploy.accounts import is_known, is_made, own_key
from deploy.plain import GRPC, ROOT, Machine, Running, parsed, secret
from deploy.watching import missing_counters, unanswered
from support.processes import wait_until
from zlora import Client
from zlora.errors import LoraNotAllowed
from zlora.schema import GenerateResult

JOBS: Final = 20
WATCHING: Final = ("queue-metrics", "flower", "server", "prometheus")
CHECKED: Final = (
    "store",
    "worker",
    *WATCHING,
)  # the checks of broker and Grafana need programs of their images
SIGNATURE: Final = "0f1e2d3c4b5a"  # in a LoRA's URL; a secret
GRAPH: Final = "sum by (phase) (rate(zlora_job_phase_seconds_sum[1m]))"
SCREENSHOTS: Final = ROOT / "build/deploy"
BROWSER: Final = (
    "chromium",
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
)
QUIET: Final = (
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)


@dataclass
class Outcome:
    """The machine, and the results of its jobs."""

    machine: Machine
    client: Client
    results: list[GenerateResult]
    tasks: dict[str, Mapping[str, Any]]  # Flower's data, by job
    statuses: dict[str, int]  # exit statuses by service
    output: str  # of the producer
    doctor: str  # output of the operator
    early: set[str]  # services that were healthy before they were started
    api_key: str  # of a tenant of the HTTP server

    def ask(self, method: str, path: str, **options: Any) -> requests.Response:
        """Send a request with the API key to the HTTP server."""
        headers = {"Authorization": f"Bearer {self.api_key}"}
        address = self.url("server", 8000) + path
        return requests.request(method, address, headers=headers, timeout=90, **options)

    def url(self, service: str, port: int) -> str:
        return f"http://127.0.0.1:{self.machine.port(service, port)}"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = parsed("http", "monitoring", "example")["services"]
    return found


@pytest.fixture(scope="module")
def machine(services: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Machine:
    made = Machine(folder=tmp_path_factory.mktemp("machine"), services=services)
    made.secrets()
    made.prometheus(2, every="1s")
    (made.folder / "keys").mkdir()
    return made


@pytest.fixture(scope="module")
def ran(machine: Machine) -> Iterator[Outcome]:
    """Start all services, run a producer's job, 20 jobs at once, and stop a worker."""
    with ExitStack() as stack:

        def start(service: str, number: int = 1, *words: str) -> Running:
            return stack.enter_context(machine.started(service, number, *words))

        early = {service for service in CHECKED if machine.healthy(service)}
        broker_url = machine.broker_url("producer")
        client = stack.enter_context(Client(broker_url))
        start("broker")
        wait_until(lambda: _pings(broker_url), "the broker answers")
        start("store")
        wait_until(lambda: machine.healthy("store"), "the store is healthy")
        statuses = {"bucket": start("bucket").process.wait(60)}
        keys = start("keys", 1, "add", "shop")
        statuses["keys"] = keys.process.wait(60)
        workers = [start("worker", number) for number in (1, 2)]
        for service in WATCHING:
            start(service)
        for number, worker in enumerate(workers, 1):
            wait_until(partial(_is_ready, machine, worker, number), f"worker {number} is ready")
        for service in WATCHING:
            wait_until(partial(machine.healthy, service), f"{service} is healthy")
        wait_until(lambda: _targets(machine) == {"up"}, "Prometheus finds all targets")

        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(
                "NO_PROXY", "localhost,127.0.0.1"
            )  # as Docker's client configuration may set for containers
            producer = start("producer")
        statuses["producer"] = producer.process.wait(90)
        operator = start("operator")
        operator.process.wait(90)
        requests_ = [
            {"prompt": f"image {number}", "num_inference_steps": 12} for number in range(JOBS)
        ]
        handles = client.submit_many(requests_)
        results = [handle.result(timeout=120) for handle in handles]
        tasks = wait_until(
            lambda: _tasks(machine, [handle.id for handle in handles]), "Flower has all ends"
        )
        statuses["worker-2"], more = _stop_worker(client, workers[1])
        with pytest.raises(LoraNotAllowed):
            client.submit(
                _with_lora(f"http://10.0.0.1/anime.safetensors?X-Amz-Signature={SIGNATURE}")
            ).result(60)
        yield Outcome(
            machine,
            client,
            [*results, *more],
            tasks,
            statuses,
            producer.log.read_text(),
            operator.log.read_text(),
            early,
            keys.log.read_text().strip(),
        )


def _with_lora(url: str) -> dict[str, Any]:
    return {"prompt": "a portrait in anime style", "loras": [{"file": {"url": url}, "weight": 0.8}]}


def _stop_worker(client: Client, worker: Running) -> tuple[int, list[GenerateResult]]:
    """Stop a worker while it runs a job; return its exit status and the results."""
    handles = client.submit_many(
        [{"prompt": f"more {number}", "num_inference_steps": 12} for number in range(JOBS)]
    )
    with ThreadPoolExecutor(1) as thread:
        handles[2].result(timeout=120)
        status = thread.submit(worker.stop, 60)
        return status.result(), [handle.result(timeout=120) for handle in handles]


def test_the_producer_of_the_readme_saves_its_image(ran: Outcome) -> None:
    assert ran.statuses["producer"] == 0, ran.output
    assert "base intact: yes" in ran.output
    assert [path.suffix for path in (ran.machine.folder / "pictures").iterdir()] == [".png"]


def test_two_workers_share_a_queue_until_the_last_job(ran: Outcome) -> None:
    ends: dict[str, list[float]] = {}
    for task in ran.tasks.values():
        assert task["state"] == "SUCCESS"
        ends.setdefault(task["worker"], []).append(task["succeeded"])

    assert sorted(ends) == ["sdxl@worker-1", "sdxl@worker-2"]
    first, last = sorted(ends.values(), key=max)
    assert max(first) >= sorted(last)[-2], "a worker was idle while the other ran the last jobs"
    assert min(map(len, ends.values())) >= JOBS // 4


def test_a_stopped_worker_finishes_its_job_and_no_job_is_lost(ran: Outcome) -> None:
    assert ran.statuses["worker-2"] == 0
    assert len({result.images[0].key for result in ran.results}) == 2 * JOBS
    assert all(result.base_intact and result.attempt == 1 for result in ran.results)


def test_the_http_server_needs_a_key_draws_and_gives_images(ran: Outcome) -> None:
    """An image is a redirect to its signed URL, or its bytes, which the server has from the store.

    A new key is known without a restart, and a revoked one is not.
    """
    address = ran.url("server", 8000)
    assert ran.statuses["keys"] == 0, ran.api_key
    assert requests.get(f"{address}/v1/queue", timeout=5).status_code == 401
    body = {"prompt": "a portrait in anime style", "num_inference_steps": 2}
    job = ran.ask("POST", "/v1/jobs?wait=60", json=body).json()
    assert job["status"]["state"] == "SUCCESS"
    image = f"/v1/jobs/{job['id']}/images/0"
    redirect = ran.ask("GET", image, allow_redirects=False)
    assert redirect.headers["Location"].startswith(ran.url("store", 8333))
    drawn = requests.get(redirect.headers["Location"], timeout=5).content
    assert drawn.startswith(b"\x89PNG")
    assert ran.ask("GET", f"{image}?proxy=true").content == drawn
    with ran.machine.started("keys", 2, "add", "shop") as another:
        assert another.process.wait(60) == 0
    other = {"Authorization": f"Key {another.log.read_text().strip()}"}
    assert requests.get(f"{address}/v1/queue", headers=other, timeout=5).status_code == 200
    with ran.machine.started("keys", 3, "list") as listed:
        assert listed.process.wait(60) == 0
    newest = listed.log.read_text().splitlines()[-1].split()[0]
    with ran.machine.started("keys", 4, "revoke", newest) as revoked:
        assert revoked.process.wait(60) == 0
    assert requests.get(f"{address}/v1/queue", headers=other, timeout=5).status_code == 401
    assert ran.ask("GET", "/v1/queue").status_code == 200


def test_images_are_opened_by_signed_urls_only(ran: Outcome) -> None:
    url = ran.results[0].images[0].url
    assert url is not None
    assert url.startswith(ran.url("store", 8333))
    assert requests.get(url, timeout=5).content.startswith(b"\x89PNG")
    assert requests.get(url.partition("?")[0], timeout=5).status_code == 403


def test_a_container_gets_images_through_the_store_as_a_proxy(ran: Outcome) -> None:
    """The signed URLs have the machine's loopback, which a container cannot reach directly."""
    url = ran.results[0].images[0].url
    assert url is not None
    elsewhere = url.replace(
        ran.url("store", 8333), "http://127.0.0.1:1"
    )  # no service listens there
    proxy = ran.machine.environ("producer", "producer-1")["http_proxy"]
    assert requests.get(url, proxies={"http": proxy}, timeout=5).content.startswith(b"\x89PNG")
    assert requests.get(elsewhere, proxies={"http": proxy}, timeout=5).status_code == 403, (
        "a signed URL is for one address"
    )


def test_health_checks_succeed_for_running_services_only(ran: Outcome) -> None:
    assert ran.early == set()
    assert {service for service in CHECKED if ran.machine.healthy(service)} == set(CHECKED)
    assert not ran.machine.healthy("worker", 2), "it was stopped"


def test_the_broker_keeps_jobs_on_disk_and_evicts_none(ran: Outcome) -> None:
    with redis.Redis.from_url(ran.machine.broker_url("default")) as broker:
        config = broker.config_get("appendonly", "appendfsync", "maxmemory-policy", "maxmemory")
    assert config["appendonly"] == "yes"
    assert config["appendfsync"] == "everysec"
    assert config["maxmemory-policy"] == "noeviction"
    assert int(config["maxmemory"]) > 0


def test_each_service_has_the_rights_in_redis_that_it_needs(ran: Outcome) -> None:
    """More of it in `tests/deploy/test_broker_users.py`."""
    with redis.Redis.from_url(ran.machine.broker_url("default")) as broker:
        assert broker.acl_log() == []
    assert "workers: 2 serve the queue" in ran.doctor
    for user in ("producer", "server", "worker", "flower", "metrics", "operator"):
        with (
            redis.Redis.from_url(ran.machine.broker_url(user)) as broker,
            pytest.raises(redis.exceptions.NoPermissionError),
        ):
            broker.flushall()


def test_accounts_of_the_store_need_its_key(ran: Outcome) -> None:
    """The administration is on gRPC's port; with the key an account can be made."""
    port, scratch = ran.machine.port("store", 8333), ran.machine.folder
    key = str(scratch / "secrets/store_grpc")
    for scheme in ("http", "https"):
        assert not is_made(f"{scheme}://127.0.0.1:{port + GRPC}", "intruder", scratch)
    assert not is_made(
        f"https://127.0.0.1:{port + GRPC}", "intruder", scratch, key=own_key(scratch)
    )
    assert not is_known(port, "intruder")
    assert is_made(f"https://127.0.0.1:{port + GRPC}", "owner", scratch, key=key)
    assert is_known(port, "owner")


def test_flower_and_its_metrics_need_an_account(ran: Outcome) -> None:
    place = ran.url("flower", 5555)
    for path in ("/", "/metrics", "/api/workers", "/api/tasks"):
        assert requests.get(place + path, timeout=5).status_code == 401, path
        assert (
            requests.get(place + path, auth=_operator(ran.machine), timeout=20).status_code == 200
        ), path


def test_prometheus_answers_every_panel_and_every_rule(ran: Outcome) -> None:
    place = ran.url("prometheus-1", 9090)
    assert _unanswered(ran, place) == []
    assert missing_counters(place) == []
    succeeded = 'sum(max_over_time(zlora_jobs_total{outcome="success"}[10m]))'
    (series,) = requests.get(
        f"{place}/api/v1/query", params={"query": succeeded}, timeout=5
    ).json()["data"]["result"]
    assert float(series["value"][1]) >= JOBS


def test_a_browser_shows_the_pages(ran: Outcome) -> None:
    """The screenshots are kept for people."""
    user, password = _operator(ran.machine)
    flower = ran.url("flower", 5555).replace("://", f"://{user}:{password}@")
    prometheus = ran.url("prometheus-1", 9090)
    pages = {
        "flower-workers": f"{flower}/workers",
        "flower-tasks": f"{flower}/tasks",
        "prometheus-targets": f"{prometheus}/classic/targets",
        "prometheus-alerts": f"{prometheus}/classic/alerts",
        "prometheus-graph": (
            f"{prometheus}/classic/graph?g0.range_input=5m&g0.tab=0&g0.expr={quote(GRAPH)}"
        ),
    }
    seen = {
        "flower": "sdxl@worker-1",
        "prometheus-targets": "zlora-worker",
        "prometheus-alerts": "ZloraNoWorker",
        "prometheus-graph": "denoise",
    }
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for name, url in pages.items():
        page = _dumped(url, SCREENSHOTS / f"{name}.png", ran.machine.folder)
        assert next(word for start, word in seen.items() if name.startswith(start)) in page
        assert SIGNATURE not in page
        assert (SCREENSHOTS / f"{name}.png").stat().st_size > 10_000


def _dumped(url: str, screenshot: Path, folder: Path) -> str:
    """Return a page after its scripts have run, and save a screenshot."""
    profile = folder / "browser"
    shutil.rmtree(profile, ignore_errors=True)
    base = [
        *BROWSER,
        *QUIET,
        f"--user-data-dir={profile}",
        "--window-size=1900,900",
        "--virtual-time-budget=8000",
    ]
    subprocess.run(
        [*base, f"--screenshot={screenshot}", url], check=True, capture_output=True, timeout=90
    )
    dumped = subprocess.run(
        [*base, "--dump-dom", url], check=True, capture_output=True, timeout=90, text=True
    )
    return dumped.stdout


def _unanswered(ran: Outcome, place: str) -> list[str]:
    """Return the panels without an answer after enough scrapes for a rate, also of requests."""
    end = time.monotonic() + 45
    while (left := unanswered(place)) and time.monotonic() < end:
        ran.ask("GET", "/v1/queue")
        time.sleep(1)
    return left


def _pings(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as connection:
            return bool(connection.ping())
    except redis.ConnectionError:
        return False


def _answers(machine: Machine, service: str, port: int, path: str) -> bool:
    try:
        return requests.get(f"http://127.0.0.1:{machine.port(service, port)}{path}", timeout=2).ok
    except requests.ConnectionError:
        return False


def _is_ready(machine: Machine, worker: Running, number: int) -> bool:
    assert worker.process.poll() is None, worker.log.read_text()
    return machine.healthy("worker", number)


def _targets(machine: Machine) -> set[str]:
    if not _answers(machine, "prometheus-1", 9090, "/-/ready"):
        return set()
    url = f"http://127.0.0.1:{machine.port('prometheus-1', 9090)}/api/v1/targets"
    targets = requests.get(url, timeout=5).json()["data"]["activeTargets"]
    return {target["health"] for target in targets}


def _tasks(machine: Machine, ids: list[str]) -> dict[str, Mapping[str, Any]] | None:
    """Return Flower's tasks when all have ended."""
    url = f"http://127.0.0.1:{machine.port('flower', 5555)}/api/tasks"
    found = requests.get(url, auth=_operator(machine), timeout=10).json()
    ours = {
        name: task for name, task in found.items() if name in ids and task["state"] == "SUCCESS"
    }
    time.sleep(0.2)
    return ours if len(ours) == len(ids) else None


def _operator(machine: Machine) -> tuple[str, str]:
    return "operator", secret(machine.folder, "flower_auth")["operator"]
