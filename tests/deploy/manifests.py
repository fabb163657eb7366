"""Checks the Kubernetes manifests: `manifests.py [--write] [folder]`. Prints what is wrong, and ends with 1 then.

What kustomize makes of the base and of each overlay is held against Kubernetes' own schemas, those of the custom
resources beside the manifests, and this project's facts. `--write` makes the PrometheusRule of the alert rules anew,
since kustomize reads no file outside of its folder.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Any, Final

import yaml
from zlora import wire
from zlora.errors import InvalidSetting
from zlora_worker.settings import Settings

ROOT: Final = Path(__file__).parents[2]
BIN: Final = Path(sys.executable).parent
BUILDS: Final = ("base", "overlays/nvidia", "overlays/demo")
BUILTIN: Final = ("v1", "apps/v1", "policy/v1", "networking.k8s.io/v1")
YAMLLINT: Final = """
extends: default
rules:
  comments: {min-spaces-from-content: 1}
  document-start: disable
  line-length: {max: 120, ignore: [alerts.yaml]}
"""
# What containers are told beside this project's settings: boto3's, Hugging Face's, NVIDIA's, Flower's, a home's.
FOREIGN: Final = {"AWS_SHARED_CREDENTIALS_FILE", "AWS_DEFAULT_REGION", "HF_HOME", "NVIDIA_DRIVER_CAPABILITIES"}
FOREIGN_TOO: Final = {"FLOWER_ADDRESS", "FLOWER_AUTH_FILE", "HOME"}
NAMED: Final = [field for field in fields(Settings) if field.metadata]
SECRETS: Final = {name for field in NAMED if field.metadata["secret"] for name in field.metadata["names"]}
SETTINGS: Final = {
    *(name for field in NAMED for name in field.metadata["names"]),
    *(wire.BROKER_URL, wire.RESULT_BACKEND, wire.HOME),
}
SCRAPED: Final = {"zlora-worker", "zlora-queue"}  # the services, whose names the alert rules know as `job`
# Not public: IANA's special addresses, multicast, and the one public address of a cloud's platform.
CLOSED: Final = (
    *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16", "172.16.0.0/12"),
    *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24"),
    *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "::/8", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64"),
    *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10"),
    "ff00::/8",
)
OPEN: Final = ("1.1.1.1", "151.101.1.69", "2606:4700:4700::1111", "2a00:1450:4001:800::200e")

Document = dict[str, Any]
Network = IPv4Network | IPv6Network


@dataclass(frozen=True)
class Build:
    """What kustomize makes of a folder."""

    name: str
    documents: list[Document]

    def of(self, *kinds: str) -> list[Document]:
        """The documents of some kinds."""
        return [document for document in self.documents if document["kind"] in kinds]

    def named(self, kind: str, name: str) -> Document:
        """One document; raises `StopIteration`."""
        return next(document for document in self.of(kind) if document["metadata"]["name"] == name)

    def pods(self) -> Iterator[tuple[str, Document]]:
        """The template of each pod, with its owner's name."""
        for owner in self.of("Deployment", "StatefulSet"):
            yield owner["metadata"]["name"], owner["spec"]["template"]

    def containers(self) -> Iterator[tuple[str, Document, Document]]:
        """Each container, with the spec of its pod and a name for both."""
        for name, pod in self.pods():
            for container in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]:
                yield f"{name}/{container['name']}", pod["spec"], container

    def told(self, container: Document) -> dict[str, str]:
        """The variables that stand in the manifests, of ConfigMaps first."""
        names = [source["configMapRef"]["name"] for source in container.get("envFrom", []) if "configMapRef" in source]
        found = {key: value for name in names for key, value in self.named("ConfigMap", name)["data"].items()}
        return found | {item["name"]: item["value"] for item in container.get("env", []) if "value" in item}


def build(folder: Path, name: str) -> Build:
    """Raises `subprocess.CalledProcessError` where kustomize refuses."""
    made = subprocess.run(["kustomize", "build", str(folder / name)], check=True, capture_output=True, text=True)  # noqa: S607
    return Build(name, list(yaml.safe_load_all(made.stdout)))


