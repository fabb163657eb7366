"""Check the network policies of a build: needed connections are allowed, others denied."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Final

from deploy.kustomized import Build, Document, selects

SCRAPED: Final = {
    "zlora-worker",
    "zlora-queue",
    "zlora-server",
}  # services; the alert rules use the names as `job`
BROKER: Final = 6379
STORE: Final = 8333
# Not public: IANA's special addresses, multicast, and the public address of Azure's platform.
CLOSED: Final = (
    *(
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",
        "169.254.0.0/16",
        "172.16.0.0/12",
    ),
    *(
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
    ),
    *(
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "::/8",
        "64:ff9b::/96",
        "64:ff9b:1::/48",
        "100::/64",
    ),
    *(
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
        "5f00::/16",
        "fc00::/7",
        "fe80::/10",
        "fec0::/10",
    ),
    "ff00::/8",
)
OPEN: Final = ("1.1.1.1", "151.101.1.69", "2606:4700:4700::1111", "2a00:1450:4001:800::200e")

Network = IPv4Network | IPv6Network


@dataclass(frozen=True)
class Pod:
    """An end of a connection. Policies of the build apply to pods of its namespace only."""

    name: str
    namespace: str
    labels: dict[str, str]
    ports: Mapping[str, int]


ELSEWHERE: Final = {"app.kubernetes.io/name": "any"}
DNS: Final = Pod("DNS", "kube-system", ELSEWHERE, {})
PROMETHEUS: Final = Pod("Prometheus", "monitoring", ELSEWHERE, {})
KEDA: Final = Pod("KEDA", "keda", ELSEWHERE, {})
CALLER: Final = Pod("a client", "shop", {"z-image-lora/http": "true"}, {})
INGRESS: Final = Pod("the ingress", "ingress", {"app.kubernetes.io/name": "ingress-nginx"}, {})


def network(found: Build) -> Iterator[str]:
    """Check that all traffic is denied by default, and only public addresses are open, by https."""
    if {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} not in [
        p["spec"] for p in found.of("NetworkPolicy")
    ]:
        yield "no policy denies all traffic"
    reached = set()
    for name, cidr, excepted, ports in _blocks(found):
        if cidr.prefixlen == cidr.max_prefixlen and {port["port"] for port in ports} == {53}:
            continue  # a node's DNS cache
        yield from (
            f"{name}: {text} is not within {cidr}" for text in excepted if not _within(text, cidr)
        )
        yield from (
            f"{name}: {text} is open" for text in CLOSED if _opens(cidr, excepted, ip_network(text))
        )
        reached |= {text for text in OPEN if _opens(cidr, excepted, ip_network(text))}
        if ports != [{"protocol": "TCP", "port": 443}]:
            yield f"{name}: {cidr}: other ports than 443"
    yield from (f"{address} is not reachable" for address in OPEN if address not in reached)


def _blocks(found: Build) -> Iterator[tuple[str, Network, list[Network], list[Document]]]:
    """Return the open address blocks: policy, block, exceptions, ports. No peer means all."""
    anywhere = [{"ipBlock": {"cidr": "0.0.0.0/0"}}, {"ipBlock": {"cidr": "::/0"}}]
    for policy in found.of("NetworkPolicy"):
        for rule in policy["spec"].get("egress", []):
            for block in (
                peer["ipBlock"] for peer in rule.get("to") or anywhere if "ipBlock" in peer
            ):
                excepted = [ip_network(text) for text in block.get("except", [])]
                yield (
                    policy["metadata"]["name"],
                    ip_network(block["cidr"]),
                    excepted,
                    rule.get("ports", []),
                )


def _within(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]  # of one version


def _opens(cidr: Network, excepted: list[Network], part: Network) -> bool:
    """Return whether a part of a network is open."""
    return (
        part.version == cidr.version
        and part.overlaps(cidr)
        and not any(_within(part, e) for e in excepted)
    )


def selectors(found: Build) -> Iterator[str]:
    """Check that each selector selects a pod, and that Prometheus finds the rules' services."""
    labels = [pod["metadata"]["labels"] for _, pod in found.pods()]
    for document in found.of(
        "Service", "NetworkPolicy", "PodDisruptionBudget", "Deployment", "StatefulSet"
    ):
        spec = document["spec"]
        selector = spec.get("podSelector", spec.get("selector"))
        wanted = {"matchLabels": selector} if document["kind"] == "Service" else selector
        if not any(selects(wanted, own) for own in labels):
            yield f"{document['kind']} {document['metadata']['name']}: selects no pod"
    for monitor in found.of("ServiceMonitor"):
        services = [
            s
            for s in found.of("Service")
            if selects(monitor["spec"]["selector"], s["metadata"]["labels"])
        ]
        if {service["metadata"]["name"] for service in services} != SCRAPED:
            yield f"ServiceMonitor: expected the services {SCRAPED}"
        ports = {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]}
        yield from (
            f"ServiceMonitor: {service['metadata']['name']} expected one port of {ports}"
            for service in services
            if len(ports & {port["name"] for port in service["spec"]["ports"]}) != 1
        )


