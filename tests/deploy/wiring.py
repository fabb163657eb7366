"""Check networks, addresses, ports and folders of the compose file."""

import json
import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import yaml

OURS: Final = "z-image-lora/"  # prefix of this project's images
_MASQUERADE: Final = "com.docker.network.bridge.enable_ip_masquerade"
_OUTWARD: Final = {
    "worker",
    "producer",
    "server",
}  # services that need the internet; no other may reach it
_PRIVATE: Final = {"broker": {"inside"}, "store": {"pictures", "published-pictures"}}
_PUBLISHED: Final = {"store", "server", "flower", "prometheus", "grafana"}
# Ports of a service that its command does not name.
_DEFAULTS: Final = {"broker": {6379}, "server": {8000}, "flower": {5555}, "grafana": {3000}}
_ALIASES: Final = {"workers": "worker"}  # service by the name that Prometheus looks up
_LISTENS: Final = re.compile(r"(?:\b0\.0\.0\.0:|-s3\.port=)(\d+)")
_ADDRESS: Final = re.compile(r"https?://([\w.-]+):(\d+)")
_FOLDERS: Final = ("ZLORA_HOME", "HF_HOME", "ZLORA_LORA_CACHE", "ZLORA_PROBES")
_USER: Final = "10001"  # user of the project's images

Services = Mapping[str, Any]


def problems(root: Path, stack: Mapping[str, Any]) -> Iterator[str]:
    """Return the problems of one reading of the compose files."""
    services = stack["services"]
    yield from _networks(services, stack["networks"])
    for name, service in services.items():
        checks = (_ports(name, service), _addresses(services, name), _broker(services, name))
        yield from (f"{name}: {problem}" for check in checks for problem in check)
        if service["image"].startswith(OURS):
            yield from (f"{name}: {problem}" for problem in _folders(root, service))
    yield from _store(services["store"])
    yield from _queue(services["broker"]["command"])
    if "prometheus" in services:
        yield from _scraped(root, services)
        yield from _datasources(root, services)


def _networks(services: Services, networks: Mapping[str, Any]) -> Iterator[str]:
    outward = {name for name, network in networks.items() if not network.get("internal")}
    masked = {
        name
        for name in outward
        if networks[name].get("driver_opts", {}).get(_MASQUERADE) == "false"
    }
    for name, service in services.items():
        of = set(service.get("networks") or {})
        if bool(of & (outward - masked)) != (name in _OUTWARD):
            yield f"{name}: expected {'a' if name in _OUTWARD else 'no'} way to the internet"
        if service.get("ports") and not of & outward:
            yield f"{name}: a port of an internal network cannot be published"
        if of != _PRIVATE.get(name, of):
            yield f"{name}: expected the networks {sorted(_PRIVATE[name])}"
    for name in sorted(_PRIVATE["store"]):
        users = {
            other for other, service in services.items() if name in (service.get("networks") or {})
        }
        if not users <= {"store", *_OUTWARD}:
            yield f"the network {name} is for the store only, and has {sorted(users)}"
    if "workers" not in (services["worker"]["networks"]["inside"] or {}).get("aliases", []):
        yield "worker: Prometheus does not find the alias `workers`"


def listeners(name: str, service: Mapping[str, Any]) -> set[int]:
    """Return the ports at which a service listens."""
    text = json.dumps([service.get("command"), service.get("environment")])
    return _DEFAULTS.get(name, set()) | {int(port) for port in _LISTENS.findall(text)}


def _ports(name: str, service: Mapping[str, Any]) -> Iterator[str]:
    for port in service.get("ports", []):
        if port.get("host_ip") != "127.0.0.1":
            yield f"port {port['target']} is published beyond this machine"
        if name not in _PUBLISHED:
            yield f"port {port['target']} is published"
        if port["target"] not in listeners(name, service):
            yield f"port {port['target']} is published, and the service does not listen there"


def _addresses(services: Services, name: str) -> Iterator[str]:
    """Check that a service listens at each address that another names, in a shared network."""
    service = services[name]
    own = json.dumps(service.get("healthcheck"))
    for host, port in _ADDRESS.findall(own):
        if host != "127.0.0.1" or int(port) not in listeners(name, service):
            yield f"the health check uses {host}:{port}, and the service does not listen there"
    text = json.dumps([service.get("command"), service.get("environment")])
    published = {
        int(port["published"]) for other in services.values() for port in other.get("ports", [])
    }
    for host, port in _ADDRESS.findall(text):
        if host == "127.0.0.1" and int(port) not in published:
            yield f"it names {host}:{port}, which is not published"
        elif host != "127.0.0.1":
            yield from _reaches(services, name, host, int(port))


