"""Check the compose files, the Dockerfiles and the secrets' script, without a container engine.

`.venv/bin/python tests/deploy/compose_check.py [ROOT]` says what is wrong, a line each, with status 1.
"""

import json
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from zlora import wire
from zlora_worker.settings import Settings

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2]).resolve()
BIN = Path(sys.executable).parent

_STACKS = {
    "plain": ["-f", "docker-compose.yml"],
    "cpu": ["-f", "docker-compose.yml", "-f", "docker-compose.cpu.yml"],
    "all profiles": ["-f", "docker-compose.yml", "--profile", "monitoring", "--profile", "example"],
}
_OURS = "z-image-lora/"  # what the project's own images begin with
_ONCE = {"bucket", "producer"}  # services that end by themselves
_YAML = ("docker-compose.yml", "docker-compose.cpu.yml", "deploy/prometheus/prometheus.yml", "deploy/grafana")
_YAML_RULES = """
extends: default
rules:
  line-length: {max: 120}
  document-start: disable
  comments: {min-spaces-from-content: 1}
"""
# Of other programs: boto3, the hub's client, Flower.
_FOREIGN = {"AWS_SHARED_CREDENTIALS_FILE", "AWS_DEFAULT_REGION", "HF_HOME", "HF_TOKEN_PATH"} | {
    "FLOWER_AUTH_FILE",
    "FLOWER_ADDRESS",
}
_MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"
_SECRET_NAME = re.compile("PASSWORD|SECRET|TOKEN|CREDENTIAL|AUTH|BROKER_URL|RESULT_BACKEND|_KEY")


def problems() -> Iterator[str]:
    """Everything that is wrong."""
    stacks = {}
    for title, options in _STACKS.items():
        done = _run("docker-compose", *options, "config", "--format", "json")
        if done.returncode:
            yield f"docker-compose config, {title}: {done.stderr.strip()}"
        else:
            stacks[title] = json.loads(done.stdout)
    yield from _said("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")
    yield from _said("hadolint", *map(str, _dockerfiles()))
    yield from _said("yamllint", "--strict", "-d", _YAML_RULES, *_YAML)
    for title, stack in stacks.items():
        yield from (f"{title}: {problem}" for problem in _stack(stack))
    if len(stacks) == len(_STACKS):
        yield from _devices(stacks)
        yield from _paths(stacks["plain"]["services"]["worker"])
        yield from _secrets(stacks["all profiles"])
    yield from _context()
    yield from _pins()


