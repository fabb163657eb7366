"""The users of deploy/broker/users.sh: each may do all that its programs do, and no more.

All connections use TLS, by certificates of both sides. `make check-deploy` runs this file with a
server that has TLS of its own.
"""

import base64
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import msgspec
import pytest
import redis
import requests
from celery import Celery
from click.testing import CliRunner
from support.figures import Tally
from support.guarded import ROOT, USERS, GuardedRedis
from support.http_server import running, write_keys
from support.processes import Worker, clean_environ, free_port, wait_until
from support.scene import Scene, request
from support.servers import Host, reply, serving
from zlora import Cancellation, Client, JobState
from zlora.broker import uploads
from zlora.broker.celery_app import shared_config
from zlora.broker.dead_jobs import DeadJob
from zlora.broker.job_store import Submission
from zlora.broker.keys import dead_jobs_key, job_key, waiting_lists
from zlora.cli import doctor, main
from zlora.errors import InvalidSetting, JobExpired, JobRevoked
from zlora.server.tenants import Tenant

ACCOUNT: Final = ("operator", "word")
PAGES: Final = (
    "/api/workers?refresh=1",
    "/workers",
    "/tasks",
    "/broker",
    "/api/tasks",
    "/api/queues/length",
    "/metrics",
)
SECRET: Final = "whsec_" + base64.b64encode(b"k" * 32).decode()


def jpeg_of_8_mib(number: int) -> bytes:
    """Return an upload that is different for each number."""
    return (b"\xff\xd8\xff" + bytes([number])).ljust(uploads.MAX_BYTES, b"\0")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedRedis]:
    with GuardedRedis(tmp_path_factory.mktemp("broker")) as running:
        yield running


class Watched(NamedTuple):
    """What all programs and the receiver of webhooks have seen."""

    pages: dict[str, requests.Response]
    metrics: str
    checks: dict[str, str]  # of the operator
    answers: dict[str, int | str]  # of the HTTP server
    events: list[str]
    denials: list[tuple[str, str, str]]


