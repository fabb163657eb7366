"""Counters of a worker's processes for Prometheus; the metrics of queues and GPUs are beside it.

Label values are words of this project, never values of a request (prompt, address, id).
"""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Final, Self, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, values
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector
from zlora import errors
from zlora.errors import JobExpired, JobRevoked, ZloraError
from zlora.redaction import without_secrets
from zlora.schema import TIMED_PHASES, GenerateResult, LoraTier

TIERS: Final = get_args(LoraTier)

_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own variable
# Seconds: from a LoRA in memory to the longest job of the default settings.
_BUCKETS: Final = (0.005, 0.02, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 900)
_LOAD_BUCKETS: Final = (1, 5, 10, 20, 40, 80, 160, 320, 900, 1800)
_CHANGE_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320)
_MODEL_TIERS: Final = ("memory", "disk")
_WEBHOOK_OUTCOMES: Final = ("sent", "retried", "given_up")


class Meter:
    """The counts of one process.

    All label values exist with 0 from the start: Prometheus computes a rate from the step 0 to 1.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._jobs = self._counter(
            "jobs", "Jobs that ended, and deliveries that are tried again", "outcome", "code"
        )
        self._phases = Histogram(
            "zlora_job_phase_seconds",
            "Seconds of a generated job by phase",
            ("phase",),
            registry=self.registry,
            buckets=_BUCKETS,
        )
        self._files = self._counter(
            "lora_files", "LoRA files of jobs, by where the file was found", "tier"
        )
        self._bytes = self._counter("lora_bytes", "Bytes of LoRA files of jobs", "tier")
        self._steps = self._counter("denoising_steps", "Denoising steps")
        self._images = self._counter("images", "Images stored")
        self._loads = Histogram(
            "zlora_model_load_seconds",
            "Seconds to load the base model",
            registry=self.registry,
            buckets=_LOAD_BUCKETS,
        )
        self._changes = Histogram(
            "zlora_model_change_seconds",
            "Seconds to change the base model, by where it was found",
            ("tier",),
            registry=self.registry,
            buckets=_CHANGE_BUCKETS,
        )
        self._deaths = self._counter(
            "child_deaths", "Child processes with a loaded model that were replaced"
        )
        self._redeliveries = self._counter(
            "redeliveries", "Deliveries of jobs that had been delivered before"
        )
        self._resent = self._counter(
            "jobs_resent", "Jobs sent again because their message was lost"
        )
        self._webhooks = self._counter("webhooks", "Attempts to send a webhook", "outcome")

        # all label values
        self._jobs.labels("success", "")
        for kind in errors.ERRORS:
            if issubclass(kind, JobRevoked | JobExpired):
                self._jobs.labels("revoked", kind.code)
            elif kind.code not in ("error", "lora_error"):  # base classes, never raised
                self._jobs.labels("failure", kind.code)
                if kind.retryable:
                    self._jobs.labels("retried", kind.code)
        for phase in TIMED_PHASES:
            self._phases.labels(phase)
        for tier in TIERS:
            self._files.labels(tier)
            self._bytes.labels(tier)
        for tier in _MODEL_TIERS:
            self._changes.labels(tier)
        for outcome in _WEBHOOK_OUTCOMES:
            self._webhooks.labels(outcome)

    @classmethod
    def of_process(cls, name: str) -> Self:
        """Return the counts of the worker's `child` or `sidecar`, which continue its predecessor's.

        prometheus_client's multiprocess mode keeps the counts in the folder that `share` made. The
        files have the name of the role, not of the process: one process at a time has the role, and
        no files accumulate.
        """
        if folder := shared_folder():
            # Programs that clean temporary folders may have removed the folder.
            Path(folder).mkdir(parents=True, exist_ok=True)
            # prometheus_client chose its class at import, possibly before the variable was set:
            # Flower's plug-in for the `celery` command imports the library early.
            values.ValueClass = values.MultiProcessValue(lambda: name)  # type: ignore[no-untyped-call]
        return cls()

    def succeeded(self) -> None:
        """Count a job that ended with a result."""
        self._jobs.labels("success", "").inc()

    def drawn(self, result: GenerateResult) -> None:
        """Count images, phases and LoRAs of a job that this delivery generated."""
        self._images.inc(len(result.images))
        for phase in TIMED_PHASES:
            if phase in result.timings:
                self._phases.labels(phase).observe(result.timings[phase])
        for receipt in result.loras:
            if not receipt.is_used:
                continue
            self._files.labels(receipt.tier).inc()
            self._bytes.labels(receipt.tier).inc(receipt.size)

    def ended(self, error: ZloraError) -> None:
        """Count a job that ended without a result."""
        outcome = "revoked" if isinstance(error, JobRevoked | JobExpired) else "failure"
        self._jobs.labels(outcome, error.code).inc()

    def retried(self, error: ZloraError) -> None:
        """Count a job that is sent again after an error."""
        self._jobs.labels("retried", error.code).inc()

    def stepped(self, steps: int) -> None:
        """Count denoising steps."""
        self._steps.inc(steps)

    def redelivered(self) -> None:
        """Count a delivery of a job that was delivered before."""
        self._redeliveries.inc()

    def loaded(self, seconds: float, *, replaces: bool) -> None:
        """Count a loaded model; `replaces` says whether an earlier child process had one."""
        self._loads.observe(seconds)
        self._deaths.inc(int(replaces))

    def model_changed(self, tier: str, seconds: float) -> None:
        """Count a change of the base model, whose copy was in `memory` or was read from `disk`."""
        self._changes.labels(tier).observe(seconds)

    def resent(self) -> None:
        """Count a job that was sent again because its message was lost."""
        self._resent.inc()

    def webhook(self, outcome: str) -> None:
        """Count an attempt to send a webhook: `sent`, `retried` or `given_up`."""
        self._webhooks.labels(outcome).inc()

    def _counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(f"zlora_{name}", help_text, labels, registry=self.registry)


class WorkerCollector(Collector):
    """Version, model and queue of a worker, as labels of a constant 1."""

    def __init__(self, *, model: str, queue: str) -> None:
        self._values = [version("z-image-lora"), without_secrets(model), queue]

    def collect(self) -> Iterator[Metric]:
        """Return the one metric."""
        labels = ["version", "model", "queue"]
        gauge = GaugeMetricFamily(
            "zlora_worker_info", "Version, model and queue of the worker", labels=labels
        )
        gauge.add_metric(self._values, 1.0)
        yield gauge


def share(folder: Path) -> None:
    """Make the folder of the shared counters; the parent calls this before it forks."""
    folder.mkdir()
    os.environ[_FOLDER] = str(folder)


def shared_folder() -> str:
    """Return the folder of the shared counters; empty if metrics are off."""
    return os.environ.get(_FOLDER, "")
