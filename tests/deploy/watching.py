"""Check the alert rules and the dashboard.

`python -P tests/deploy/watching.py` checks the files with promtool, which must be installed.
`unanswered` and `missing_counters` need a Prometheus that scrapes a worker.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from itertools import chain, combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import click
import requests
import yaml
from zlora import errors
from zlora.server import metrics as http
from zlora_worker.monitoring.gpu import GpuCollector
from zlora_worker.monitoring.metrics import Meter, WorkerCollector
from zlora_worker.monitoring.queue_metrics import GAUGES

ROOT: Final = Path(__file__).resolve().parents[2]
RULES: Final = ROOT / "deploy/prometheus/rules.yml"
RULES_TEST: Final = ROOT / "deploy/prometheus/rules_test.yml"
CONFIG: Final = ROOT / "deploy/prometheus/prometheus.yml"
DASHBOARD: Final = ROOT / "deploy/grafana/dashboards/z-image-lora.json"
PAGE: Final = ROOT / "docs/operations.md"

# Values of Grafana's variables: four scrapes, the selected time, all queues and workers.
VARIABLES: Final = {"__rate_interval": "1m", "__range": "3h", "queue": ".+", "instance": ".+"}

# Panels that may be empty, and when.
MAY_BE_EMPTY: Final = {
    "Failures by code": "no job has failed",
    "Changes of the base model in the time shown": "there is one base model",
    "GPU memory": "there is no NVIDIA GPU",
    "GPU busy": "there is no NVIDIA GPU",
    "Alerts": "no alert fires",
}

_SUMS: Final = {
    "zlora:jobs:increase30m": "zlora_jobs_total"
}  # rules with all labels of their counter
_SELECTOR: Final = re.compile(r"\b(zlora[_:][a-z0-9_:]+)(?:\{([^}]*)\})?")
_MATCHER: Final = re.compile(r'(\w+)\s*=~?\s*"([^"]*)"')
_HISTOGRAM: Final = re.compile(r"_(bucket|sum|count)$")
_WIDTH: Final = 24  # columns of Grafana's grid
_SCREEN: Final = 28  # rows of Grafana's grid on a screen of 1080 lines
_SECONDS: Final = 10  # for an answer of Prometheus

Query = tuple[str, str]  # a panel's title, and PromQL


class RefusedQueryError(Exception):
    """Prometheus refuses the query; the message is Prometheus' own."""


def known_metrics() -> Mapping[str, tuple[str, ...]]:
    """Return all metrics with their labels; histograms without suffixes such as `_bucket`."""
    amount = SimpleNamespace(used=0, total=0, gpu=0)
    nvml = SimpleNamespace(
        NVMLError=OSError,
        nvmlDeviceGetMemoryInfo=lambda _: amount,
        nvmlDeviceGetUtilizationRates=lambda _: amount,
    )
    served = [Meter().registry, WorkerCollector(model="", queue=""), GpuCollector(nvml, None)]
    found = {name: ("queue", *labels) for name, (_, *labels) in GAUGES.items()}
    for metric in (http.REQUESTS, http.SECONDS, http.OPEN, http.STREAMS):  # no series yet
        (family,) = metric.describe()
        found[f"{family.name}_total" if family.type == "counter" else family.name] = tuple(
            metric._labelnames
        )
    for family in chain.from_iterable(one.collect() for one in served):
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = tuple(label for label in family.samples[0].labels if label != "le")
    return found


def panels(dashboard: Path) -> list[dict[str, Any]]:
    """Return the panels of the dashboard."""
    found: list[dict[str, Any]] = json.loads(dashboard.read_text())["panels"]
    return found