@pytest.fixture(scope="module")
def watched(broker: GuardedRedis, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """Run every kind of job to its end, with all programs under their users."""
    folder = tmp_path_factory.mktemp("scene")
    scene = Scene(folder / "scene", Tally(), broker_url=broker.url("default"), queue="gpu")
    with ExitStack() as stack:
        stack.callback(scene.close)
        client = stack.enter_context(Client(broker.url("producer")))
        receiver = stack.enter_context(serving(reply()))
        flower = stack.enter_context(flower_of(broker, folder))
        metrics = stack.enter_context(metrics_of(broker))
        lost = client.submit(request("lost"))
        with broker.client() as admin:  # its message is lost, as with a killed idle worker
            admin.delete(*waiting_lists("gpu"))
        late = client.submit(request("late"), expires_in=0.1)
        variables = {
            "ZLORA_BROKER_URL": broker.url("worker"),
            "ZLORA_SWEEP": "1",
            "ZLORA_WEBHOOK_SECRET": SECRET,
            "ZLORA_ALLOW_HOSTS": receiver.name,
        }
        with scene.worker(**variables) as worker:
            answer(broker, client, receiver)
            cancel(scene, client, worker)
            with pytest.raises(JobExpired):
                late.result(timeout=60)
            lost.result(timeout=60)
            wait_until(lambda: worker_of(flower), "Flower sees the worker")
            pages = {page: get(flower + page) for page in PAGES}
            checks = operate(broker)
            answers = ask_server(broker, folder)
        denials = broker.denials()
        return Watched(pages, get(metrics).text, checks, answers, receiver.asked, denials)


def answer(broker: GuardedRedis, client: Client, receiver: Host) -> None:
    """Run jobs to their results: with a webhook, from a batch, from another program."""
    done = client.submit(request("done"), webhook_url=f"{receiver.url}/jobs")
    done.result(timeout=60)
    for job in client.submit_many([request("one"), request("two")], priority="low"):
        job.result(timeout=60)
    with other_program(broker) as app:
        sent = app.send_task("zlora.generate", [request("plain")], queue="gpu")
        assert sent.get(timeout=60)["base_intact"]
    wait_until(lambda: receiver.asked, "the webhook is sent")
    with broker.client() as admin:  # the result has expired
        admin.delete(f"celery-task-meta-{done.id}", job_key(done.id))
    assert done.result(timeout=30).job_id == done.id


def cancel(scene: Scene, client: Client, worker: Worker) -> None:
    """Cancel a job that runs, one that waits, and one whose child was killed."""
    running = client.submit(request("running", steps=200, step=0.1), job_id="running")
    scene.wait_step(running)
    queued = client.submit(request("queued"))
    assert queued.cancel() is Cancellation.QUEUED
    assert running.cancel() is Cancellation.RUNNING
    killed = client.submit(request("killed", steps=200, step=0.1), job_id="killed")
    scene.wait_step(killed)
    scene.kill(worker.child())
    scene.wait_begun(killed, 2)
    killed.cancel()
    for job in (queued, running, killed):
        with pytest.raises(JobRevoked):
            job.result(timeout=60)


def operate(broker: GuardedRedis) -> dict[str, str]:
    """Run the commands of an operator; return the checks of `zlora doctor`."""
    environ = {"ZLORA_BROKER_URL": broker.url("operator")}
    with broker.client() as admin:
        admin.zadd(dead_jobs_key("gpu"), {msgspec.json.encode(poisoned()): time.time()})
    for words in ("webhooks", "dead ls", "dead requeue poisoned", "dead drop poisoned"):
        ran = CliRunner().invoke(main, words.split(), env=environ, catch_exceptions=False)
        assert ran.exit_code == 0, ran.output
    return {check.name: check.status for check in doctor.checks(environ)}


def ask_server(broker: GuardedRedis, folder: Path) -> dict[str, int | str]:
    """Use everything of the HTTP server that asks Redis; return statuses, or what the end says."""
    file = folder / "keys.json"
    keys = write_keys(
        file, shop=Tenant(), small=Tenant(max_jobs=1), hasty=Tenant(requests_per_minute=2)
    )
    with running(
        broker.url("server"), log=folder / "server.log", ZLORA_API_KEYS=str(file)
    ) as server:

        def ask(method: str, path: str, *, key: str = "shop", **options: Any) -> httpx.Response:
            headers = {"Authorization": f"Bearer {keys[key]}", **options.pop("headers", {})}
            return httpx.request(
                method, server.url + path, headers=headers, trust_env=False, timeout=90, **options
            )

        def submit(label: str, query: str = "", **options: Any) -> httpx.Response:
            body = request(label, fields=options.pop("fields", None))
            return ask("POST", f"/v1/jobs{query}", json=body, **options)

        once = {"headers": {"Idempotency-Key": "once"}}
        labels = "?label=shop=1&label=cart=2"
        job = submit("by-http", f"{labels}&wait=60", **once).json()
        events = ask("GET", f"/v1/jobs/{job['id']}/events").text
        queued = [submit(label, key="small") for label in ("first", "second")]
        found: dict[str, int | str] = {
            "submitted": job["status"]["state"],
            "submitted again": submit("by-http", labels, **once).json()["id"] == job["id"],
            "its last event": events.split("event: ")[-1].partition("\n")[0],
            "listed": len(ask("GET", f"/v1/jobs{labels}").json()["jobs"]),
            "listed by one label": len(ask("GET", "/v1/jobs?label=cart=2").json()["jobs"]),
            "result": ask("GET", f"/v1/jobs/{job['id']}/result").status_code,
            "of another tenant": ask("GET", f"/v1/jobs/{job['id']}", key="small").status_code,
            "jobs at once": max(answer.status_code for answer in queued),
            "cancelled": ask("POST", f"/v1/jobs/{job['id']}/cancel").json()["was"],
            "refused": submit("no", "?expires_in=-1").status_code,
            "uploaded, until the first is dropped": max(
                ask("POST", "/v1/uploads", content=jpeg_of_8_mib(number)).status_code
                for number in range(uploads.MAX_TENANT_BYTES // uploads.MAX_BYTES + 1)
            ),
            "queue": ask("GET", "/v1/queue").status_code,
            "catalogue": ask("GET", "/v1/loras").status_code,
            "ready": ask("GET", "/health/ready").status_code,
            "requests a minute": max(
                ask("GET", "/v1/jobs", key="hasty").status_code for _ in range(3)
            ),
        }
        with broker.client() as admin:  # more than a minute has passed
            for key in admin.scan_iter("zlora:http:gpu:rate:*"):
                admin.pexpire(key, 1000)
        found["a minute later"] = ask("GET", "/v1/jobs", key="hasty").status_code
    return found


def poisoned() -> DeadJob:
    """Return a job that ended its child processes."""
    submission = Submission(request=request("again"), priority=5, submitted=time.time())
    error: tuple[str, str, dict[str, Any]] = ("poisoned", "three child processes ended", {})
    return DeadJob(job_id="poisoned", at=time.time(), error=error, submission=submission)


@contextmanager
def flower_of(broker: GuardedRedis, folder: Path) -> Iterator[str]:
    """Run Flower; return its base URL."""
    accounts, port = folder / "accounts", free_port()
    accounts.write_text(":".join(ACCOUNT))
    variables = {"FLOWER_AUTH_FILE": str(accounts), "FLOWER_PORT": str(port)}
    command = ["-m", "celery", "-A", "zlora_worker.app", "flower"]
    command += [f"--conf={ROOT / 'deploy/flower/flowerconfig.py'}"]
    with program(broker, "flower", command, variables):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def metrics_of(broker: GuardedRedis) -> Iterator[str]:
    """Run `zlora metrics`; return the URL of its page."""
    place = f"127.0.0.1:{free_port()}"
    command = [str(Path(sys.executable).with_name("zlora")), "metrics"]
    with program(broker, "metrics", command, {"ZLORA_METRICS": place}):
        yield f"http://{place}/metrics"


@contextmanager
def other_program(broker: GuardedRedis) -> Iterator[Celery]:
    """Open the app of a program that does not use this project's client."""
    url = broker.url("producer")
    with Celery("other", set_as_current=False) as app:
        app.conf.update(shared_config(broker_url=url, result_backend=url, queue="gpu"))
        yield app


@contextmanager
def program(
    broker: GuardedRedis, user: str, arguments: list[str], variables: dict[str, str]
) -> Iterator[None]:
    environ = clean_environ({"ZLORA_BROKER_URL": broker.url(user), **variables})
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *arguments], env=environ, **quiet)  # type: ignore[call-overload]
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def get(url: str) -> requests.Response:
    return requests.get(url, auth=ACCOUNT, timeout=30)