def schemas(found: Build, folder: Path) -> Iterator[str]:
    """By Kubernetes' schemas, and those beside the manifests; a warning is a failure, and so is a kind of neither."""
    known = [document for document in found.documents if document["apiVersion"] in BUILTIN]
    yield from _checked(["kubernetes-validate", "--strict", "--quiet"], yaml.safe_dump_all(known))
    for custom in (document for document in found.documents if document["apiVersion"] not in BUILTIN):
        schema = folder / "schemas" / f"{custom['kind'].lower()}.json"
        if schema.is_file():
            yield from _checked(["check-jsonschema", "--schemafile", str(schema)], json.dumps(custom))
        else:
            yield f"{custom['apiVersion']} {custom['kind']}: no schema"


def _checked(command: list[str], text: str) -> Iterator[str]:
    """What a program says of a text in a file, unless that all is well; a warning is not."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        ran = subprocess.run([BIN / command[0], *command[1:], file.name], check=False, capture_output=True, text=True)
    said = ran.stdout + ran.stderr
    if ran.returncode or said not in ("", "ok -- validation done\n"):
        yield f"{command[0]}: {said}"


def settings(found: Build) -> Iterator[str]:
    """Every variable is somebody's, none is a secret's value, and the worker accepts them."""
    for name, spec, container in found.containers():
        told = found.told(container)
        known = SETTINGS | {f"{setting}_FILE" for setting in SETTINGS} | FOREIGN | FOREIGN_TOO
        yield from (f"{name}: {variable}: no such setting" for variable in sorted(told.keys() - known))
        yield from (f"{name}: {variable}: a secret's value" for variable in sorted(told.keys() & SECRETS))
        yield from (f"{name}: {key}: has a password" for key, text in told.items() if re.search(r"://[^/]*@", text))
        mounted = set(_mounted(spec, container))
        paths = [path for key, path in told.items() if key.endswith("_FILE")]
        yield from (f"{name}: {path}: no mounted secret" for path in paths if path not in mounted)
        if told.get("ZLORA_METRICS"):
            ports = {str(port["containerPort"]) for port in container["ports"] if port["name"] == "metrics"}
            if {told["ZLORA_METRICS"].rpartition(":")[2]} != ports:
                yield f"{name}: ZLORA_METRICS and the port named metrics: {ports}"
    yield from (f"Secret {secret['metadata']['name']}: in the manifests" for secret in found.of("Secret"))


def _mounted(spec: Document, container: Document) -> Iterator[str]:
    """The paths of the keys of Secrets."""
    secrets = {volume["name"]: volume["secret"] for volume in spec.get("volumes", []) if "secret" in volume}
    for mount in container.get("volumeMounts", []):
        for item in secrets.get(mount["name"], {}).get("items", []):
            yield f"{mount['mountPath']}/{item['path']}"


def worker(found: Build) -> Iterator[str]:
    """The worker's times are longer than what they wait for, and its probes look where it writes."""
    spec = found.named("Deployment", "zlora-worker")["spec"]["template"]["spec"]
    container = spec["containers"][0]
    told = _built_in(ROOT / "deploy/docker/worker.Dockerfile") | found.told(container)
    try:
        heeded = Settings.from_env({name: value for name, value in told.items() if not name.endswith("_FILE")})
    except InvalidSetting as error:
        yield f"the worker refuses {error}"
        return
    longest, grace = heeded.job_timeout + heeded.hard_grace, spec["terminationGracePeriodSeconds"]
    if grace <= longest:
        yield f"terminationGracePeriodSeconds {grace} is no longer than the longest job, {longest}"
    startup = container["startupProbe"]
    if startup["periodSeconds"] * startup["failureThreshold"] <= heeded.load_timeout:
        yield f"the startup probe ends before a load, {heeded.load_timeout} s"
    for probe, file in (("startup", "ready"), ("readiness", "ready"), ("liveness", "alive")):
        if f"{heeded.probes}/{file}" not in " ".join(container[f"{probe}Probe"]["exec"]["command"]):
            yield f"the {probe} probe does not look at {heeded.probes}/{file}"
    written = (heeded.home, heeded.cache_folder, Path(told["HF_HOME"]), Path(heeded.probes), Path("/tmp"))
    writable = {Path(mount["mountPath"]) for mount in container["volumeMounts"] if not mount.get("readOnly")}
    yield from (f"{path}: not writable" for path in written if not writable & {path, *path.parents})
    if "worker@%h" not in container["command"]:
        yield "the workers' Celery names are not their pods'"
    yield from _scaling(found, heeded.queue)


def _built_in(dockerfile: Path) -> dict[str, str]:
    """The variables that an image sets."""
    lines = re.findall(r"^ENV (.*)$", dockerfile.read_text("utf-8"), re.MULTILINE)
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(lines)))