def queries(dashboard: Path, variables: Mapping[str, str]) -> list[Query]:
    """Return the panels' queries with variables filled in; raise `KeyError` for unknown ones."""

    def filled(expr: str) -> str:
        return re.sub(r"\$(\w+)", lambda name: variables[name[1]], expr)

    return [
        (panel["title"], filled(target["expr"]))
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def choices(dashboard: Path) -> list[Query]:
    """Return the dashboard's variables, each with its query in Grafana's language."""
    variables = json.loads(dashboard.read_text())["templating"]["list"]
    return [
        (variable["name"], variable["query"]["query"])
        for variable in variables
        if variable["type"] == "query"
    ]


def rules(path: Path) -> list[dict[str, Any]]:
    """Return the rules of all groups of a rule file."""
    return [rule for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def alerts(path: Path) -> dict[str, dict[str, Any]]:
    """Return the alerts of a rule file by name."""
    return {rule["alert"]: rule for rule in rules(path) if "alert" in rule}


def query(prometheus_url: str, expr: str) -> list[dict[str, Any]]:
    """Return the series of a query, each with `metric` and `value`; raise `RefusedQueryError`."""
    answer = requests.post(
        f"{prometheus_url}/api/v1/query", data={"query": expr}, timeout=_SECONDS
    ).json()
    if answer["status"] != "success":
        raise RefusedQueryError(answer["error"])
    result = answer["data"]["result"]
    return result if answer["data"]["resultType"] == "vector" else [{"metric": {}, "value": result}]


def unanswered(
    prometheus_url: str,
    dashboard: Path = DASHBOARD,
    variables: Mapping[str, str] = VARIABLES,
    *,
    may_be_empty: Mapping[str, str] = MAY_BE_EMPTY,
) -> list[str]:
    """Return the panels' queries that Prometheus refuses, or answers without a number."""
    found = []
    for title, expr in queries(dashboard, variables):
        try:
            numbers = [
                series for series in query(prometheus_url, expr) if series["value"][1] != "NaN"
            ]
        except RefusedQueryError as error:
            found.append(f"{title}: {error}: {expr}")
        else:
            if not numbers and title not in may_be_empty:
                found.append(f"{title}: no number for {expr}")
    return found


def missing_counters(prometheus_url: str, path: Path = RULES) -> list[str]:
    """Return counters of the rules that do not exist: increase() would miss their first 1."""
    return [selector for selector in counted(path) if not query(prometheus_url, selector)]


def counted(path: Path) -> list[str]:
    """Return a selector for each counter in the rules, with one value for each label."""
    found = set()
    for rule in rules(path):
        for name, labels in _selectors(rule["expr"]):
            counter = _SUMS.get(name, name)
            if counter.endswith("_total"):
                values = [
                    [f'{label}="{value}"' for value in text.split("|")]
                    for label, text in labels.items()
                ]
                found |= {f"{counter}{{{', '.join(matchers)}}}" for matchers in product(*values)}
    return sorted(found)


def foreign_words(exprs: list[Query], recorded: set[str]) -> Iterator[str]:
    """Return unknown metrics, labels and error codes in queries."""
    known, codes = known_metrics(), {cls.code for cls in errors.ERRORS}
    for where, expr in exprs:
        for name, labels in _selectors(expr):
            metric = name if name in known else _HISTOGRAM.sub("", name)
            if name not in recorded and metric not in known:
                yield f"{where}: there is no {name}"
            elif metric in known and (wrong := set(labels) - {*known[metric], "job", "instance"}):
                yield f"{where}: {metric} has no label {', '.join(sorted(wrong))}"
            yield from (f"{where}: no error has the code {code}" for code in _codes(labels) - codes)


def _selectors(expr: str) -> Iterator[tuple[str, dict[str, str]]]:
    for name, matchers in _SELECTOR.findall(expr):
        yield name, dict(_MATCHER.findall(matchers))


def _codes(labels: Mapping[str, str]) -> set[str]:
    return set(filter(None, labels.get("code", "").split("|")))


def misplaced(dashboard: Path) -> Iterator[str]:
    """Return panels that overlap, leave the screen, share an id, or lack a text or unit."""
    found = panels(dashboard)
    for panel in found:
        place = panel["gridPos"]
        if place["x"] + place["w"] > _WIDTH or place["y"] + place["h"] > _SCREEN:
            yield f"{panel['title']}: outside of the screen"
        if not (panel["description"] and panel["fieldConfig"]["defaults"].get("unit")):
            yield f"{panel['title']}: no description, or no unit"
        if any(
            target["legendFormat"] == "__auto" and target["range"] for target in panel["targets"]
        ):
            yield f"{panel['title']}: a series without a legend"
    for one, other in combinations(found, 2):
        if _overlap(one["gridPos"], other["gridPos"]):
            yield f"{one['title']} and {other['title']}: overlap"
        if one["id"] == other["id"] or one["title"] == other["title"]:
            yield f"{one['title']} and {other['title']}: the same id or title"


def _overlap(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    return all(
        one[start] < other[start] + other[size] and other[start] < one[start] + one[size]
        for start, size in (("x", "w"), ("y", "h"))
    )


def unfinished(path: Path, tests: Path, page: Path) -> Iterator[str]:
    """Return alerts without texts, without cases, or missing in the operator's documentation."""
    cases = yaml.safe_load(tests.read_text())["tests"]
    firing, text = set(_firing(cases)), page.read_text()
    for name, alert in alerts(path).items():
        if alert["labels"]["severity"] not in ("critical", "warning"):
            yield f"{name}: its severity is neither critical nor warning"
        if set(alert["annotations"]) != {"summary", "description", "runbook"}:
            yield f"{name}: its annotations are not summary, description and runbook"
        if name not in firing:
            yield f"{name}: no case in which it fires"
        if not any(case["name"].startswith(f"{name} quiet") for case in cases):
            yield f"{name}: no case in which it does not fire"
        if f"`{name}`" not in text:
            yield f"{name}: not in {page.name}"


def _firing(cases: list[dict[str, Any]]) -> Iterator[str]:
    for case in cases:
        yield from (
            test["alertname"] for test in case.get("alert_rule_test", ()) if test["exp_alerts"]
        )
        for test in case.get("promql_expr_test", ()):
            for sample in test["exp_samples"]:
                yield from re.findall(r'alertname="(\w+)"', sample["labels"])


def promtool(*words: str) -> list[str]:
    """Return the problems that promtool finds."""
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, check=False)
    return [] if done.returncode == 0 else (done.stdout + done.stderr).strip().splitlines()


def unparsed(exprs: list[Query]) -> list[str]:
    """Return queries that promtool cannot parse, each as a recording rule."""
    names = [{"record": f"panel:{number}", "expr": expr} for number, (_, expr) in enumerate(exprs)]
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as file:
        yaml.safe_dump({"groups": [{"name": "dashboard", "rules": names}]}, file)
        file.flush()
        return promtool("check", "rules", "--lint=none", file.name)


def problems(page: Path = PAGE) -> dict[str, list[str]]:
    """Return the problems of all files by check."""
    panel_queries = queries(DASHBOARD, VARIABLES)
    rule_queries = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules(RULES)]
    recorded = {rule["record"] for rule in rules(RULES) if "record" in rule}
    return {
        "promtool check config": promtool("check", "config", "--syntax-only", str(CONFIG)),
        "promtool check rules": promtool(
            "check", "rules", "--lint=all", "--lint-fatal", str(RULES)
        ),
        "promtool test rules": promtool("test", "rules", str(RULES_TEST)),
        "every alert tested and described": list(unfinished(RULES, RULES_TEST, page)),
        "the dashboard's queries are PromQL": unparsed(panel_queries),
        "the dashboard's panels do not overlap": list(misplaced(DASHBOARD)),
        "metrics, labels and codes exist": list(
            foreign_words([*panel_queries, *choices(DASHBOARD), *rule_queries], recorded)
        ),
    }


def main() -> int:
    """Print each check; return 1 if one found a problem."""
    found = problems()
    for check, lines in found.items():
        click.echo("\n    ".join([f"{check}: {'FAILED' if lines else 'ok'}", *lines]))
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
