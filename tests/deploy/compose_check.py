"""Check the compose files, the Dockerfiles and the secrets' script, without a container engine.

`PYTHONPATH=tests .venv/bin/python -P tests/deploy/compose_check.py [ROOT]` prints one line for each
problem, and exits with status 1 if there is one.
"""

import json
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from deploy.composed import config
from zlora import config as variables
from zlora.server import settings as server_settings
from zlora.server.run import _GRACE as GRACE
from zlora_worker.settings import Settings

from deploy import images, wiring

ROOT = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2]).resolve()
BIN = Path(sys.executable).parent

_PROFILES = [word for name in ("http", "monitoring", "example") for word in ("--profile", name)]
_STACKS = {
    "plain": ["-f", "docker-compose.yml"],
    "cpu": ["-f", "docker-compose.yml", "-f", "docker-compose.cpu.yml"],
    "all profiles": ["-f", "docker-compose.yml", *_PROFILES],
}
_ONCE = {"bucket", "keys", "producer", "operator"}  # services that run once
_YAML = (
    "docker-compose.yml",
    "docker-compose.cpu.yml",
    "deploy/prometheus/prometheus.yml",
    "deploy/grafana",
)
_YAML_RULES = """
extends: default
rules:
  line-length: {max: 120}
  document-start: disable
  comments: {min-spaces-from-content: 1}
"""
# Variables of other programs: boto3, huggingface_hub, Flower, Python.
_FOREIGN = {
    "no_proxy",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_DEFAULT_REGION",
    "HF_HOME",
    "HF_TOKEN_PATH",
} | {
    "FLOWER_AUTH_FILE",
    "FLOWER_ADDRESS",
    "http_proxy",
}
# Not ZLORA_API_KEYS, the path of a file without keys.
_SECRET_NAME = re.compile("PASSWORD|SECRET|TOKEN|CREDENTIAL|AUTH|BROKER_URL|RESULT_BACKEND|_KEY$")


def problems() -> Iterator[str]:
    """Return all problems."""
    stacks = {}
    for title, options in _STACKS.items():
        done = config(ROOT, *options)
        if done.returncode:
            yield f"docker-compose config, {title}: {done.stderr.strip()}"
        else:
            stacks[title] = json.loads(done.stdout)
    yield from _output(
        "check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"
    )
    yield from _output("hadolint", *map(str, images.files(ROOT)))
    yield from _output("yamllint", "--strict", "-d", _YAML_RULES, *_YAML)
    for title, stack in stacks.items():
        yield from (f"{title}: {problem}" for problem in _stack(stack))
    if len(stacks) == len(_STACKS):
        yield from _devices(stacks)
        yield from _models()
        yield from _secrets(stacks["all profiles"])
        yield from images.problems(ROOT, stacks["all profiles"]["services"])