def reach(found: Build) -> Iterator[str]:
    """Check that every needed connection is allowed at both ends."""
    for source, target, protocol, number in _needed(found):
        for way, here, there in (("Egress", source, target), ("Ingress", target, source)):
            port = (protocol, number, target.ports)
            if here.namespace == found.namespace and not _lets(found, way, here, there, port):
                yield f"{way}: {source.name} cannot reach {target.name} at {protocol} {number}"


def _needed(found: Build) -> Iterator[tuple[Pod, Pod, str, int]]:
    """Return the needed connections, by the pods' variables and named ports."""
    own = list(_own(found))
    brokers = [pod for pod, _ in own if "redis" in pod.ports] or [
        _foreign("valkey"),
        _foreign("redis"),
    ]
    stores = [pod for pod, _ in own if "s3" in pod.ports] or [
        _foreign("seaweedfs"),
        _foreign("minio"),
    ]
    for pod, given in own:
        yield from ((pod, DNS, protocol, 53) for protocol in ("UDP", "TCP"))
        if "ZLORA_BROKER_URL_FILE" in given:
            yield from ((pod, broker, "TCP", BROKER) for broker in brokers)
        if "AWS_SHARED_CREDENTIALS_FILE" in given:
            yield from ((pod, store, "TCP", STORE) for store in stores)
        clients = {"metrics": [PROMETHEUS], "http": [INGRESS], "redis": [KEDA]}
        if pod.name in SCRAPED:
            clients["http"] = [INGRESS, PROMETHEUS, CALLER]
        yield from (
            (client, pod, "TCP", number)
            for name, number in pod.ports.items()
            for client in clients.get(name, ())
        )


def _own(found: Build) -> Iterator[tuple[Pod, dict[str, str]]]:
    """Return the build's pods, each with its variables."""
    for name, template in found.pods():
        (container,) = template["spec"]["containers"]
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        yield (
            Pod(name, found.namespace, template["metadata"]["labels"], ports),
            found.variables(container),
        )


def _foreign(name: str) -> Pod:
    return Pod(name, "elsewhere", {"app.kubernetes.io/name": name}, {})


def _lets(
    found: Build, way: str, here: Pod, there: Pod, port: tuple[str, int, Mapping[str, int]]
) -> bool:
    """Return whether a policy allows the connection at the end `here`."""
    peers = {"Egress": "to", "Ingress": "from"}[way]
    return any(
        any(_is_peer(found, peer, there) for peer in rule.get(peers, [{}]))
        and any(_is_port(allowed, *port) for allowed in rule.get("ports", [{}]))
        for policy in found.of("NetworkPolicy")
        if way in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], here.labels)
        for rule in policy["spec"].get(way.lower(), [])
    )


def _is_peer(found: Build, peer: Document, pod: Pod) -> bool:
    if "ipBlock" in peer:
        return False
    spaces = peer.get(
        "namespaceSelector", {"matchLabels": {"kubernetes.io/metadata.name": found.namespace}}
    )
    spaced = selects(spaces, {"kubernetes.io/metadata.name": pod.namespace})
    return not peer or (spaced and selects(peer.get("podSelector", {}), pod.labels))


def _is_port(port: Document, protocol: str, number: int, names: Mapping[str, int]) -> bool:
    """Return whether a rule's port, by number or by name, is the port of a connection."""
    wanted = port.get("port", number)
    return port.get("protocol", "TCP") == protocol and names.get(wanted, wanted) == number


def services(found: Build, folder: Path) -> Iterator[str]:
    """Check that Services use ports of their pods, and that addresses of Services exist."""
    open_ports, named_ports = set(), set()
    for service in found.of("Service"):
        pods = [
            pod
            for pod, _ in _own(found)
            if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)
        ]
        name = service["metadata"]["name"]
        for port in service["spec"]["ports"]:
            open_ports.add((name, str(port["port"])))
            named_ports.add((name, port["name"]))
            if not all(port["targetPort"] in pod.ports for pod in pods):
                yield f"Service {name}: no port of its pods is named {port['targetPort']}"
    for name, backend in _backends(found):
        if (backend["name"], backend["port"]["name"]) not in named_ports:
            yield f"Ingress {name}: no such Service and port as {backend}"
    script = folder / found.name / "secrets.sh"
    texts = [text for _, given in _own(found) for text in given.values()]
    texts += [script.read_text("utf-8")] if script.is_file() else []
    for host, number in re.findall(
        rf"(?:^|[/@'])([a-z][\w-]*)(?:\.{found.namespace}\.svc)?:(\d+)",
        "\n".join(texts),
        re.MULTILINE,
    ):
        if (host, number) not in open_ports:
            yield f"{host}:{number}: no such Service"


def _backends(found: Build) -> Iterator[tuple[str, Document]]:
    """Return the Services that Ingresses name, each with the Ingress' name."""
    for ingress in found.of("Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                yield ingress["metadata"]["name"], path["backend"]["service"]