def _reaches(services: Services, name: str, host: str, port: int) -> Iterator[str]:
    if host not in services or port not in listeners(host, services[host]):
        yield f"it names {host}:{port}, where no service listens"
    elif not set(services[name]["networks"]) & set(services[host]["networks"]):
        yield f"it names {host}, and shares no network with it"


def _broker(services: Services, name: str) -> Iterator[str]:
    service = services[name]
    if any(item["source"].startswith("broker_url_") for item in service.get("secrets", [])):
        yield from _reaches(services, name, "broker", 6379)


def dockerfile(root: Path, image: str) -> Path:
    """Return the Dockerfile of `z-image-lora/<name>:<tag>`."""
    return root / f"deploy/docker/{image.removeprefix(OURS).partition(':')[0]}.Dockerfile"


def _folders(root: Path, service: Mapping[str, Any]) -> Iterator[str]:
    """Check that our images write to volumes of their user, or to memory."""
    volumes = {mount["target"] for mount in service.get("volumes", []) if mount["type"] == "volume"}
    memory = dict(item.partition(":")[::2] for item in service.get("tmpfs", []))
    environ = service.get("environment") or {}
    folders = {name: environ[name] for name in _FOLDERS if name in environ}
    if "working_dir" in service:
        folders["working_dir"] = service["working_dir"]
    for name, path in folders.items():
        if not any(
            path == place or path.startswith(f"{place}/") for place in volumes | set(memory)
        ):
            yield f"{name} is {path}, which is not on a volume"
    for place, options in memory.items():
        if "mode=1777" not in options and f"uid={_USER}" not in options.split(","):
            yield f"user {_USER} cannot write to {place}"
    file = dockerfile(root, service["image"])
    made = re.findall(
        r"install -d -o zlora -g zlora (.*?)(?: &&|$)",
        file.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    for place in sorted(volumes - set(" ".join(made).split())):
        yield f"{file.name} does not make {place} for its user; the volume would belong to root"


def _store(store: Mapping[str, Any]) -> Iterator[str]:
    """Check that only S3 is on the network, with fixed accounts."""
    needed = {
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-s3.config=/run/secrets/store_identities",
        "-s3.iam=false",
    }
    yield from (f"store: expected {word}" for word in sorted(needed - set(store["command"])))
    for name in ("WEED_GRPC_S3_CERT", "WEED_GRPC_S3_KEY", "WEED_GRPC_CA"):
        if store["environment"].get(name) != "/run/secrets/store_grpc":
            yield f"store: without {name} its administration is open to all clients"


def _queue(command: list[str]) -> Iterator[str]:
    """Check that jobs are kept on disk, and not evicted if memory is short."""
    options = dict(pairwise(command))
    for name, value in {"--appendonly": "yes", "--maxmemory-policy": "noeviction"}.items():
        if options.get(name) != value:
            yield f"broker: expected {name} {value}"


def _scraped(root: Path, services: Services) -> Iterator[str]:
    config = yaml.safe_load((root / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    for job in config["scrape_configs"]:
        found = [
            (_ALIASES.get(name, name), item["port"])
            for item in job.get("dns_sd_configs", [])
            for name in item["names"]
        ]
        found += [
            target.rsplit(":", 1)
            for item in job.get("static_configs", [])
            for target in item["targets"]
        ]
        if not found:
            yield f"prometheus.yml: {job['job_name']} has no targets"
        for host, port in found:
            yield from (
                f"prometheus: {problem}"
                for problem in _reaches(services, "prometheus", host, int(port))
            )


def _datasources(root: Path, services: Services) -> Iterator[str]:
    for file in sorted((root / "deploy/grafana/provisioning/datasources").iterdir()):
        for source in yaml.safe_load(file.read_text(encoding="utf-8"))["datasources"]:
            for host, port in _ADDRESS.findall(source["url"]):
                yield from (
                    f"{file.name}: {problem}"
                    for problem in _reaches(services, "grafana", host, int(port))
                )
