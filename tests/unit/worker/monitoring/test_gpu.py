"""Metrics of the worker's GPU, by a fake NVML: the machines of the tests have no GPU."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Final

import pytest
from prometheus_client import CollectorRegistry
from support.scraped import Scraped
from zlora_worker.monitoring.gpu import GpuCollector

UUIDS: Final = ("GPU-00000000-aaaa", "GPU-11111111-bbbb", "GPU-22222222-cccc")
MIG: Final = "MIG-33333333-dddd"


class NVMLError(Exception):
    """Raised by the fake NVML."""


class Nvml:
    """A machine with three GPUs and one MIG; `failing` functions raise an error."""

    NVMLError = NVMLError

    def __init__(self) -> None:
        self.failing: set[str] = set()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        known: dict[str, Callable[..., Any]] = {
            "nvmlInit": lambda: None,
            "nvmlDeviceGetHandleByIndex": lambda number: self._found(range(len(UUIDS)), number),
            "nvmlDeviceGetHandleByUUID": lambda name: self._found((*UUIDS, MIG), name),
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(
                used=10 * (1 + handle), total=80
            ),
            "nvmlDeviceGetUtilizationRates": lambda handle: SimpleNamespace(
                gpu=25 * handle, memory=99
            ),
        }
        if name in self.failing:
            return self._fail
        return known[name]

    def _found(self, known: Any, name: object) -> int:
        if name not in known:
            raise self.NVMLError(name)
        return list(known).index(name)

    def _fail(self, *_: object) -> None:
        raise self.NVMLError("the driver does not answer")


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Nvml:
    fake = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def look(collector: GpuCollector | None) -> Scraped:
    """Scrape once."""
    registry = CollectorRegistry()
    assert collector is not None
    registry.register(collector)
    return Scraped.of(registry)


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    ("device", "visible", "number"),
    [
        ("auto", None, 0),
        ("cuda", None, 0),
        ("cuda:2", None, 2),
        ("auto", "1", 1),
        ("cuda:1", "2,0", 0),
        ("cuda:1", f"{UUIDS[0]}, {UUIDS[2]}", 2),
        ("auto", UUIDS[1], 1),
        ("auto", MIG, 3),
    ],
)
def test_the_gpu_is_the_one_that_cuda_uses(device: str, visible: str | None, number: int) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}

    scraped = look(GpuCollector.open(device, environ))

    assert scraped.named("zlora_gpu_memory_bytes") == {("used",): 10 * (1 + number), ("total",): 80}
    assert scraped("zlora_gpu_busy_ratio") == number / 4
    assert scraped.faults() == []


@pytest.mark.usefixtures("nvml")
@pytest.mark.parametrize(
    ("device", "visible"),
    [
        ("cpu", None),
        ("cuda:3", None),
        ("auto", ""),
        ("auto", "-1"),
        ("cuda:1", "0"),
        ("auto", "GPU-elsewhere"),
    ],
)
def test_without_a_visible_gpu_there_is_no_collector(device: str, visible: str | None) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}

    assert GpuCollector.open(device, environ) is None


def test_values_that_the_driver_does_not_have_are_left_out(nvml: Nvml) -> None:
    """A MIG has no load of its own, and a driver may stop answering."""
    collector = GpuCollector.open("auto", {})
    nvml.failing = {"nvmlDeviceGetUtilizationRates"}
    part = look(collector)
    nvml.failing = {"nvmlDeviceGetUtilizationRates", "nvmlDeviceGetMemoryInfo"}

    assert [family.name for family in part.families] == ["zlora_gpu_memory_bytes"]
    assert look(collector).families == []
    nvml.failing = {"nvmlInit"}
    assert GpuCollector.open("auto", {}) is None


def test_without_the_nvidia_library_there_is_no_collector(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real module, whose library cannot be loaded."""
    import pynvml

    def load(name: str, *_: object, **__: object) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(pynvml, "nvmlLib", None)
    monkeypatch.setattr(pynvml, "CDLL", load)

    assert GpuCollector.open("auto", {}) is None
