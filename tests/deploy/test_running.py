"""What docker-compose.yml starts does its work: its own commands and environment, run as plain processes.

`make check-deploy` runs this; it needs Debian's docker-compose, prometheus, chromium, curl, openssl and wget. Pictures
of Flower's and Prometheus' pages are left in build/deploy.
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
from deploy.watching import unanswered, unborn
from support.processes import wait_until
from zlora import Client
from zlora.errors import LoraNotAllowed
from zlora.schema import GenerateResult

JOBS: Final = 20
WATCHING: Final = ("queue-metrics", "flower", "prometheus")
CHECKED: Final = (
    "store",
    "worker",
    *WATCHING,
)  # the broker's and Grafana's checks need their images' own programs
SIGNATURE: Final = "0f1e2d3c4b5a"  # of a LoRA's link, which nobody may read
GRAPH: Final = "sum by (phase) (rate(zlora_job_phase_seconds_sum[1m]))"
PICTURES: Final = ROOT / "build/deploy"
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
    """The machine, and what became of its jobs."""

    machine: Machine
    client: Client
    results: list[GenerateResult]
    tasks: dict[str, Mapping[str, Any]]  # Flower's, by job
    statuses: dict[str, int]  # exit statuses, of what ended
    said: str  # by the producer
    early: set[str]  # services that called themselves healthy before they were started

    def url(self, service: str, port: int) -> str:
        return f"http://127.0.0.1:{self.machine.port(service, port)}"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    found: dict[str, Any] = parsed("monitoring", "example")["services"]
    return found


@pytest.fixture(scope="module")
def machine(services: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Machine:
    made = Machine(folder=tmp_path_factory.mktemp("machine"), services=services)
    made.secrets()
    made.prometheus(2, every="1s")
    return made


@pytest.fixture(scope="module")
def ran(machine: Machine) -> Iterator[Outcome]:
    """Everything is started in the order of the file; a producer's job, 20 at once, and a worker told to end."""
    with ExitStack() as stack:

        def start(service: str, number: int = 1) -> Running:
            return stack.enter_context(machine.started(service, number))

        early = {service for service in CHECKED if machine.healthy(service)}
        broker_url = (machine.folder / "secrets/broker_url").read_text().strip()
        client = stack.enter_context(Client(broker_url))
        start("broker")
        wait_until(lambda: _pings(broker_url), "the broker answers")
        start("store")
        wait_until(lambda: machine.healthy("store"), "the store is healthy")
        statuses = {"bucket": start("bucket").process.wait(60)}
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
            )  # as Docker's client configuration may say to containers
            producer = start("producer")
        statuses["producer"] = producer.process.wait(90)
        requests_ = [
            {"prompt": f"picture {number}", "num_inference_steps": 12} for number in range(JOBS)
        ]
        handles = client.submit_many(requests_)
        results = [handle.result(timeout=120) for handle in handles]
        tasks = wait_until(
            lambda: _tasks(machine, [handle.id for handle in handles]), "Flower has heard of all"
        )
        statuses["worker-2"], more = _stopped_in_the_middle(client, workers[1])
        with pytest.raises(LoraNotAllowed):
            client.submit(
                _with_lora(f"http://10.0.0.1/anime.safetensors?X-Amz-Signature={SIGNATURE}")
            ).result(60)
        yield Outcome(
            machine, client, [*results, *more], tasks, statuses, producer.log.read_text(), early
        )


def _with_lora(url: str) -> dict[str, Any]:
    return {"prompt": "a portrait in anime style", "loras": [{"file": {"url": url}, "weight": 0.8}]}


def _stopped_in_the_middle(client: Client, worker: Running) -> tuple[int, list[GenerateResult]]:
    """More jobs, and a worker that is told to end while it draws; its exit status."""
    handles = client.submit_many(
        [{"prompt": f"more {number}", "num_inference_steps": 12} for number in range(JOBS)]
    )
    with ThreadPoolExecutor(1) as thread:
        handles[2].result(timeout=120)
        status = thread.submit(worker.stop, 60)
        return status.result(), [handle.result(timeout=120) for handle in handles]


def test_the_producer_of_the_readme_saves_its_picture(ran: Outcome) -> None:
    assert ran.statuses["producer"] == 0, ran.said
    assert "base intact: yes" in ran.said
    assert [path.suffix for path in (ran.machine.folder / "pictures").iterdir()] == [".png"]


def test_two_workers_share_a_queue_and_both_work_until_the_last_job(ran: Outcome) -> None:
    ends: dict[str, list[float]] = {}
    for task in ran.tasks.values():
        assert task["state"] == "SUCCESS"
        ends.setdefault(task["worker"], []).append(task["succeeded"])

    assert sorted(ends) == ["sdxl@worker-1", "sdxl@worker-2"]
    first, last = sorted(ends.values(), key=max)
    assert max(first) >= sorted(last)[-2], (
        "a worker had nothing to do while the other drew the last jobs"
    )
    assert min(map(len, ends.values())) >= JOBS // 4


def test_a_worker_that_is_stopped_finishes_its_job_and_no_job_is_lost(ran: Outcome) -> None:
    assert ran.statuses["worker-2"] == 0
    assert len({result.images[0].key for result in ran.results}) == 2 * JOBS
    assert all(result.base_intact and result.attempt == 1 for result in ran.results)


def test_links_open_the_pictures_and_nothing_else_does(ran: Outcome) -> None:
    url = ran.results[0].images[0].url
    assert url is not None
    assert url.startswith(ran.url("store", 8333))
    assert requests.get(url, timeout=5).content.startswith(b"\x89PNG")
    assert requests.get(url.partition("?")[0], timeout=5).status_code == 403