def _scaling(found: Build, queue: str) -> Iterator[str]:
    for scaled in found.of("ScaledObject"):
        triggers = scaled["spec"]["triggers"]
        lists = [trigger["metadata"]["listName"] for trigger in triggers]
        if sorted(lists) != sorted([*wire.waiting_lists(queue), "unacked"]):
            yield f"ScaledObject: {lists} are not the queue's lists and what its workers hold"
        formula = scaled["spec"]["advanced"]["scalingModifiers"]["formula"]
        if sorted(formula.split(" + ")) != sorted(trigger["name"] for trigger in triggers):
            yield f"ScaledObject: {formula}: not the sum of its triggers"
        if not found.of("TriggerAuthentication"):
            yield "ScaledObject: no TriggerAuthentication"


def hardening(found: Build) -> Iterator[str]:
    """No container has more rights than it needs, nor an image that may change."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    for name, spec, container in found.containers():
        pod, own = spec.get("securityContext", {}), container.get("securityContext", {})
        image, _, tag = container["image"].rpartition(":")
        ours = image.startswith("z-image-lora/")
        yield from _missing(
            name,
            {
                "runAsNonRoot": pod.get("runAsNonRoot") is True and pod.get("runAsUser", 0) > 0,
                "uid 10001": pod.get("runAsUser") == 10001 or not ours,
                "seccompProfile RuntimeDefault": pod.get("seccompProfile", {}).get("type") == "RuntimeDefault",
                "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
                "no privilege escalation": own.get("allowPrivilegeEscalation") is False and not own.get("privileged"),
                "drop ALL": own.get("capabilities") == {"drop": ["ALL"]},
                "no token": spec.get("automountServiceAccountToken") is False,
                "no service links": spec.get("enableServiceLinks") is False,
                "memory request and limit": all(
                    "memory" in container["resources"][key] for key in ("requests", "limits")
                ),
                "a pinned image": bool(image) and "/" not in tag and tag != "latest",
                "this version's image": tag == version or not ours,
                "a readiness and a liveness probe": {"readinessProbe", "livenessProbe"} <= container.keys(),
            },
        )


def _missing(name: str, held: dict[str, bool]) -> Iterator[str]:
    yield from (f"{name}: expected {what}" for what, holds in held.items() if not holds)


def network(found: Build) -> Iterator[str]:
    """All is denied but what is named, and of addresses only the public ones, by https."""
    if {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} not in [p["spec"] for p in found.of("NetworkPolicy")]:
        yield "no policy denies all"
    reached = set()
    for name, cidr, excepted, ports in _blocks(found):
        if cidr.prefixlen == cidr.max_prefixlen and {port["port"] for port in ports} == {53}:
            continue  # a node's DNS cache
        yield from (f"{name}: {text} is not within {cidr}" for text in excepted if not _within(text, cidr))
        yield from (f"{name}: {text} is open" for text in CLOSED if _opens(cidr, excepted, ip_network(text)))
        reached |= {text for text in OPEN if _opens(cidr, excepted, ip_network(text))}
        if ports != [{"protocol": "TCP", "port": 443}]:
            yield f"{name}: {cidr}: other ports than 443"
    yield from (f"{address} is not reached" for address in OPEN if address not in reached)


def _blocks(found: Build) -> Iterator[tuple[str, Network, list[Network], list[Document]]]:
    """Where pods may go by address: policy, block, what it leaves out, ports. No peer at all is anywhere."""
    anywhere = [{"ipBlock": {"cidr": "0.0.0.0/0"}}, {"ipBlock": {"cidr": "::/0"}}]
    for policy in found.of("NetworkPolicy"):
        for rule in policy["spec"].get("egress", []):
            for block in (peer["ipBlock"] for peer in rule.get("to") or anywhere if "ipBlock" in peer):
                excepted = [ip_network(text) for text in block.get("except", [])]
                yield policy["metadata"]["name"], ip_network(block["cidr"]), excepted, rule.get("ports", [])


def _within(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]  # of one version


def _opens(cidr: Network, excepted: list[Network], asked: Network) -> bool:
    """Whether a part of a network is let through."""
    return asked.version == cidr.version and asked.overlaps(cidr) and not any(_within(asked, e) for e in excepted)


def selectors(found: Build) -> Iterator[str]:
    """Whatever selects pods selects one at least; Prometheus finds what the alert rules know."""
    labels = [pod["metadata"]["labels"] for _, pod in found.pods()]
    for document in found.of("Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment", "StatefulSet"):
        spec = document["spec"]
        selector = spec.get("podSelector", spec.get("selector"))
        wanted = {"matchLabels": selector} if document["kind"] == "Service" else selector
        if not any(_selects(wanted, own) for own in labels):
            yield f"{document['kind']} {document['metadata']['name']}: selects no pod"
    for monitor in found.of("ServiceMonitor"):
        services = [s for s in found.of("Service") if _selects(monitor["spec"]["selector"], s["metadata"]["labels"])]
        if {service["metadata"]["name"] for service in services} != SCRAPED:
            yield f"ServiceMonitor: expected the services {SCRAPED}"
        ports = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
        yield from (
            f"ServiceMonitor: {service['metadata']['name']} has no port {ports}"
            for service in services
            if not ports <= {port["name"] for port in service["spec"]["ports"]}
        )


def _selects(selector: Document, labels: dict[str, str]) -> bool:
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(
        expression["operator"] == "In" and labels.get(expression["key"]) in expression["values"]
        for expression in selector.get("matchExpressions", [])
    )


def secrets(found: Build, folder: Path) -> Iterator[str]:
    """Every Secret that must be there is made by the README's commands; the demo's by its script."""
    asked = {
        (volume["secret"]["secretName"], item["key"])
        for _, pod in found.pods()
        for volume in pod["spec"].get("volumes", [])
        if "secret" in volume
        for item in volume["secret"].get("items", [{"key": "every key, by no `items`"}])
    } | {
        (reference["name"], reference["key"])
        for trigger in found.of("TriggerAuthentication")
        for reference in trigger["spec"]["secretTargetRef"]
    }
    source = folder / found.name / "secrets.sh"
    source = source if source.is_file() else folder / "README.md"
    yield from (f"{name}: {key}: not made in {source.name}" for name, key in sorted(asked - _made(source)))


def _made(source: Path) -> set[tuple[str, str]]:
    """The Secrets and keys that the commands of a file make."""
    lines = source.read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:kubectl .*secret generic|make) (\S+) (.*)$", lines, re.MULTILINE)
    return {(name, key) for name, rest in commands for key in re.findall(r"--from-file=([\w.-]+)", rest)}


def alerts(folder: Path) -> str:
    """The PrometheusRule with the groups of the alert rules, word for word."""
    groups = (folder.parent / "prometheus" / "rules.yml").read_text("utf-8")
    indented = "".join(f"  {line}" if line.strip() else line for line in groups.splitlines(keepends=True))
    return (
        "# Made of deploy/prometheus/rules.yml by `tests/deploy/manifests.py --write`.\n"
        "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: zlora\nspec:\n" + indented
    )


def wrong(folder: Path) -> Iterator[str]:
    """All that is wrong, a line each."""
    command = [str(BIN / "yamllint"), "--strict", "--config-data", YAMLLINT, str(folder)]
    linted = subprocess.run(command, check=False, capture_output=True, text=True)
    if linted.returncode:
        yield f"yamllint: {linted.stdout}{linted.stderr}"
    if (folder / "components/monitoring/alerts.yaml").read_text("utf-8") != alerts(folder):
        yield "alerts.yaml differs from the alert rules: run `manifests.py --write`"
    for name in BUILDS:
        try:
            found = build(folder, name)
        except subprocess.CalledProcessError as error:
            yield f"{name}: kustomize: {error.stderr}"
            continue
        said = list(schemas(found, folder)) or facts(found, folder)  # what is malformed has no facts
        yield from (f"{name}: {what}" for what in said)


def facts(found: Build, folder: Path) -> list[str]:
    """All that is against this project's own rules."""
    checks = (
        settings(found),
        worker(found),
        hardening(found),
        network(found),
        selectors(found),
        secrets(found, folder),
    )
    return [what for check in checks for what in check]


def main() -> None:
    """Check, and say."""
    write, folders = "--write" in sys.argv, [text for text in sys.argv[1:] if text != "--write"]
    folder = Path(*folders) if folders else ROOT / "deploy" / "kubernetes"
    if write:
        (folder / "components/monitoring/alerts.yaml").write_text(alerts(folder), "utf-8")
    found = list(wrong(folder))
    print(*(found or [f"{folder}: {', '.join(BUILDS)}: as they should be"]), sep="\n")  # noqa: T201
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
