"""The worker's GPU, for Prometheus, as NVIDIA's management library (NVML) sees it. Not run on a GPU so far."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Self

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class GpuCollector(Collector):
    """Memory and busy share of one GPU, of all that run on it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, device: str, environ: Mapping[str, str]) -> Self | None:
        """That of `device`, a setting such as `auto` or `cuda:1`; None where there is none, or no NVML to ask.

        CUDA numbers the devices that `CUDA_VISIBLE_DEVICES` names, NVML all of the machine: it takes the name. Without
        the variable both count alike on a machine with GPUs of one kind, or with `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
        """
        import pynvml

        if device == "cpu":
            return None
        name = _named(int(device.partition(":")[2] or 0), environ.get("CUDA_VISIBLE_DEVICES"))
        if not name:
            return None
        try:
            pynvml.nvmlInit()
            by = (
                pynvml.nvmlDeviceGetHandleByIndex
                if name.isdecimal()
                else pynvml.nvmlDeviceGetHandleByUUID
            )
            return cls(pynvml, by(int(name) if name.isdecimal() else name))
        except pynvml.NVMLError:
            return None

    def collect(self) -> Iterator[Metric]:
        """As of now; without what the driver does not tell, such as how busy a part of a GPU is."""
        with suppress(self._nvml.NVMLError):
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
            gauge = GaugeMetricFamily(
                "zlora_gpu_memory_bytes", "Bytes of the GPU's memory", labels=["kind"]
            )
            gauge.add_metric(["used"], float(memory.used))
            gauge.add_metric(["total"], float(memory.total))
            yield gauge
        with suppress(self._nvml.NVMLError):
            rates, told = (
                self._nvml.nvmlDeviceGetUtilizationRates(self._handle),
                "Share of the last second or less",
            )
            yield GaugeMetricFamily(
                "zlora_gpu_busy_ratio", f"{told} in which the GPU worked", value=rates.gpu / 100
            )

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry must not ask the driver to know the names."""
        return iter(())


def _named(number: int, visible: str | None) -> str:
    """What NVML knows the device by: the name that the variable has for it; empty where it hides the device."""
    if visible is None:
        return str(number)
    names = [name.strip() for name in visible.split(",")]
    return names[number] if number < len(names) else ""
