"""Check the Dockerfiles: base images, packages and copied files."""

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from deploy.wiring import OURS, dockerfile
from packaging.requirements import Requirement
from zlora_worker.settings import Settings

_EXTRAS: Final = {"tools.Dockerfile": ["flower", "preflight"], "worker.Dockerfile": ["worker"]}


def files(root: Path) -> list[Path]:
    return sorted((root / "deploy/docker").glob("*Dockerfile*"))


def problems(root: Path, services: Mapping[str, Any]) -> Iterator[str]:
    """Return the problems of the Dockerfiles, and between Dockerfiles and services."""
    for file in files(root):
        yield from (f"{file.name}: {problem}" for problem in _file(file))
    yield from _context(root)
    yield from _pins(root)
    yield from _built(services)
    yield from _flower(root, services["flower"])
    yield from _environ(root, services["worker"])


def seconds(text: str) -> int:
    """Return the seconds of one of Docker's durations, such as `1h30m`."""
    parts = {unit: int(number) for number, unit in re.findall(r"(\d+)([hms])", text)}
    return parts.get("h", 0) * 3600 + parts.get("m", 0) * 60 + parts.get("s", 0)


def _file(file: Path) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    for name, tag in re.findall(r"^FROM (\S+):(\S+)", text, re.MULTILINE):
        if not re.match(r"\d+\.\d+\.\d+", tag):
            yield f"the image {name}:{tag} is not pinned"
        if name == "python" and not tag.startswith("{}.{}.".format(*sys.version_info)):
            yield f"Python {tag}, and the tests run with {sys.version.split()[0]}"
    if re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1:] != ["10001"]:
        yield "expected it to end as user 10001"
    extras = re.findall(r"requirements\.py pyproject\.toml (.*) >", text)
    if [sorted(line.split()) for line in extras] != [_EXTRAS[file.name]]:
        yield f"expected it to install {_EXTRAS[file.name]}, not {extras}"
    for period in re.findall(r"--start-period=(\w+)", text):
        if seconds(period) < Settings.from_env({}).load_timeout:
            yield f"loading the model may take longer than {period}"


def _context(root: Path) -> Iterator[str]:
    """Check that .dockerignore allows exactly the files that the Dockerfiles copy."""
    lines = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    if "*" not in lines:
        yield ".dockerignore: expected `*` and a list of allowed files"
    copied = {
        source for file in files(root) for sources, _ in _copies(file) for source in sources.split()
    }
    yield from (
        f"{source} is copied, and does not exist"
        for source in sorted(copied)
        if not (root / source).exists()
    )
    yield from (
        f".dockerignore excludes {source}, which is copied" for source in sorted(copied - allowed)
    )
    yield from (
        f".dockerignore allows {source}, which is not copied" for source in sorted(allowed - copied)
    )


def _copies(file: Path) -> list[tuple[str, str]]:
    return re.findall(
        r"^COPY (?!--from)(.*) (\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE
    )


def _pins(root: Path) -> Iterator[str]:
    """Check that constraints.txt pins each direct dependency to an allowed version."""
    folder = root / "deploy/docker"
    text = (folder / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(line.lower().split("==") for line in text.splitlines() if "==" in line)
    extras = [extra for wanted in _EXTRAS.values() for extra in wanted]
    command = [
        sys.executable,
        str(folder / "requirements.py"),
        str(root / "pyproject.toml"),
        *extras,
    ]
    for line in subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        wanted = Requirement(line)
        if not wanted.specifier.contains(pins.get(wanted.name.lower(), "0")):
            pin = pins.get(wanted.name.lower())
            yield f"constraints.txt: {wanted.name} {pin}, and pyproject.toml requires {line}"


def _built(services: Mapping[str, Any]) -> Iterator[str]:
    """Check that one service without a profile builds each of our images, and none is pulled."""
    ours = {
        name: service for name, service in services.items() if service["image"].startswith(OURS)
    }
    for image in sorted({service["image"] for service in ours.values()}):
        by = [
            name
            for name, service in ours.items()
            if service["image"] == image and service.get("build")
        ]
        files = {ours[name]["build"]["dockerfile"] for name in by}
        if files != {str(dockerfile(Path(), image))}:
            yield f"{image}: expected its own Dockerfile, not {files}"
        if len(by) != 1 or ours[by[0]].get("profiles"):
            yield f"{image}: expected one service without a profile to build it, not {by}"
    yield from (
        f"{name}: expected pull_policy never"
        for name in ours
        if ours[name].get("pull_policy") != "never"
    )


def _flower(root: Path, flower: Mapping[str, Any]) -> Iterator[str]:
    """Check that the image has Flower's configuration at the path in the command."""
    file = dockerfile(root, flower["image"])
    (path,) = re.findall(r"--conf=(\S+)", " ".join(flower["command"]))
    if path not in {target for _, target in _copies(file)}:
        yield f"{file.name}: nothing is copied to {path}, the configuration of Flower"


def _environ(root: Path, worker: Mapping[str, Any]) -> Iterator[str]:
    """Check that the folders in the compose file are those of the image."""
    text = dockerfile(root, worker["image"]).read_text(encoding="utf-8")
    variables = " ".join(re.findall("^ENV (.*)$", text, re.MULTILINE))
    for name, value in re.findall(r"(ZLORA_\w+|HF_HOME)=(/\S+)", variables):
        if name != "ZLORA_MODEL" and worker["environment"].get(name) != value:
            yield f"worker: {name} is {worker['environment'].get(name)}, and {value} in its image"
