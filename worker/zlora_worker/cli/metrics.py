"""`zlora metrics`: the metrics of a queue for Prometheus, without a worker."""

import logging
import time

import click
from zlora.broker.job_store import connect
from zlora.cli import signals
from zlora.config import BROKER_URL
from zlora.errors import InvalidSetting

from zlora_worker.monitoring import logs
from zlora_worker.settings import Settings


@click.command()
def metrics() -> None:
    """Serve the metrics of a queue at ZLORA_METRICS, such as 0.0.0.0:9808, until stopped."""
    # imported late: an installation for producers lacks prometheus_client, and `zlora` must start
    from prometheus_client import CollectorRegistry

    from zlora_worker.monitoring.metrics_server import listen, serve, spelled
    from zlora_worker.monitoring.queue_metrics import QueueCollector

    settings = Settings.from_env()
    if settings.metrics is None:
        raise InvalidSetting("ZLORA_METRICS: expected `host:port`", {"name": "ZLORA_METRICS"})
    try:
        client = connect(settings.broker_url)
    except ValueError as error:
        raise InvalidSetting(f"{BROKER_URL}: {error}", {"name": BROKER_URL}) from None
    logging.basicConfig(level=logging.INFO)
    logs.use(settings.log, settings.secrets, logger=logging.getLogger(), process="metrics")
    listener = listen(settings.metrics)
    registry = CollectorRegistry()
    registry.register(QueueCollector(client, settings.queue))
    serve(listener, registry)
    click.echo(f"queue {settings.queue}: http://{spelled(settings.metrics)}/metrics")
    try:
        while not signals.has_come():
            time.sleep(0.5)
    except KeyboardInterrupt:
        pass
