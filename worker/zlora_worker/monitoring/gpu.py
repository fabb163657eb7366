"""Metrics of the worker's GPU, by NVIDIA's management library (NVML)."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Self

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class GpuCollector(Collector):
    """Memory and load of one GPU, by all programs that use it."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    @classmethod
    def open(cls, device: str, environ: Mapping[str, str]) -> Self | None:
        """Return the collector of `device` (`auto`, `cuda:1`), or None without a GPU or NVML.

        CUDA numbers the devices in `CUDA_VISIBLE_DEVICES`; NVML numbers all devices of the machine,
        so that a device is found by its name in that variable. Without the variable both numbers
        are the same if all GPUs are of one kind, or with `CUDA_DEVICE_ORDER=PCI_BUS_ID`.
        """
        import pynvml

        if device == "cpu":
            return None
        number = int(device.partition(":")[2] or 0)
        name = str(number)
        if (visible := environ.get("CUDA_VISIBLE_DEVICES")) is not None:
            names = [one.strip() for one in visible.split(",")]
            if number >= len(names) or not names[number]:
                return None
            name = names[number]
        try:
            pynvml.nvmlInit()
            if name.isdecimal():
                return cls(pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(name)))
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(name))
        except pynvml.NVMLError:
            return None

    def collect(self) -> Iterator[Metric]:
        """Read the values; leave out what the driver does not know, such as the load of a MIG."""
        with suppress(self._nvml.NVMLError):
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._handle)
            gauge = GaugeMetricFamily("zlora_gpu_memory_bytes", "GPU memory", labels=["kind"])
            gauge.add_metric(["used"], float(memory.used))
            gauge.add_metric(["total"], float(memory.total))
            yield gauge
        with suppress(self._nvml.NVMLError):
            rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
            yield GaugeMetricFamily(
                "zlora_gpu_busy_ratio",
                "Share of the last second or less in which the GPU was busy",
                value=rates.gpu / 100,
            )

    def describe(self) -> Iterator[Metric]:
        """Return nothing, so that registering does not read the driver."""
        return iter(())
