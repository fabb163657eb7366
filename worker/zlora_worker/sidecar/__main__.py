"""The sidecar of a worker: `python -m zlora_worker.sidecar`, started and watched by the worker.

Several sidecars may serve one queue. The process imports no torch.
"""

import logging
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import kombu.exceptions
import redis
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from zlora.broker.celery_app import IsolatedCelery, impatient_config
from zlora.broker.job_store import JobStore, connect

from zlora_worker.delivery.lease import JobLeases
from zlora_worker.monitoring import logs
from zlora_worker.monitoring.gpu import GpuCollector
from zlora_worker.monitoring.metrics import Meter, WorkerCollector, shared_folder
from zlora_worker.monitoring.metrics_server import serve
from zlora_worker.monitoring.queue_metrics import QueueCollector
from zlora_worker.results.spool import Spool
from zlora_worker.results.store import open_store
from zlora_worker.results.urls import ImageUrls
from zlora_worker.settings import Settings
from zlora_worker.sidecar import client_requests, prefetch, webhooks
from zlora_worker.sidecar.finisher import Finisher, Resources
from zlora_worker.sidecar.heartbeat import Heartbeat
from zlora_worker.sidecar.queue_watch import QueueWatch
from zlora_worker.sidecar.sweeper import Sweeper

_INFO_EVERY: Final = 60.0  # seconds between two renewals of what the queue serves
_REDIS_PAUSE: Final = 2.0  # seconds until the next attempt if Redis does not answer

logger = logging.getLogger("zlora_worker.sidecar")


@dataclass(frozen=True)
class Links:
    """What a sidecar shares with its worker: folders and pipes of the spool, pipe of the heartbeat.

    `metrics` is the listening socket of the metrics.
    """

    memory: Path
    disk: Path
    heartbeat: int
    from_child: int
    to_parent: int
    metrics: socket.socket | None = None

    def wake_parent(self) -> None:
        """Let the parent look at the spool."""
        with suppress(BlockingIOError):  # a full pipe wakes, too
            os.write(self.to_parent, b".")


def run(settings: Settings, links: Links | None) -> None:
    """Do the sidecar's work until the process ends; without links, that of no worker."""
    heartbeat = Heartbeat(links.heartbeat if links else None)
    heartbeat.start()
    # Every step of the loop below is shorter: a call of Redis or of the store.
    beat = heartbeat.part("the main thread", seconds=2 * settings.sidecar_timeout)
    meter = Meter.of_process("sidecar")
    store = open_store(settings)
    urls = ImageUrls(store, settings)
    jobs = JobStore(connect(settings.broker_url), settings.queue)
    config = impatient_config(
        broker_url=settings.broker_url, result_backend=settings.result_backend, queue=settings.queue
    )
    app = IsolatedCelery("zlora_sidecar", config | {"zlora_prompts": settings.prompts})

    # metrics of the worker's processes, its GPU and its queue
    if links is not None and links.metrics is not None:
        serve_metrics(settings, links.metrics)
    # jobs that the child has drawn
    spool = None
    if links is not None:
        spool = Spool(links.memory, links.disk, max_bytes=settings.spool_bytes)
        leases = JobLeases(
            settings.broker_url, settings.queue, result_backend=settings.result_backend
        )
        finisher = Finisher(
            spool,
            Resources(leases=leases, store=store, urls=urls, backend=app.backend, meter=meter),
            wake_parent=links.wake_parent,
        )
        finisher.start(links.from_child, heartbeat, timeout=2 * settings.sidecar_timeout)
    watch = QueueWatch(settings.broker_url)
    # LoRAs of the next jobs into the disk cache
    prefetch.start(settings, spool, heartbeat, watch)
    # webhooks of finished jobs
    webhooks.start(settings, webhooks.JobEnds(store, urls, app.backend), meter, heartbeat, watch)
    watch.start(heartbeat, seconds=2 * settings.sidecar_timeout)
    # lost and expired jobs, and requests of clients
    sweeper = Sweeper(jobs, app, store, meter, every=settings.sweep, beat=beat)
    shown: bytes | None = None
    next_info = 0.0
    while True:
        beat()
        try:
            client_requests.reply_to_next(jobs, store, urls, app.backend, timeout=1.0)
            sweeper.sweep()
            # what the queue serves
            info = spool.queue_info() if spool is not None else None
            if info is not None and (info != shown or time.monotonic() >= next_info):
                write = jobs.put_queue_info if info != shown else jobs.renew_queue_info
                shown, next_info = info, time.monotonic() + _INFO_EVERY
                with suppress(redis.ResponseError):  # such as a full Redis: jobs do not need it
                    write(info)
        except (redis.RedisError, kombu.exceptions.OperationalError) as error:
            watch.reconnect()
            logger.warning("Redis does not answer; trying again in %.0f s: %s", _REDIS_PAUSE, error)
            time.sleep(_REDIS_PAUSE)


def serve_metrics(settings: Settings, listener: socket.socket) -> None:
    """Serve the metrics of this worker in threads until the process ends."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, shared_folder())  # type: ignore[no-untyped-call]
    registry.register(WorkerCollector(model=settings.model, queue=settings.queue))
    registry.register(QueueCollector(connect(settings.broker_url), settings.queue))
    if (gpu := GpuCollector.open(settings.device, os.environ)) is not None:
        registry.register(gpu)
    serve(listener, registry)


def main(*arguments: str) -> None:
    """Start the sidecar of a worker, which gives the fields of `Links`, or of none.

    The worker keeps the socket of the metrics, so that a restarted sidecar has the same address.
    """
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s: %(levelname)s/sidecar] %(message)s"
    )
    settings = Settings.from_env()
    logs.use(settings.log, settings.secrets, logger=logging.getLogger(), process="sidecar")
    links = None
    if arguments:
        memory, disk, *numbers = arguments
        heartbeat, from_child, to_parent, *metrics = map(int, numbers)
        sockets = [socket.socket(fileno=number) for number in metrics]
        links = Links(Path(memory), Path(disk), heartbeat, from_child, to_parent, *sockets)
    try:
        run(settings, links)
    except KeyboardInterrupt:
        pass
    except Exception:  # process boundary: Python's own traceback would be neither JSON nor redacted
        logger.exception("the sidecar has ended by an error")
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
