"""Check the Kubernetes manifests: `manifests.py [--write] [folder]`.

Prints one line for each problem, and exits with status 1 if there is one. The builds of the base
and of each overlay are checked against the schemas of Kubernetes, the schemas of custom resources
beside the manifests, and the rules of this project. `--write` writes the PrometheusRule from the
alert rules, because kustomize reads no file outside of its folder.
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
from deploy.pods import demo, gpus, hardening, rollout, secrets, server, settings, worker
from deploy.policies import network, reach, selectors, services
from deploy.scaling import scaling

ROOT: Final = Path(__file__).parents[2]
BIN: Final = Path(sys.executable).parent
BUILDS: Final = ("base", "overlays/nvidia", "overlays/demo")
BUILTIN: Final = ("v1", "apps/v1", "autoscaling/v2", "policy/v1", "networking.k8s.io/v1")
RULES: Final = "components/alerts/alerts.yaml"
YAMLLINT: Final = """
extends: default
rules:
  comments: {min-spaces-from-content: 1}
  document-start: disable
  line-length: {max: 120, ignore: [alerts.yaml]}
"""


def schemas(found: Build, folder: Path) -> Iterator[str]:
    """Check the schemas; a warning is a problem, and so is a kind without a schema."""
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
    """Return the output of a program for a text in a file, unless the program finds no problem."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        ran = subprocess.run(
            [BIN / command[0], *command[1:], file.name], check=False, capture_output=True, text=True
        )
    output = ran.stdout + ran.stderr
    if ran.returncode or output not in ("", "ok -- validation done\n"):
        yield f"{command[0]}: {output}"


def alerts(folder: Path) -> str:
    """Return the PrometheusRule with the groups of the alert rules."""
    groups = (folder.parent / "prometheus" / "rules.yml").read_text("utf-8")
    indented = "".join(
        f"  {line}" if line.strip() else line for line in groups.splitlines(keepends=True)
    )
    return (
        "# Made from deploy/prometheus/rules.yml by `tests/deploy/manifests.py --write`.\n"
        "apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\n"
        "metadata:\n  name: zlora\nspec:\n" + indented
    )


def wrong(folder: Path) -> Iterator[str]:
    """Return all problems, one line each."""
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
        # a build that breaks a schema may lack what the rules read
        problems = list(schemas(found, folder)) or facts(found, folder)
        yield from (f"{name}: {problem}" for problem in problems)


def facts(found: Build, folder: Path) -> list[str]:
    """Return what breaks the rules of this project."""
    checks = (
        settings(found),
        worker(found),
        server(found),
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
    return [problem for check in checks for problem in check]


def main() -> None:
    """Check the manifests and print the problems."""
    write, folders = "--write" in sys.argv, [text for text in sys.argv[1:] if text != "--write"]
    folder = Path(*folders) if folders else ROOT / "deploy" / "kubernetes"
    if write:
        (folder / RULES).write_text(alerts(folder), "utf-8")
    found = list(wrong(folder))
    print(*(found or [f"{folder}: {', '.join(BUILDS)}: no problem"]), sep="\n")  # noqa: T201
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
