"""Check the Dockerfiles: base images, packages and copied files."""

import importlib.util
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final

from deploy.wiring import OURS, dockerfile
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from zlora_worker.settings import Settings

_LOCKED: Final = re.compile(r"[a-z0-9-]+==[\w.!]+ --hash=sha256:[0-9a-f]{64}")


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
    for name, tag in re.findall(r"^ARG PYTHON=(\S+):(\S+)", text, re.MULTILINE):
        if not re.match(r"\d+\.\d+\.\d+", tag):
            yield f"the image {name}:{tag} is not pinned"
        if name == "python" and not tag.startswith("{}.{}.".format(*sys.version_info)):
            yield f"Python {tag}, and the tests run with {sys.version.split()[0]}"
    if re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1:] != ["10001"]:
        yield "expected it to end as user 10001"
    installs = re.findall(r"pip install .*--requirement (\S+)", text)
    if not installs or text.count("--require-hashes") != len(installs):
        yield "expected each list of packages to be installed with --require-hashes"
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
    """Check that each lock has a hash of each package, and each requirement in an allowed version.

    Requirements of requirements are those of the packages that are installed here.
    """
    spec = importlib.util.spec_from_file_location("locks", root / "deploy/docker/locks.py")
    assert spec
    assert spec.loader
    locks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(locks)
    for image in locks.IMAGES:
        file = f"{image}.lock"
        lines = (root / "deploy/docker" / file).read_text(encoding="utf-8").splitlines()[1:]
        if odd := [line for line in lines if not _LOCKED.fullmatch(line)]:
            yield f"{file}: expected name, version and sha256, not {odd[0]}"
            continue
        pins = dict(line.partition(" ")[0].split("==") for line in lines)
        waiting, seen = list(map(Requirement, locks.requirements(image))), set[str]()
        while waiting:
            wanted = waiting.pop()
            name = canonicalize_name(wanted.name)
            pin = pins.get(name)
            if pin is None or not wanted.specifier.contains(pin):
                yield f"{file}: {name} is {pin}, expected {wanted}"
            if str(wanted) in seen:
                continue
            seen.add(str(wanted))
            try:
                needs = distribution(name).requires or []
            except PackageNotFoundError:  # what builds a wheel need not be installed
                continue
            for line in needs:
                needed = Requirement(line)
                extras = ("", *wanted.extras)
                if not needed.marker or any(needed.marker.evaluate({"extra": e}) for e in extras):
                    waiting.append(needed)


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