def test_a_container_with_a_loopback_of_its_own_has_pictures_from_the_store(ran: Outcome) -> None:
    """By links for the machine's loopback, which the producer takes to the store as to a proxy."""
    url = ran.results[0].images[0].url
    assert url is not None
    elsewhere = url.replace(ran.url("store", 8333), "http://127.0.0.1:1")  # where nobody listens
    proxy = ran.machine.environ("producer", "producer-1")["http_proxy"]
    assert requests.get(url, proxies={"http": proxy}, timeout=5).content.startswith(b"\x89PNG")
    assert requests.get(elsewhere, proxies={"http": proxy}, timeout=5).status_code == 403, (
        "a link is for one address"
    )


def test_health_checks_tell_services_that_run_from_those_that_do_not(ran: Outcome) -> None:
    assert ran.early == set()
    assert {service for service in CHECKED if ran.machine.healthy(service)} == set(CHECKED)
    assert not ran.machine.healthy("worker", 2), "it was stopped"


def test_the_broker_keeps_jobs_on_the_disk_and_drops_none_for_memory(ran: Outcome) -> None:
    with redis.Redis.from_url(
        (ran.machine.folder / "secrets/broker_url").read_text().strip()
    ) as broker:
        told = broker.config_get("appendonly", "appendfsync", "maxmemory-policy", "maxmemory")
    assert told["appendonly"] == "yes"
    assert told["appendfsync"] == "everysec"
    assert told["maxmemory-policy"] == "noeviction"
    assert int(told["maxmemory"]) > 0


def test_nobody_makes_accounts_of_the_store_without_its_key(ran: Outcome) -> None:
    """On the port beside S3's. Whoever has the key can: so that it is the key that strangers lack."""
    port, scratch = ran.machine.port("store", 8333), ran.machine.folder
    key = str(scratch / "secrets/store_grpc")
    for scheme in ("http", "https"):
        assert not is_made(f"{scheme}://127.0.0.1:{port + GRPC}", "stranger", scratch)
    assert not is_made(
        f"https://127.0.0.1:{port + GRPC}", "stranger", scratch, key=own_key(scratch)
    )
    assert not is_known(port, "stranger")
    assert is_made(f"https://127.0.0.1:{port + GRPC}", "owner", scratch, key=key)
    assert is_known(port, "owner")


def test_flower_and_its_metrics_ask_for_an_account(ran: Outcome) -> None:
    place = ran.url("flower", 5555)
    for path in ("/", "/metrics", "/api/workers", "/api/tasks"):
        assert requests.get(place + path, timeout=5).status_code == 401, path
        assert (
            requests.get(place + path, auth=_operator(ran.machine), timeout=20).status_code == 200
        ), path


def test_every_panel_and_every_rule_is_answered_by_a_real_prometheus(ran: Outcome) -> None:
    place = ran.url("prometheus-1", 9090)
    assert _left_unanswered(place) == []
    assert unborn(place) == []
    drawn = 'sum(max_over_time(zlora_jobs_total{outcome="success"}[10m]))'
    (series,) = requests.get(f"{place}/api/v1/query", params={"query": drawn}, timeout=5).json()[
        "data"
    ]["result"]
    assert float(series["value"][1]) >= JOBS


def test_pages_are_seen_by_a_browser(ran: Outcome) -> None:
    """And left for people to look at."""
    user, password = _operator(ran.machine)
    flower = ran.url("flower", 5555).replace("://", f"://{user}:{password}@")
    prometheus = ran.url("prometheus-1", 9090)
    pages = {
        "flower-workers": f"{flower}/workers",
        "flower-tasks": f"{flower}/tasks",
        "prometheus-targets": f"{prometheus}/classic/targets",
        "prometheus-alerts": f"{prometheus}/classic/alerts",
        "prometheus-graph": f"{prometheus}/classic/graph?g0.range_input=5m&g0.tab=0&g0.expr={quote(GRAPH)}",
    }
    seen = {
        "flower": "sdxl@worker-1",
        "prometheus-targets": "zlora-worker",
        "prometheus-alerts": "ZloraNoWorker",
        "prometheus-graph": "denoise",
    }
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, url in pages.items():
        page = _dumped(url, PICTURES / f"{name}.png", ran.machine.folder)
        assert next(word for start, word in seen.items() if name.startswith(start)) in page
        assert SIGNATURE not in page
        assert (PICTURES / f"{name}.png").stat().st_size > 10_000


def _dumped(url: str, picture: Path, folder: Path) -> str:
    """The page as the browser has it after its scripts; its picture is saved."""
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
        [*base, f"--screenshot={picture}", url], check=True, capture_output=True, timeout=90
    )
    dumped = subprocess.run(
        [*base, "--dump-dom", url], check=True, capture_output=True, timeout=90, text=True
    )
    return dumped.stdout


def _left_unanswered(place: str) -> list[str]:
    """What the dashboard asks in vain, once Prometheus has looked often enough for a rate."""
    end = time.monotonic() + 45
    while (left := unanswered(place)) and time.monotonic() < end:
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
    """Flower's tasks, once it has the end of each."""
    url = f"http://127.0.0.1:{machine.port('flower', 5555)}/api/tasks"
    found = requests.get(url, auth=_operator(machine), timeout=10).json()
    ours = {
        name: task for name, task in found.items() if name in ids and task["state"] == "SUCCESS"
    }
    time.sleep(0.2)
    return ours if len(ours) == len(ids) else None


def _operator(machine: Machine) -> tuple[str, str]:
    return "operator", secret(machine.folder, "flower_auth")["operator"]
