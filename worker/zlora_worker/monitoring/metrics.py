"""What a worker counts, for Prometheus: the one place of each metric's name, unit and labels.

A label's values are words of this project. What a stranger chooses (a prompt, an address, an id) is never one.
"""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Final, Self

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, values
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from zlora import errors
from zlora.errors import JobExpired, JobRevoked, ZloraError
from zlora.redaction import without_secrets
from zlora.schema import GenerateResult

PHASES: Final = ("queued", "fetch", "parse", "apply", "denoise", "restore", "encode", "upload")
TIERS: Final = ("memory", "disk", "network")

_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own variable
# Seconds: from a LoRA that is there already to the longest job of the default settings.
_BUCKETS: Final = (0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 900)
_LOAD_BUCKETS: Final = (1, 5, 10, 20, 40, 80, 160, 320, 900, 1800)


class Meter:
    """One process's counts. The label values are there from the start: a rate needs the 0 before the first 1."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._jobs = self._counter(
            "jobs", "Jobs that ended here, and those that are tried again", "outcome", "code"
        )
        self._phases = Histogram(
            "zlora_job_phase_seconds",
            "Seconds of a drawn job, by phase",
            ("phase",),
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self._files = self._counter(
            "lora_files", "LoRA files that jobs asked for, by where they were", "tier"
        )
        self._bytes = self._counter("lora_bytes", "Bytes of those files", "tier")
        self._steps = self._counter("denoising_steps", "Denoising steps, each as it is done")
        self._images = self._counter("images", "Pictures stored")
        self._loads = Histogram(
            "zlora_model_load_seconds",
            "Seconds until the base was resident",
            registry=self.registry,
            buckets=_LOAD_BUCKETS,
        )
        self._deaths = self._counter(
            "child_deaths", "Children that had the model and had to be replaced"
        )
        self._redeliveries = self._counter(
            "redeliveries", "Deliveries of jobs that had been delivered before"
        )
        self._resent = self._counter("jobs_resent", "Jobs sent again since their message was lost")
        self._webhooks = self._counter("webhooks", "Tries to tell the end of a job", "outcome")
        self._begin()

    @classmethod
    def of_process(cls, name: str) -> Self:
        """The counts of the worker's child or companion, which add to those of the one before it.

        They are kept in the folder that `share` made, by prometheus_client's multiprocess mode, under the name of the
        role and not of the process: one process at a time has it, and no file is left for each child that died.
        """
        if folder := shared_folder():
            Path(folder).mkdir(
                parents=True, exist_ok=True
            )  # whoever clears temporary folders may have come by
            # Else chosen when prometheus_client is imported, which Flower's plug-in for `celery` does before all this.
            values.ValueClass = values.MultiProcessValue(lambda: name)  # type: ignore[no-untyped-call]
        return cls()

    def succeeded(self) -> None:
        """A job ended with a result."""
        self._jobs.labels("success", "").inc()

    def drawn(self, result: GenerateResult) -> None:
        """A job was drawn, by this very delivery."""
        self._images.inc(len(result.images))
        for phase in PHASES:
            if phase in result.timings:
                self._phases.labels(phase).observe(result.timings[phase])
        for receipt in result.loras:
            self._files.labels(receipt.tier).inc()
            self._bytes.labels(receipt.tier).inc(receipt.size)

    def ended(self, error: ZloraError) -> None:
        """A job ended without a result."""
        outcome = "revoked" if isinstance(error, JobRevoked | JobExpired) else "failure"
        self._jobs.labels(outcome, error.code).inc()

    def retried(self, error: ZloraError) -> None:
        """A job is sent again for an error."""
        self._jobs.labels("retried", error.code).inc()

    def stepped(self, steps: int) -> None:
        """So many more denoising steps are done."""
        self._steps.inc(steps)

    def redelivered(self) -> None:
        """A job comes that was delivered before."""
        self._redeliveries.inc()

    def loaded(self, seconds: float, *, replaces: bool) -> None:
        """A child has the model; `replaces` says whether another had it before."""
        self._loads.observe(seconds)
        self._deaths.inc(int(replaces))

    def resent(self) -> None:
        """A lost message was sent again."""
        self._resent.inc()

    def told(self, outcome: str) -> None:
        """A webhook was `sent`, `retried` or `given_up`."""
        self._webhooks.labels(outcome).inc()

    def _counter(self, name: str, told: str, *labels: str) -> Counter:
        return Counter(f"zlora_{name}", told, labels, registry=self.registry)

    def _begin(self) -> None:
        self._jobs.labels("success", "")
        for kind in errors.ERRORS:
            if issubclass(kind, JobRevoked | JobExpired):
                self._jobs.labels("revoked", kind.code)
            elif kind.code not in ("error", "lora_error"):
                self._jobs.labels("failure", kind.code)
                if kind.retryable:
                    self._jobs.labels("retried", kind.code)
        for phase in PHASES:
            self._phases.labels(phase)
        for tier in TIERS:
            self._files.labels(tier)
            self._bytes.labels(tier)
        for outcome in ("sent", "retried", "given_up"):
            self._webhooks.labels(outcome)


class WorkerCollector(Collector):
    """What a worker is, as labels of a 1."""

    def __init__(self, *, model: str, queue: str) -> None:
        self._told = [version("z-image-lora"), without_secrets(model), queue]

    def collect(self) -> Iterator[Metric]:
        """The one metric."""
        gauge = GaugeMetricFamily(
            "zlora_worker_info", "The worker", labels=["version", "model", "queue"]
        )
        gauge.add_metric(self._told, 1.0)
        yield gauge


def share(folder: Path) -> None:
    """In the parent, before it forks: where its processes put their counts together."""
    folder.mkdir()
    os.environ[_FOLDER] = str(folder)


def shared_folder() -> str:
    """Where they do; empty where nobody asks for them."""
    return os.environ.get(_FOLDER, "")
