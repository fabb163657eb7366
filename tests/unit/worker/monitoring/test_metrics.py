"""Counts of a worker's processes, and that no value of a request is in them."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector
from support.scraped import Scraped
from zlora import errors
from zlora.errors import InvalidRequest, JobExpired, JobRevoked, LoraUnreachable, OutOfMemory
from zlora.schema import TIMED_PHASES, GenerateResult, ImageRef, LoraReceipt, LoraTier
from zlora_worker.monitoring import metrics
from zlora_worker.monitoring.metrics import TIERS, Meter, WorkerCollector

MARK = "from-a-request"


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Make the folder of the shared counters, as the parent process does."""
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    folder = tmp_path / "worker" / "counts"
    folder.parent.mkdir()
    metrics.share(folder)
    yield folder
    values.close_all_multiprocess_files()  # type: ignore[no-untyped-call]


def shown(folder: Path) -> Scraped:
    """Return the metrics that the sidecar serves."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    return Scraped.of(registry)


def a_result(*tiers: LoraTier, images: int = 1, **timings: float) -> GenerateResult:
    """Return a result in which every text is `MARK`."""
    image = ImageRef(
        key=MARK,
        url=f"https://{MARK}",
        width=8,
        height=8,
        content_type="image/png",
        size=1,
        sha256=MARK,
        seed=1,
    )
    receipts = tuple(
        LoraReceipt(
            source=f"https://{MARK}/x",
            sha256=MARK,
            size=1000,
            format="peft",
            ranks=(4,),
            unet_weight=1.0,
            text_encoder_weight=1.0,
            modules={},
            tier=tier,
            milliseconds={},
            adapter_name=MARK,
        )
        for tier in tiers
    )
    return GenerateResult(
        job_id=MARK,
        images=(image,) * images,
        loras=receipts,
        seed=1,
        timings={MARK: 1.0, **timings},
        base_intact=True,
        model=MARK,
        versions={},
        request_sha256=MARK,
    )


# --- what there is


def test_all_label_values_exist_before_the_first_count(counts: Path) -> None:
    Meter.of_process("child")
    scraped = shown(counts)

    kinds = [cls for cls in errors.ERRORS if cls.code not in ("error", "lora_error")]
    codes = {cls.code for cls in kinds}
    revoked = {"job_revoked", "expired"}
    assert set(scraped.named("zlora_jobs_total")) == {
        ("", "success"),
        *((code, "revoked") for code in revoked),
        *((code, "failure") for code in codes - revoked),
        *((cls.code, "retried") for cls in kinds if cls.retryable),
    }
    assert set(scraped.named("zlora_job_phase_seconds_count")) == {
        (phase,) for phase in TIMED_PHASES
    }
    for name in ("zlora_lora_files_total", "zlora_lora_bytes_total"):
        assert set(scraped.named(name)) == {(tier,) for tier in TIERS}
    assert set(scraped.named("zlora_model_change_seconds_count")) == {("memory",), ("disk",)}
    assert set(scraped.named("zlora_webhooks_total")) == {("sent",), ("retried",), ("given_up",)}
    assert {sample.value for family in scraped.families for sample in family.samples} == {0.0}


def test_names_and_units_follow_the_rules_of_prometheus(counts: Path) -> None:
    Meter.of_process("child")

    assert shown(counts).faults() == []


# --- what is counted


def test_a_generated_job_counts_its_images_phases_and_loras(counts: Path) -> None:
    meter = Meter.of_process("child")
    before = shown(counts)

    meter.drawn(a_result("network", "disk", "disk", images=2, queued=0.5, denoise=3.0, tail=7.0))
    scraped = shown(counts)

    # a success is counted later, when its result is stored
    assert scraped("zlora_jobs_total", outcome="success", code="") == 0
    assert scraped("zlora_images_total") == 2
    assert scraped.named("zlora_lora_files_total") == {
        ("memory",): 0,
        ("disk",): 2,
        ("network",): 1,
    }
    assert scraped.named("zlora_lora_bytes_total") == {
        ("memory",): 0,
        ("disk",): 2000,
        ("network",): 1000,
    }
    assert scraped("zlora_job_phase_seconds_sum", phase="denoise") == 3
    assert scraped("zlora_job_phase_seconds_bucket", phase="denoise", le="2.5") == 0
    assert scraped("zlora_job_phase_seconds_bucket", phase="denoise", le="5.0") == 1
    phases = scraped.named("zlora_job_phase_seconds_count")
    assert {phase for (phase,), count in phases.items() if count} == {"queued", "denoise", "tail"}
    assert phases.keys() == before.named("zlora_job_phase_seconds_count").keys()


def test_a_job_without_a_result_counts_by_its_code(counts: Path) -> None:
    meter = Meter.of_process("child")

    for error in (
        OutOfMemory(MARK),
        JobRevoked(MARK),
        JobExpired(MARK),
        InvalidRequest(MARK, {"path": MARK}),
    ):
        meter.ended(error)
    meter.retried(LoraUnreachable(MARK))

    jobs = shown(counts).named("zlora_jobs_total")
    assert {labels: count for labels, count in jobs.items() if count} == {
        ("out_of_memory", "failure"): 1,
        ("job_revoked", "revoked"): 1,
        ("expired", "revoked"): 1,
        ("invalid_request", "failure"): 1,
        ("lora_unreachable", "retried"): 1,
    }


def test_no_value_of_a_request_is_in_the_metrics(counts: Path) -> None:
    """No job adds a series either."""
    meter = Meter.of_process("child")
    before = [sample.labels for family in shown(counts).families for sample in family.samples]

    meter.drawn(a_result(*TIERS, denoise=1.0))
    for kind in errors.ERRORS:
        if kind.code not in ("error", "lora_error"):
            meter.ended(kind(MARK, {"code": MARK, "path": MARK}))

    after = shown(counts)
    assert MARK not in after.text
    assert [sample.labels for family in after.families for sample in family.samples] == before


# --- processes


def test_child_and_sidecar_count_together_and_a_new_child_continues(
    counts: Path,
) -> None:
    first, sidecar = Meter.of_process("child"), Meter.of_process("sidecar")
    first.loaded(2.0, replaces=False)
    first.succeeded()
    sidecar.ended(JobExpired())
    second = Meter.of_process("child")
    second.loaded(3.0, replaces=True)
    second.succeeded()
    second.ended(JobExpired())

    scraped = shown(counts)
    assert scraped("zlora_jobs_total", outcome="success", code="") == 2
    assert scraped("zlora_jobs_total", outcome="revoked", code="expired") == 2
    assert scraped("zlora_model_load_seconds_count") == 2
    assert scraped("zlora_model_load_seconds_sum") == 5
    assert scraped("zlora_child_deaths_total") == 1
    # files of counters and histograms for two roles, not for three processes
    assert len(list(counts.iterdir())) == 4


def test_a_removed_folder_loses_the_counts_and_no_job(counts: Path) -> None:
    Meter.of_process("child").stepped(5)
    shutil.rmtree(counts.parent)

    Meter.of_process("child").stepped(1)

    assert shown(counts)("zlora_denoising_steps_total") == 1


def test_without_the_folder_each_meter_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)

    one, other = Meter.of_process("child"), Meter.of_process("child")
    one.stepped(3)

    assert metrics.shared_folder() == ""
    assert Scraped.of(one.registry)("zlora_denoising_steps_total") == 3
    assert Scraped.of(other.registry)("zlora_denoising_steps_total") == 0


@pytest.mark.parametrize(
    ("model", "label"),
    [
        ("owner/model", "owner/model"),
        ("https://u:s3cret@host/m.safetensors?sig=s3cret", "https://host/m.safetensors"),
    ],
)
def test_the_worker_info_has_the_model_without_secrets(model: str, label: str) -> None:
    registry = CollectorRegistry()
    registry.register(WorkerCollector(model=model, queue="gpu"))
    scraped = Scraped.of(registry)

    ((found, queue, _version),) = scraped.named("zlora_worker_info")
    assert (found, queue) == (label, "gpu")
    assert scraped.faults() == []
