"""The samples of a metrics page, and what breaks the rules of Prometheus for names and units."""

import re
from typing import Final, Self

import requests
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

# All labels. None of them takes a value of a request.
LABELS: Final = {
    "outcome",
    "code",
    "phase",
    "tier",
    "le",
    "kind",
    "version",
    "model",
    "queue",
    "priority",
    "state",
}
_NAME: Final = re.compile(r"zlora(_[a-z]+)+")
_UNITS: Final = {
    "ms",
    "milliseconds",
    "minutes",
    "hours",
    "mb",
    "megabytes",
    "kb",
    "percent",
    "gauge",
    "counter",
}


class Scraped:
    """The samples of one metrics page."""

    def __init__(self, text: str) -> None:
        self.text, self.families = text, list(text_string_to_metric_families(text))
        self._values = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    @classmethod
    def at(cls, port: int) -> Self:
        """Scrape a port of loopback, with the timeout of Prometheus."""
        answer = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10)
        answer.raise_for_status()
        return cls(answer.text)

    @classmethod
    def of(cls, registry: CollectorRegistry) -> Self:
        """Return the samples of a registry."""
        return cls(generate_latest(registry).decode())

    def __call__(self, name: str, **labels: str) -> float:
        """Return the value of one sample; raise `KeyError` if there is none."""
        return self._values[name, frozenset(labels.items())]

    def named(self, name: str) -> dict[tuple[str, ...], float]:
        """Return all samples of a name by label values, in alphabetical order of the labels."""
        return {
            tuple(value for _, value in sorted(labels)): number
            for (found, labels), number in self._values.items()
            if found == name
        }

    def faults(self) -> list[str]:
        """Return what breaks the rules: https://prometheus.io/docs/practices/naming/."""
        return [fault for family in self.families for fault in _faults(family.name, family)]


def _faults(name: str, family: object) -> list[str]:
    kind, samples = family.type, family.samples  # type: ignore[attr-defined]
    found = [
        f"{sample.name}: the labels {sample.labels}"
        for sample in samples
        if not set(sample.labels) <= LABELS
    ]
    if not family.documentation:  # type: ignore[attr-defined]
        found.append(f"{name}: no help")
    if not _NAME.fullmatch(name) or _UNITS & set(name.split("_")):
        found.append(f"{name}: the name")
    if kind not in ("counter", "gauge", "histogram"):
        found.append(f"{name}: the type {kind}")
    if kind == "histogram" and not name.endswith("_seconds"):
        found.append(f"{name}: no unit")
    if any(sample.name.endswith("_total") != (kind == "counter") for sample in samples):
        found.append(f"{name}: `_total` is for counters only, and for all of them")
    return found
