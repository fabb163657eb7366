"""What a worker's processes count, together and one after the other, and what never gets among it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector
from support.scraped import Scraped
from zlora import errors
from zlora.errors import InvalidRequest, JobExpired, JobRevoked, LoraUnreachable, OutOfMemory
from zlora.schema import GenerateResult, ImageRef, LoraReceipt
from zlora_worker.monitoring import metrics
from zlora_worker.monitoring.metrics import PHASES, TIERS, Meter, WorkerCollector

MARK = "a-stranger-s"


@pytest.fixture
def counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a worker's processes put their counts together, as its parent makes it."""
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "")
    folder = tmp_path / "worker" / "counts"
    folder.parent.mkdir()
    metrics.share(folder)
    yield folder
    values.close_all_multiprocess_files()  # type: ignore[no-untyped-call]


def shown(folder: Path) -> Scraped:
    """As the companion serves it."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(folder))  # type: ignore[no-untyped-call]
    return Scraped.of(registry)


def a_result(*tiers: str, images: int = 1, **timings: float) -> GenerateResult:
    """A job whose every word is a stranger's."""
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
            source=f"https://{MARK}/x", sha256=MARK, size=1000, format="peft", ranks=(4,), unet_weight=1.0,
            text_encoder_weight=1.0, modules={}, tier=tier, milliseconds={}, adapter_name=MARK,  # type: ignore[arg-type]
        )
        for tier in tiers
    )  # fmt: skip
    return GenerateResult(
        job_id=MARK, images=(image,) * images, loras=receipts, seed=1, timings={MARK: 1.0, **timings}, base_intact=True,
        model=MARK, versions={}, request_sha256=MARK,
    )  # fmt: skip


# --- what there is


def test_all_values_of_all_labels_are_there_before_the_first_count(counts: Path) -> None:
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
    assert set(scraped.named("zlora_job_phase_seconds_count")) == {(phase,) for phase in PHASES}
    for name in ("zlora_lora_files_total", "zlora_lora_bytes_total"):
        assert set(scraped.named(name)) == {(tier,) for tier in TIERS}
    assert set(scraped.named("zlora_webhooks_total")) == {("sent",), ("retried",), ("given_up",)}
    assert {sample.value for family in scraped.families for sample in family.samples} == {0.0}


def test_names_and_units_are_as_prometheus_has_them(counts: Path) -> None:
    Meter.of_process("child")

    assert shown(counts).faults() == []


# --- what is counted


def test_a_drawn_job_counts_by_phase_and_by_where_its_loras_were(counts: Path) -> None:
    meter = Meter.of_process("child")
    before = shown(counts)

    meter.drawn(a_result("network", "disk", "disk", images=2, queued=0.5, denoise=3.0, tail=7.0))
    scraped = shown(counts)

    assert (
        scraped("zlora_jobs_total", outcome="success", code="") == 0
    )  # its result is still to be told
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
    assert {phase for (phase,), count in phases.items() if count} == {"queued", "denoise"}
    assert (
        scraped.named("zlora_job_phase_seconds_count").keys()
        == before.named("zlora_job_phase_seconds_count").keys()
    )


def test_an_end_without_a_result_counts_by_its_code(counts: Path) -> None:
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


def test_what_a_stranger_chooses_is_nowhere(counts: Path) -> None:
    """And no job adds a series."""
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


def test_child_and_companion_count_together_and_a_new_child_goes_on_where_the_last_was(
    counts: Path,
) -> None:
    first, companion = Meter.of_process("child"), Meter.of_process("companion")
    first.loaded(2.0, replaces=False)
    first.succeeded()
    companion.ended(JobExpired())
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
    assert (
        len(list(counts.iterdir())) == 4
    )  # counters and histograms of two roles, however many processes there were


def test_whoever_clears_temporary_folders_costs_the_counts_and_no_job(counts: Path) -> None:
    Meter.of_process("child").stepped(5)
    shutil.rmtree(counts.parent)

    Meter.of_process("child").stepped(1)

    assert shown(counts)("zlora_denoising_steps_total") == 1


def test_nothing_is_shared_where_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)

    one, other = Meter.of_process("child"), Meter.of_process("child")
    one.stepped(3)

    assert metrics.shared_folder() == ""
    assert Scraped.of(one.registry)("zlora_denoising_steps_total") == 3
    assert Scraped.of(other.registry)("zlora_denoising_steps_total") == 0


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("owner/model", "owner/model"),
        ("https://u:s3cret@host/m.safetensors?sig=s3cret", "https://host/m.safetensors"),
    ],
)
def test_a_worker_says_what_it_serves_and_no_secret_of_an_address(model: str, told: str) -> None:
    registry = CollectorRegistry()
    registry.register(WorkerCollector(model=model, queue="gpu"))
    scraped = Scraped.of(registry)

    ((found, queue, _version),) = scraped.named("zlora_worker_info")
    assert (found, queue) == (told, "gpu")
    assert scraped.faults() == []