def worker_of(flower: str) -> Any:
    try:
        return get(f"{flower}/api/workers?refresh=1").json()
    except requests.ConnectionError:
        return None


def test_no_program_needs_a_right_that_its_user_does_not_have(watched: Watched) -> None:
    assert watched.denials == []


def test_the_http_server_does_all_by_its_user(watched: Watched) -> None:
    assert watched.answers == {
        "submitted": "SUCCESS",
        "submitted again": True,
        "its last event": "end",
        "listed": 1,
        "listed by one label": 1,
        "result": 200,
        "of another tenant": 404,
        "jobs at once": 429,
        "cancelled": "finished",
        "refused": 422,
        "uploaded, until the first is dropped": 200,
        "queue": 200,
        "catalogue": 200,
        "ready": 200,
        "requests a minute": 429,
        "a minute later": 200,
    }


def test_flower_metrics_and_doctor_see_all_by_their_users(watched: Watched) -> None:
    assert {page: answer.status_code for page, answer in watched.pages.items()} == dict.fromkeys(
        PAGES, 200
    )
    (worker,) = watched.pages[PAGES[0]].json().values()
    assert worker["stats"]
    (queue,) = watched.pages["/api/queues/length"].json()["active_queues"]
    assert queue == {"name": "gpu", "messages": 0}
    assert 'zlora_queue_up{queue="gpu"} 1.0' in watched.metrics
    assert 'zlora_queue_running_jobs{queue="gpu"} ' in watched.metrics
    assert set(watched.checks.values()) == {"ok"}


