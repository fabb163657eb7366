"""Sentinel promotes a replica: worker, clients, sidecar, commands and Flower follow it."""

import asyncio
import gc
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, Final, NamedTuple

import pytest
import zlora.cli.doctor
from flower.utils.broker import Broker  # type: ignore[import-untyped]
from prometheus_client import CollectorRegistry, generate_latest
from support.figures import Tally
from support.processes import wait_until
from support.scene import CLEAN, Scene
from support.sentinel import sentinel
from support.valkey import Valkey
from zlora import AsyncClient
from zlora.broker.celery_app import IsolatedCelery, shared_config
from zlora.broker.job_store import connect
from zlora_worker.monitoring.queue_metrics import QueueCollector

TOOLS: Final = {"worker", "doctor", "metrics", "Flower"}


class Cluster(NamedTuple):
    """A primary, and what a program needs to know of it."""

    primary: Valkey
    url: str
    scene: Scene


@pytest.fixture
def cluster(tmp_path_factory: pytest.TempPathFactory, tally: Tally) -> Iterator[Cluster]:
    """Run a primary with a password, its replica, and their Sentinel."""
    folder = tmp_path_factory.mktemp("sentinel")
    with ExitStack() as stack:
        servers = []
        for name in ("a", "b"):
            (folder / name).mkdir()
            servers.append(stack.enter_context(Valkey(folder / name, tally)))
        primary, replica = servers
        replica.follow(primary.port)
        url = stack.enter_context(sentinel(folder, primary, replica))
        scene = Scene(folder / "scene", tally, broker_url=url, queue="sentinel")
        stack.callback(scene.close)
        yield Cluster(primary, url, scene)
        assert scene.audit() == CLEAN


def test_everything_follows_the_primary(cluster: Cluster) -> None:
    """The first address in the URL is that of a Sentinel which is gone."""
    scene = cluster.scene
    with scene.worker() as worker, ThreadPoolExecutor() as pool:
        assert found_by_tools(cluster) == TOOLS
        running = scene.submit(steps=20, step=0.1)
        waiting = [pool.submit(running.result, 60), pool.submit(awaited, cluster.url, running.id)]
        scene.wait_step(running)

        cluster.primary.kill()

        assert all(wait.result().base_intact for wait in waiting)
        assert scene.submit().result(timeout=60).base_intact
        assert worker.process.poll() is None
        wait_until(lambda: found_by_tools(cluster) == TOOLS, "the tools find the new primary")


def awaited(url: str, job_id: str) -> Any:
    """Wait for a job by the asynchronous client."""

    async def wait() -> Any:
        async with AsyncClient.from_url(url, queue="sentinel") as client:
            return await client.job(job_id).result(60)

    return asyncio.run(wait())


def found_by_tools(cluster: Cluster) -> set[str]:
    """Return the tools that find the primary."""
    url, queue = cluster.url, cluster.scene.queue
    found = set()
    checks = {check.name: check.status for check in zlora.cli.doctor.checks(cluster.scene.environ)}
    if checks["broker"] == checks["keys"] == "ok":
        found.add("doctor")
    if checks["workers"] == "ok":
        found.add("worker")
    registry = CollectorRegistry()
    registry.register(QueueCollector(connect(url), queue))
    if b'zlora_queue_up{queue="sentinel"} 1.0' in generate_latest(registry):
        found.add("metrics")
    if length_by_flower(url, queue) == 0:
        found.add("Flower")
    return found


def length_by_flower(url: str, queue: str) -> int:
    """Return the length of a queue as Flower finds it."""
    options = shared_config(broker_url=url, result_backend=url, queue=queue)
    with IsolatedCelery("flower", options) as app, warnings.catch_warnings():
        # Flower asks one Sentinel only, the first; here it is the one that is not gone.
        *_, address = str(app.conf.broker_url).split(";")
        broker = Broker(address, broker_options=app.conf.broker_transport_options)
        (found,) = asyncio.run(broker.queues([queue]))
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its connections open
        del broker
        gc.collect()
    return int(found["messages"])