def _run(program: str, *arguments: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    found = BIN / program
    command = [str(found) if found.exists() else program, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def _output(program: str, *arguments: str) -> Iterator[str]:
    done = _run(program, *arguments)
    if done.returncode:
        yield f"{program}: {(done.stdout + done.stderr).strip()}"


def _stack(stack: Mapping[str, Any]) -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(stack, file)
        file.flush()
        yield from _output("check-jsonschema", "--builtin-schema", "vendor.compose-spec", file.name)
    known = _known_names()
    for name, service in stack["services"].items():
        checks = (_image, _life, _rights, _files)
        yield from (f"{name}: {problem}" for check in checks for problem in check(name, service))
        environ = service.get("environment") or {}
        yield from (f"{name}: {problem}" for problem in _values(environ))
        if service["image"].startswith(wiring.OURS):
            yield from (
                f"{name}: nothing reads {variable}" for variable in environ if variable not in known
            )
    yield from wiring.problems(ROOT, stack)


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
    if name == "worker":
        if (
            images.seconds(service["stop_grace_period"])
            < settings.job_timeout + settings.hard_grace
        ):
            yield f"a job may take longer than stop_grace_period {service['stop_grace_period']}"
        if images.seconds(service["healthcheck"]["start_period"]) < settings.load_timeout:
            period = service["healthcheck"]["start_period"]
            yield f"loading the model may take longer than start_period {period}"
    if name == "server" and images.seconds(service["stop_grace_period"]) < GRACE + 10:
        yield "it is killed before its open requests have ended"
    if service["image"].startswith(wiring.OURS) and not service.get("init"):
        yield "no init"


def _rights(_: str, service: Mapping[str, Any]) -> Iterator[str]:
    if not service.get("read_only"):
        yield "the root file system is writable"
    if service.get("cap_drop") != ["ALL"] or service.get("cap_add") or service.get("privileged"):
        yield "it has capabilities"
    if "no-new-privileges:true" not in service.get("security_opt", []):
        yield "it may gain privileges"
    if str(service.get("user", "")).partition(":")[0] in ("0", "root"):
        yield "it runs as root"
    if "container_name" in service:
        yield "with a container name there can be only one"


def _files(_: str, service: Mapping[str, Any]) -> Iterator[str]:
    """Check the secrets and files that a service names."""
    has = {f"/run/secrets/{item['source']}" for item in service.get("secrets", [])}
    texts = {name: service.get(name) for name in ("command", "environment", "healthcheck")}
    named = set(re.findall(r"/run/secrets/\w+", json.dumps(texts)))
    yield from (f"it names {path}, and has no such secret" for path in sorted(named - has))
    for mount in service.get("volumes", []):
        if mount["type"] == "bind" and not (
            Path(mount["source"]).exists() and mount.get("read_only")
        ):
            yield f"{mount['source']}: expected an existing path, mounted read-only"


def _values(environ: Mapping[str, str | None]) -> Iterator[str]:
    for name, value in environ.items():
        is_file = (value or "").startswith("/run/secrets/")
        if (_SECRET_NAME.search(name) and not is_file) or re.search("://[^/]*@", value or ""):
            yield f"{name} may be a secret: expected a file of /run/secrets"


def _known_names() -> set[str]:
    names = {variables.BROKER_URL, variables.RESULT_BACKEND, variables.HOME}
    names |= {name for item in fields(Settings) for name in item.metadata.get("names", ())}
    names |= {name for row in server_settings.reference() for name in row.names}
    return names | {f"{name}_FILE" for name in names} | _FOREIGN


def _devices(stacks: Mapping[str, Any]) -> Iterator[str]:
    worker = stacks["plain"]["services"]["worker"]
    devices = (
        worker.get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    )
    if [(item["driver"], item["count"]) for item in devices] != [("nvidia", 1)]:
        yield f"plain: expected one GPU for a worker, not {devices}"
    worker = stacks["cpu"]["services"]["worker"]
    if worker.get("deploy") or worker["environment"]["ZLORA_MODEL"] != "demo":
        yield "cpu: expected the demo model and no GPU"


def _models() -> Iterator[str]:
    """Check that a worker has the base models that `.env` names, and SDXL if it names none."""
    for dotenv in (
        {},
        {"ZLORA_MODEL": "owner/other"},
        {"ZLORA_MODELS": "a=owner/a,b=/models/b", "ZLORA_MODELS_BYTES": "1000"},
    ):
        stack = json.loads(config(ROOT, "-f", "docker-compose.yml", **dotenv).stdout)
        environ = stack["services"]["worker"]["environment"]
        given = {name: value for name, value in environ.items() if name.startswith("ZLORA_MODEL")}
        found, expected = Settings.from_env(given), Settings.from_env(dotenv)
        for field in ("model", "model_revision", "models", "models_bytes"):
            if getattr(found, field) != getattr(expected, field):
                yield f"{dotenv}: the worker has {field} {getattr(found, field)}"


def _secrets(stack: Mapping[str, Any]) -> Iterator[str]:
    """Check that the script makes the compose file's secrets, with safe modes, and keeps them."""
    script, composed = (
        ROOT / "deploy/secrets.sh",
        (ROOT / "docker-compose.yml").read_text(encoding="utf-8"),
    )
    names = set(yaml.safe_load(composed)["secrets"])  # docker-compose omits unused secrets
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "secrets")
        done = _run("sh", str(script), str(folder))
        if done.returncode or {path.name for path in folder.iterdir()} != names:
            yield f"deploy/secrets.sh: expected {sorted(names)}: {done.stderr}"
            return
        if stat.S_IMODE(folder.stat().st_mode) != 0o700 or any(
            not path.stat().st_mode & 0o004 for path in folder.iterdir()
        ):
            yield "deploy/secrets.sh: expected a private folder with files that all users can read"
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        again = _run("sh", str(script), str(folder))
        if (
            again.returncode
            or {path.name: path.read_bytes() for path in folder.iterdir()} != before
        ):
            yield f"deploy/secrets.sh: it does not keep existing files: {again.stderr}"
        (folder / "broker_url_worker").unlink()
        _run("sh", str(script), str(folder))
        if (folder / "broker_config").read_bytes() == before["broker_config"]:
            yield "deploy/secrets.sh: a new URL's password is not in broker_config"
        (folder / "store_identities").unlink()
        if not _run("sh", str(script), str(folder)).returncode:
            yield "deploy/secrets.sh: it accepts a key without its account"
        yield from _readable(Path(scratch, "clone"))
    used = {
        item["source"]
        for service in stack["services"].values()
        for item in service.get("secrets", [])
    }
    yield from (f"no service uses the secret {name}" for name in sorted(names - used))


def _readable(clone: Path) -> Iterator[str]:
    """Check that containers can read mounted files of a clone made under umask 077."""
    shutil.copytree(ROOT / "deploy", clone, ignore=shutil.ignore_patterns("secrets"))
    for path in clone.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    _run("sh", str(clone / "secrets.sh"))
    for name in ("s3", "prometheus", "grafana"):
        for path in (clone / name, *(clone / name).rglob("*")):
            if not path.stat().st_mode & 0o004:
                file = path.relative_to(clone)
                yield f"deploy/secrets.sh: containers cannot read {file} of a private clone"


if __name__ == "__main__":
    sys.exit("\n".join(problems()) or None)