# What no user may do, and what each one may not do beside that.
NOBODY: Final = (
    "FLUSHALL",
    "FLUSHDB",
    "KEYS *",
    "SCAN 0",
    "RANDOMKEY",
    "DBSIZE",
    "CONFIG GET *",
    "CONFIG SET maxmemory 1",
    "ACL LIST",
    "ACL SETUSER worker nopass",
    "MONITOR",
    "SHUTDOWN NOSAVE",
    "SAVE",
    "REPLICAOF NO ONE",
    "CLIENT LIST",
    "CLIENT KILL TYPE normal",
    "SCRIPT FLUSH",
    "FUNCTION LIST",
    "MODULE LIST",
    "SWAPDB 0 1",
    "GET another",
    "LPUSH other-queue x",
    "RENAME gpu other",
    "EVALSHA {flush} 0",
)
REMOTE_CONTROL: Final = "PUBLISH /0.celery.pidbox x"
FORBIDDEN: Final[dict[str, tuple[str, ...]]] = {
    "server": (
        REMOTE_CONTROL,
        "SUBSCRIBE /0.celery.pidbox",
        "BRPOP gpu 1",
        "LRANGE gpu 0 -1",
        "DEL gpu",
        "SET zlora:job:x y",
        "DEL celery-task-meta-x",
        "DEL zlora:ledger:gpu",
        "RENAME zlora:http:gpu:job:x zlora:job:x",
        "HGETALL unacked",
        "SETEX zlora:lease:x 9 y",
        "SET zlora:http:other:job:x y",
        "ZADD zlora:dead:gpu 1 x",
        "HGETALL zlora:dead:gpu",
        "ZADD zlora:ledger:other 1 x",
    ),
    "producer": (
        "GET zlora:http:gpu:job:x",
        "HGET zlora:http:gpu:file:x data",
        REMOTE_CONTROL,
        "SUBSCRIBE /0.celery.pidbox",
        "LPUSH x.reply.celery.pidbox x",
        "PUBLISH /0.celeryev/task.failed x",
        "PSUBSCRIBE celery-task-meta-*",
        "PUBLISH other x",
        "BRPOP gpu 1",
        "BLPOP gpu 1",
        "EXPIRE gpu 0",
        "SETEX gpu 9 x",
        "LRANGE gpu 0 -1",
        "DEL gpu",
        "HGETALL unacked",
        "ZADD unacked_index 1 x",
        "SETEX zlora:lease:x 9 y",
        "GET zlora:sweep:gpu",
        "ZADD zlora:dead:gpu 1 x",
        "HGETALL zlora:dead:gpu",
        "ZADD zlora:ledger:other 1 x",
        "SADD _kombu.binding.other x",
        "ZRANGEBYSCORE zlora:poisoned:gpu 0 1",
    ),
    "worker": (
        REMOTE_CONTROL,
        "BRPOP other-queue 1",
        "ZADD zlora:ledger:other 1 x",
        "PUBLISH other x",
        "PSUBSCRIBE *",
    ),
    "operator": (
        "BRPOP gpu 1",
        "BLPOP gpu 1",
        "LPOP gpu",
        "EXPIRE gpu 0",
        "SETEX gpu 9 x",
        "DEL gpu\x06\x165",
        "HDEL unacked x",
        "ZADD unacked_index 1 x",
        "SET zlora:lease:x y",
        "ZADD zlora:ledger:other 1 x",
        "PUBLISH /0.celeryev/task.failed x",
    ),
    "flower": (
        "LPUSH gpu x",
        "BRPOP gpu 1",
        "DEL gpu",
        "LRANGE gpu 0 -1",
        "LINDEX gpu 0",
        "SADD _kombu.binding.gpu x",
        "GET celery-task-meta-x",
        "PUBLISH celery-task-meta-x y",
        "SUBSCRIBE celery-task-meta-x",
        "PUBLISH /0.celeryev/task.failed x",
        "HGETALL zlora:job:x",
        "HGETALL unacked",
        "SET unacked_mutex x",
        "ZADD zlora:ledger:gpu 1 x",
        "INFO",
    ),
    "metrics": (
        REMOTE_CONTROL,
        "LPUSH gpu x",
        "BRPOP gpu 1",
        "DEL gpu",
        "LRANGE gpu 0 -1",
        "HSET unacked x y",
        "SET zlora:refused:gpu 1",
        "EXPIRE zlora:refused:gpu 1",
        "GET celery-task-meta-x",
        "HGETALL zlora:job:x",
        "SUBSCRIBE /0.celeryev/x",
        "INFO",
    ),
}


