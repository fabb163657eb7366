"""Build Kubernetes manifests by kustomize, and look into them."""

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]


@dataclass(frozen=True)
class Build:
    """The documents that kustomize makes from a folder."""

    name: str
    documents: list[Document]

    @property
    def namespace(self) -> str:
        """Namespace of all documents."""
        name: str = self.of("Namespace")[0]["metadata"]["name"]
        return name

    def of(self, *kinds: str) -> list[Document]:
        """Return the documents of some kinds."""
        return [document for document in self.documents if document["kind"] in kinds]

    def named(self, kind: str, name: str) -> Document:
        """Return one document; raise `StopIteration` if there is none."""
        return next(document for document in self.of(kind) if document["metadata"]["name"] == name)

    def pods(self) -> Iterator[tuple[str, Document]]:
        """Return the template of each pod, with the name of its owner."""
        for owner in self.of("Deployment", "StatefulSet"):
            yield owner["metadata"]["name"], owner["spec"]["template"]

    def containers(self) -> Iterator[tuple[str, Document, Document]]:
        """Return each container, with the spec of its pod and a name for both."""
        for name, pod in self.pods():
            for container in pod["spec"].get("initContainers", []) + pod["spec"]["containers"]:
                yield f"{name}/{container['name']}", pod["spec"], container

    def worker(self) -> Document:
        """Return the container of the workers."""
        container: Document = self.named("Deployment", "zlora-worker")["spec"]["template"]["spec"][
            "containers"
        ][0]
        return container

    def variables(self, container: Document) -> dict[str, str]:
        """Return a container's variables; its own values win over those of ConfigMaps."""
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
    """Return the paths of mounted keys of Secrets in a container."""
    secrets = {
        volume["name"]: volume["secret"] for volume in spec.get("volumes", []) if "secret" in volume
    }
    return {
        f"{mount['mountPath']}/{item['path']}"
        for mount in container.get("volumeMounts", [])
        for item in secrets.get(mount["name"], {}).get("items", [])
    }


def optional_folders(spec: Document, container: Document) -> tuple[str, ...]:
    """Return the folders of optional Secrets in a container, whose keys are not known."""
    optional = {
        volume["name"]
        for volume in spec.get("volumes", [])
        if volume.get("secret", {}).get("optional")
    }
    mounts = container.get("volumeMounts", [])
    return tuple(mount["mountPath"] for mount in mounts if mount["name"] in optional)


def build(folder: Path, name: str) -> Build:
    """Build a folder; raise `subprocess.CalledProcessError` if kustomize fails."""
    made = subprocess.run(
        ["kustomize", "build", str(folder / name)], check=True, capture_output=True, text=True
    )
    return Build(name, list(yaml.safe_load_all(made.stdout)))


def selects(selector: Document, labels: dict[str, str]) -> bool:
    """Return whether a selector matches labels; `In` is the only operator in the manifests."""
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(
        expression["operator"] == "In" and labels.get(expression["key"]) in expression["values"]
        for expression in selector.get("matchExpressions", [])
    )
