"""What kustomize makes of a folder."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]


@dataclass(frozen=True)
class Build:
    """What kustomize makes of a folder."""

    name: str
    documents: list[Document]

    @property
    def namespace(self) -> str:
        """Where all of it is."""
        name: str = self.of("Namespace")[0]["metadata"]["name"]
        return name

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

    def worker(self) -> Document:
        """The workers' container."""
        container: Document = self.named("Deployment", "zlora-worker")["spec"]["template"]["spec"][
            "containers"
        ][0]
        return container

    def told(self, container: Document) -> dict[str, str]:
        """The variables that stand in the manifests, of ConfigMaps first."""
        names = [
            source["configMapRef"]["name"]
            for source in container.get("envFrom", [])
            if "configMapRef" in source
        ]
        found = {
            key: value
            for name in names
            for key, value in self.named("ConfigMap", name)["data"].items()
        }
        return found | {
            item["name"]: item["value"] for item in container.get("env", []) if "value" in item
        }


def mounted(spec: Document, container: Document) -> set[str]:
    """The paths of the keys of Secrets in a container."""
    secrets = {
        volume["name"]: volume["secret"] for volume in spec.get("volumes", []) if "secret" in volume
    }
    return {
        f"{mount['mountPath']}/{item['path']}"
        for mount in container.get("volumeMounts", [])
        for item in secrets.get(mount["name"], {}).get("items", [])
    }


def build(folder: Path, name: str) -> Build:
    """Raises `subprocess.CalledProcessError` where kustomize refuses."""
    made = subprocess.run(
        ["kustomize", "build", str(folder / name)], check=True, capture_output=True, text=True
    )
    return Build(name, list(yaml.safe_load_all(made.stdout)))


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """Whether a selector takes who has these labels; `In` is the only operator that the manifests have."""
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(
        expression["operator"] == "In" and labels.get(expression["key"]) in expression["values"]
        for expression in selector.get("matchExpressions", [])
    )