@pytest.mark.parametrize("user", USERS)
def test_a_user_can_do_nothing_else(user: str, broker: GuardedRedis) -> None:
    with broker.client() as admin:
        flush = admin.script_load("return redis.call('FLUSHALL')")
    done = []
    with broker.client(user) as client:
        assert client.ping()
        for command in (*NOBODY, *FORBIDDEN[user]):
            try:
                client.execute_command(*command.format(flush=flush).split(" "))
            except redis.ResponseError as error:
                if "no permissions" in str(error).lower():  # those of a script have no class
                    continue
            done.append(command)

    assert done == []


def test_keda_counts_by_the_user_of_metrics(broker: GuardedRedis) -> None:
    """By a script that looks at the type of a key, as KEDA's scaler does."""
    script = """
    local kind = redis.call('TYPE', KEYS[1]).ok
    return redis.call(kind == 'hash' and 'HLEN' or 'LLEN', KEYS[1])
    """
    with broker.client("metrics") as client, broker.client() as admin:
        admin.delete("unacked")
        for key in waiting_lists("gpu"):
            assert client.eval(script, 1, key) == admin.llen(key)
        assert client.eval(script, 1, "unacked") == 0
        admin.hset("unacked", "tag", "x")
        assert client.eval(script, 1, "unacked") == 1


def test_a_script_of_metrics_cannot_write(broker: GuardedRedis) -> None:
    with (
        broker.client("metrics") as client,
        pytest.raises(redis.ResponseError, match="ACL failure in script"),
    ):
        client.eval("return redis.call('LPUSH', KEYS[1], 'x')", 1, "gpu")


def test_a_producer_can_send_no_worker_a_command_and_is_told(
    broker: GuardedRedis, watched: Watched
) -> None:
    """Its own `zlora doctor` leaves out what its user has no right to see."""
    assert watched.checks["workers"] == "ok"
    found = {
        check.name: check for check in doctor.checks({"ZLORA_BROKER_URL": broker.url("producer")})
    }

    left_out = {name for name, check in found.items() if check.status != "ok"}
    assert left_out == {"keys", "queue", "workers"}
    assert found["workers"].status == "skip"
    assert "producer has no permissions to run the 'type' command" in found["keys"].told


@pytest.mark.parametrize("user", ["producer", "operator"])
def test_a_queued_job_can_be_cancelled_without_a_worker(user: str, broker: GuardedRedis) -> None:
    with Client(broker.url(user)) as client:
        job = client.submit(request("queued"))

        assert job.cancel() is Cancellation.QUEUED
        assert job.status().state is JobState.REVOKED


def test_a_right_that_jobs_need_is_named(broker: GuardedRedis) -> None:
    """By the client and by `zlora doctor`: here the users have no rights on another queue."""
    environ = {"ZLORA_BROKER_URL": broker.url("producer"), "ZLORA_QUEUE": "other"}

    with Client.from_env(environ) as client, pytest.raises(InvalidSetting, match="lacks a right"):
        client.submit({"prompt": "x"})
    found = {check.name: check for check in doctor.checks(environ)}

    assert found["rights"].status == "fail"
    assert "zlora:ledger:other" in found["rights"].told