def _run(program: str, *arguments: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    found = BIN / program
    command = [str(found) if found.exists() else program, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def _said(program: str, *arguments: str) -> Iterator[str]:
    done = _run(program, *arguments)
    if done.returncode:
        yield f"{program}: {(done.stdout + done.stderr).strip()}"


def _dockerfiles() -> list[Path]:
    return sorted((ROOT / "deploy/docker").glob("*Dockerfile*"))


def _stack(stack: Mapping[str, Any]) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(stack, file)
        file.flush()
        yield from _said("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file.name)
    known = _known_names()
    for name, service in stack["services"].items():
        checks = (_image, _life, _rights, _ports, _files)
        yield from (f"{name}: {problem}" for check in checks for problem in check(name, service))
        environ = service.get("environment") or {}
        yield from (f"{name}: {problem}" for problem in _values(environ))
        if service["image"].startswith(_OURS):
            yield from (f"{name}: nothing reads {variable}" for variable in environ if variable not in known)
    yield from _networks(stack)


def _image(_: str, service: Mapping[str, Any]) -> Iterator[str]:
    tag = service["image"].rpartition(":")[2]
    if not re.search(r"\d+\.\d+", tag):
        yield f"the image {service['image']} is not pinned"


def _life(name: str, service: Mapping[str, Any]) -> Iterator[str]:
    policy = service.get("restart")
    if policy != ("no" if name in _ONCE else "unless-stopped"):
        yield f"restart is {policy}"
    if name not in _ONCE and not service.get("healthcheck", {}).get("test"):
        yield "no health check"
    settings = Settings.from_env({})
    if name == "worker" and _seconds(service["stop_grace_period"]) < settings.job_timeout + settings.hard_grace:
        yield f"a job may take longer than stop_grace_period {service['stop_grace_period']}"
    if service["image"].startswith(_OURS) and not service.get("init"):
        yield "no init"


def _seconds(text: str) -> int:
    parts = {unit: int(number) for number, unit in re.findall(r"(\d+)([hms])", text)}
    return parts.get("h", 0) * 3600 + parts.get("m", 0) * 60 + parts.get("s", 0)


def _rights(_: str, service: Mapping[str, Any]) -> Iterator[str]:
    if not service.get("read_only"):
        yield "its root can be written"
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add") or service.get("privileged"):
        yield "it keeps capabilities"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield "it may gain privileges"
    if str(service.get("user", "")).partition(":")[0] in ("0", "root"):
        yield "it runs as root"
    if "container_name" in service:
        yield "a container's name lets it be there only once"


def _ports(name: str, service: Mapping[str, Any]) -> Iterator[str]:
    for port in service.get("ports", []):
        if port.get("host_ip") != "127.0.0.1":
            yield f"port {port['target']} is published beyond this machine"
        if name in ("broker", "worker"):
            yield f"port {port['target']} is published"


def _files(_: str, service: Mapping[str, Any]) -> Iterator[str]:
    """The paths that a service is told, of secrets that it has."""
    has = {f"/run/secrets/{item['source']}" for item in service.get("secrets", [])}
    told = {name: service.get(name) for name in ("command", "environment", "healthcheck")}
    named = set(re.findall(r"/run/secrets/\w+", json.dumps(told)))
    yield from (f"it is told of {path}, and does not have it" for path in sorted(named - has))
    for mount in service.get("volumes", []):
        if mount["type"] == "bind" and not (Path(mount["source"]).exists() and mount.get("read_only")):
            yield f"{mount['source']}: expected a file or folder that is there, mounted to be read only"


def _values(environ: Mapping[str, str | None]) -> Iterator[str]:
    for name, value in environ.items():
        is_file = (value or "").startswith("/run/secrets/")
        if (_SECRET_NAME.search(name) and not is_file) or re.search("://[^/]*@", value or ""):
            yield f"{name} may be a secret: expected a file of /run/secrets"


def _known_names() -> set[str]:
    names = {wire.BROKER_URL, wire.RESULT_BACKEND, wire.HOME}
    names |= {name for item in fields(Settings) for name in item.metadata.get("names", ())}
    return names | {f"{name}_FILE" for name in names} | _FOREIGN


def _networks(stack: Mapping[str, Any]) -> Iterator[str]:
    services, networks = stack["services"], stack["networks"]
    outward = {name for name, network in networks.items() if not network.get("internal")}
    masked = {name for name in outward if networks[name].get("driver_opts", {}).get(_MASQUERADE) == "false"}
    for name, service in services.items():
        of = set(service.get("networks") or {})
        if of & (outward - masked) and name != "worker":
            yield f"{name}: it reaches the internet"
        if name == "broker" and of & outward:
            yield f"{name}: expected internal networks only"
    if "workers" not in (services["worker"]["networks"]["inside"] or {}).get("aliases", []):
        yield "worker: Prometheus does not find it"


def _devices(stacks: Mapping[str, Any]) -> Iterator[str]:
    worker = stacks["plain"]["services"]["worker"]
    devices = worker.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    if [(item["driver"], item["count"]) for item in devices] != [("nvidia", 1)]:
        yield f"plain: expected one GPU for a worker, not {devices}"
    worker = stacks["cpu"]["services"]["worker"]
    if worker.get("deploy") or worker["environment"]["ZLORA_MODEL"] != "demo":
        yield "cpu: expected the demo model and no GPU"


def _paths(worker: Mapping[str, Any]) -> Iterator[str]:
    """What the image says of paths, and the compose file again for whoever reads it alone."""
    text = (ROOT / worker["build"]["dockerfile"]).read_text(encoding="utf-8")
    for name, value in re.findall(
        r"(ZLORA_\w+|HF_HOME)=(/\S+)", " ".join(re.findall("^ENV (.*)$", text, re.MULTILINE))
    ):
        if name != "ZLORA_MODEL" and worker["environment"].get(name) != value:
            yield f"worker: {name} is {worker['environment'].get(name)}, and {value} in its image"


def _secrets(stack: Mapping[str, Any]) -> Iterator[str]:
    """The script makes what the compose file names, readable for all users in a folder that is not, and keeps it."""
    script, composed = ROOT / "deploy/secrets.sh", (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    names = set(yaml.safe_load(composed)["secrets"])  # docker-compose leaves out what nobody uses
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "secrets")
        done = _run("sh", str(script), str(folder))
        if done.returncode or {path.name for path in folder.iterdir()} != names:
            yield f"deploy/secrets.sh: expected {sorted(names)}: {done.stderr}"
            return
        if stat.S_IMODE(folder.stat().st_mode) != 0o700 or any(
            not path.stat().st_mode & 0o004 for path in folder.iterdir()
        ):
            yield "deploy/secrets.sh: expected a folder of its owner and files for all users"
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        again = _run("sh", str(script), str(folder))
        if again.returncode or {path.name: path.read_bytes() for path in folder.iterdir()} != before:
            yield f"deploy/secrets.sh: it does not keep what is there: {again.stderr}"
        (folder / "broker_url").unlink()
        if not _run("sh", str(script), str(folder)).returncode:
            yield "deploy/secrets.sh: it takes a password without its URL"
    used = {item["source"] for service in stack["services"].values() for item in service.get("secrets", [])}
    yield from (f"nobody uses the secret {name}" for name in sorted(names - used))


def _context() -> Iterator[str]:
    """What the Dockerfiles copy is there and let in by .dockerignore, and nothing else is let in."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {line[1:] for line in lines if line.startswith("!")}
    if "*" not in lines:
        yield ".dockerignore: expected a list of what is let in"
    copied = set()
    for file in _dockerfiles():
        text = file.read_text(encoding="utf-8")
        for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
            copied |= set(sources.split())
        for image in re.findall(r"^FROM (\S+:\S+)", text, re.MULTILINE):
            if not re.search(r":\d+\.\d+\.\d+", image):
                yield f"{file.name}: the image {image} is not pinned"
        if re.findall(r"^USER (.*)$", text, re.MULTILINE)[-1:] != ["10001"]:
            yield f"{file.name}: expected it to end as user 10001"
    yield from (f"{source} is copied, and not there" for source in sorted(copied) if not (ROOT / source).exists())
    yield from (f".dockerignore keeps {source} out, and it is copied" for source in sorted(copied - allowed))
    yield from (f".dockerignore lets {source} in, and nobody copies it" for source in sorted(allowed - copied))


def _pins() -> Iterator[str]:
    """Each direct dependency of an image has a version in constraints.txt that pyproject.toml allows."""
    folder = ROOT / "deploy/docker"
    text = (folder / "constraints.txt").read_text(encoding="utf-8")
    pins = dict(line.lower().split("==") for line in text.splitlines() if "==" in line)
    done = _run(sys.executable, str(folder / "requirements.py"), "pyproject.toml", "worker", "flower", "preflight")
    for line in done.stdout.split():
        wanted = Requirement(line)
        if not wanted.specifier.contains(pins.get(wanted.name.lower(), "0")):
            yield f"constraints.txt: {wanted.name} {pins.get(wanted.name.lower())}, and pyproject.toml asks for {line}"


if __name__ == "__main__":
    sys.exit("\n".join(problems()) or None)
