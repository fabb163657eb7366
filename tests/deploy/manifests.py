"""Checks the Kubernetes manifests: `manifests.py [--write] [folder]`. Prints what is wrong, and ends with 1 then.

What kustomize makes of the base and of each overlay is held against Kubernetes' own schemas, those of the custom
resources beside the manifests, and this project's facts. `--write` makes the PrometheusRule of the alert rules anew,
since kustomize reads no file outside of its folder.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import yaml
from deploy.kustomized import Build, build
from deploy.pods import demo, gpus, hardening, rollout, secrets, settings, worker
from deploy.policies import network, reach, selectors, services
from deploy.scaling import scaling

ROOT: Final = Path(__file__).parents[2]
BIN: Final = Path(sys.executable).parent
BUILDS: Final = ("base", "overlays/nvidia", "overlays/demo")
BUILTIN: Final = ("v1", "apps/v1", "policy/v1", "networking.k8s.io/v1")
RULES: Final = "components/alerts/alerts.yaml"
YAMLLINT: Final = """
extends: default
rules:
  comments: {min-spaces-from-content: 1}
  document-start: disable
  line-length: {max: 120, ignore: [alerts.yaml]}
"""


def schemas(found: Build, folder: Path) -> Iterator[str]:
    """By Kubernetes' schemas, and those beside the manifests; a warning is a failure, and so is a kind of neither."""
    known = [document for document in found.documents if document["apiVersion"] in BUILTIN]
    yield from _checked(["kubernetes-validate", "--strict", "--quiet"], yaml.safe_dump_all(known))
    for custom in (
        document for document in found.documents if document["apiVersion"] not in BUILTIN
    ):
        schema = folder / "schemas" / f"{custom['kind'].lower()}.json"
        if schema.is_file():
            yield from _checked(
                ["check-jsonschema", "--schemafile", str(schema)], json.dumps(custom)
            )
        else:
            yield f"{custom['apiVersion']} {custom['kind']}: no schema"


def _checked(command: list[str], text: str) -> Iterator[str]:
    """What a program says of a text in a file, unless that all is well; a warning is not."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        ran = subprocess.run(
            [BIN / command[0], *command[1:], file.name], check=False, capture_output=True, text=True
        )
    said = ran.stdout + ran.stderr
    if ran.returncode or said not in ("", "ok -- validation done\n"):
        yield f"{command[0]}: {said}"


def alerts(folder: Path) -> str:
    """The PrometheusRule with the groups of the alert rules, word for word."""
    groups = (folder.parent / "prometheus" / "rules.yml").read_text("utf-8")
    indented = "".join(
        f"  {line}" if line.strip() else line for line in groups.splitlines(keepends=True)
    )
    return (
        "# Made of deploy/prometheus/rules.yml by `tests/deploy/manifests.py --write`.\n"
        "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: zlora\nspec:\n"
        + indented
    )


def wrong(folder: Path) -> Iterator[str]:
    """All that is wrong, a line each."""
    command = [str(BIN / "yamllint"), "--strict", "--config-data", YAMLLINT, str(folder)]
    linted = subprocess.run(command, check=False, capture_output=True, text=True)
    if linted.returncode:
        yield f"yamllint: {linted.stdout}{linted.stderr}"
    if (folder / RULES).read_text("utf-8") != alerts(folder):
        yield "alerts.yaml differs from the alert rules: run `manifests.py --write`"
    for name in BUILDS:
        try:
            found = build(folder, name)
        except subprocess.CalledProcessError as error:
            yield f"{name}: kustomize: {error.stderr}"
            continue
        said = list(schemas(found, folder)) or facts(
            found, folder
        )  # what is malformed has no facts
        yield from (f"{name}: {what}" for what in said)


def facts(found: Build, folder: Path) -> list[str]:
    """All that is against this project's own rules."""
    checks = (
        settings(found),
        worker(found),
        gpus(found),
        rollout(found),
        hardening(found),
        demo(found),
        scaling(found),
        network(found),
        reach(found),
        selectors(found),
        services(found, folder),
        secrets(found, folder),
    )
    return [what for check in checks for what in check]


def main() -> None:
    """Check, and say."""
    write, folders = "--write" in sys.argv, [text for text in sys.argv[1:] if text != "--write"]
    folder = Path(*folders) if folders else ROOT / "deploy" / "kubernetes"
    if write:
        (folder / RULES).write_text(alerts(folder), "utf-8")
    found = list(wrong(folder))
    print(*(found or [f"{folder}: {', '.join(BUILDS)}: as they should be"]), sep="\n")  # noqa: T201
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
