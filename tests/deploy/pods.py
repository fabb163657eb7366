"""Check the pods of a build: settings, times, rights and secrets."""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Final

from deploy.kustomized import Build, mounted, optional_folders
from zlora import config
from zlora.errors import InvalidSetting
from zlora.server import settings as server_settings
from zlora.server import tenants
from zlora.server.app import SERVER
from zlora.server.run import _GRACE as GRACE
from zlora_worker.settings import Settings

ROOT: Final = Path(__file__).parents[2]
# Variables of other programs: boto3, Hugging Face, NVIDIA, Flower.
FOREIGN: Final = {
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_DEFAULT_REGION",
    "HF_HOME",
    "HF_TOKEN_PATH",
    "NVIDIA_DRIVER_CAPABILITIES",
}
FOREIGN_TOO: Final = {"FLOWER_ADDRESS", "FLOWER_AUTH_FILE", "HOME", "http_proxy"}
CERTIFICATE: Final = {"WEED_GRPC_S3_CERT", "WEED_GRPC_S3_KEY", "WEED_GRPC_CA"}
NAMED: Final = [field for field in fields(Settings) if field.metadata]
SECRETS: Final = {
    name for field in NAMED if field.metadata["secret"] for name in field.metadata["names"]
}
SETTINGS: Final = {
    *(name for field in NAMED for name in field.metadata["names"]),
    *(name for row in server_settings.reference() for name in row.names),
    *(config.BROKER_URL, config.RESULT_BACKEND, config.HOME, config.SECRETS),
}


def settings(found: Build) -> Iterator[str]:
    """Check that every variable is a known setting, and none contains a secret."""
    for name, spec, container in found.containers():
        given = found.variables(container)
        known = (
            SETTINGS
            | {f"{setting}_FILE" for setting in SETTINGS}
            | FOREIGN
            | FOREIGN_TOO
            | CERTIFICATE
        )
        yield from (
            f"{name}: {variable}: no such setting" for variable in sorted(given.keys() - known)
        )
        yield from (
            f"{name}: {variable}: a secret's value" for variable in sorted(given.keys() & SECRETS)
        )
        yield from (
            f"{name}: {key}: has a password"
            for key, text in given.items()
            if re.search(r"://[^/]*@", text)
        )
        paths = [path for path in given.values() if path.startswith("/run/secrets/")]
        yield from (
            f"{name}: {path}: no mounted secret"
            for path in paths
            if path not in mounted(spec, container)
            and not path.startswith(optional_folders(spec, container))
        )
        if given.get("ZLORA_METRICS"):
            ports = {
                str(port["containerPort"])
                for port in container["ports"]
                if port["name"] == "metrics"
            }
            if {given["ZLORA_METRICS"].rpartition(":")[2]} != ports:
                yield f"{name}: ZLORA_METRICS and the port named metrics: {ports}"
    yield from (
        f"Secret {secret['metadata']['name']}: in the manifests" for secret in found.of("Secret")
    )


def worker(found: Build) -> Iterator[str]:
    """Check the worker's times, probes and writable folders."""
    spec = found.named("Deployment", "zlora-worker")["spec"]["template"]["spec"]
    container = spec["containers"][0]
    given = _built_in(ROOT / "deploy/docker/worker.Dockerfile") | found.variables(container)
    try:
        read = Settings.from_env(
            {name: value for name, value in given.items() if not name.endswith("_FILE")}
        )
    except InvalidSetting as error:
        yield f"the worker refuses {error}"
        return
    longest, grace = read.job_timeout + read.hard_grace, spec["terminationGracePeriodSeconds"]
    if grace <= longest:
        yield f"terminationGracePeriodSeconds {grace} is not longer than the longest job, {longest}"
    startup = container["startupProbe"]
    if startup["periodSeconds"] * startup["failureThreshold"] <= read.load_timeout:
        yield f"the startup probe gives up before a model is loaded, {read.load_timeout} s"
    for probe, file in (("startup", "ready"), ("readiness", "ready"), ("liveness", "alive")):
        if f"{read.probes}/{file}" not in " ".join(container[f"{probe}Probe"]["exec"]["command"]):
            yield f"the {probe} probe does not read {read.probes}/{file}"
    written = (
        read.home,
        read.cache_folder,
        Path(given["HF_HOME"]),
        Path(read.probes),
        Path("/tmp"),
    )
    writable = {
        Path(mount["mountPath"]) for mount in container["volumeMounts"] if not mount.get("readOnly")
    }
    yield from (f"{path}: not writable" for path in written if not writable & {path, *path.parents})
    if "worker@%h" not in container["command"]:
        yield "the Celery names of the workers are not the names of their pods"


def server(found: Build) -> Iterator[str]:
    """Check the keys, probes and times of the HTTP server."""
    public = {endpoint.path for endpoint in SERVER.endpoints}
    for owner in found.of("Deployment"):
        spec = owner["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        if container["command"][:2] != ["zlora", "serve"]:
            continue
        if tenants.VARIABLE not in found.variables(container):
            yield "without API keys the server listens on loopback only"
        paths = {
            container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("readiness", "liveness")
        }
        yield from (f"the server has no {path} for a probe" for path in sorted(paths - public))
        if spec["terminationGracePeriodSeconds"] < GRACE + 10:
            yield "the server is killed before its open requests have ended"


def gpus(found: Build) -> Iterator[str]:
    """Check that each worker has one GPU, or none on CPUs; the base sets neither."""
    container = found.worker()
    given, had = found.variables(container), container["resources"]["limits"].get("nvidia.com/gpu")
    if "ZLORA_MODEL" in given and had != (None if given.get("ZLORA_DEVICE") == "cpu" else "1"):
        yield f"the worker has {had} GPUs"


def rollout(found: Build) -> Iterator[str]:
    """Check that a new worker waits for a free GPU, and that every node can be drained."""
    if (
        found.named("Deployment", "zlora-worker")["spec"]["strategy"]["rollingUpdate"]["maxSurge"]
        != 0
    ):
        yield "maxSurge: there is no spare GPU"
    for budget in found.of("PodDisruptionBudget"):
        if budget["spec"].get("maxUnavailable") in (None, 0, "0%"):
            name = budget["metadata"]["name"]
            yield f"PodDisruptionBudget {name}: a node cannot be drained: {budget['spec']}"


def _built_in(dockerfile: Path) -> dict[str, str]:
    """Return the variables that an image sets."""
    lines = re.findall(r"^ENV (.*)$", dockerfile.read_text("utf-8"), re.MULTILINE)
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(lines)))


def hardening(found: Build) -> Iterator[str]:
    """Check that containers have no unneeded rights, and images that cannot change."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    for name, spec, container in found.containers():
        pod, own = spec.get("securityContext", {}), container.get("securityContext", {})
        image, _, tag = container["image"].rpartition(":")
        ours, has_registry = "z-image-lora/" in image, "." in image.partition("/")[0]
        yield from _missing(
            name,
            {
                "runAsNonRoot": pod.get("runAsNonRoot") is True and pod.get("runAsUser", 0) > 0,
                "uid 10001": pod.get("runAsUser") == 10001 or not ours,
                "fsGroup, which may read the secrets": pod.get("fsGroup", 0)
                == pod.get("runAsGroup"),
                "seccompProfile RuntimeDefault": pod.get("seccompProfile", {}).get("type")
                == "RuntimeDefault",
                "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
                "no privilege escalation": own.get("allowPrivilegeEscalation") is False
                and not own.get("privileged"),
                "drop ALL": own.get("capabilities") == {"drop": ["ALL"]},
                "no token": spec.get("automountServiceAccountToken") is False,
                "no service links": spec.get("enableServiceLinks") is False,
                "memory request and limit": all(
                    "memory" in container["resources"][key] for key in ("requests", "limits")
                ),
                "a pinned image": bool(image) and "/" not in tag and tag != "latest",
                "a registry in the image's name, or never a pull": not ours
                or has_registry is (container.get("imagePullPolicy") != "Never"),
                "this version's image": tag == version or not ours,
                "a readiness and a liveness probe": {"readinessProbe", "livenessProbe"}
                <= container.keys(),
            },
        )


def _missing(name: str, held: dict[str, bool]) -> Iterator[str]:
    yield from (f"{name}: expected {what}" for what, holds in held.items() if not holds)


def demo(found: Build) -> Iterator[str]:
    """Check that the overlay's broker keeps jobs, and that its store opens only S3, with keys."""
    for name, spec, container in found.containers():
        program, *words = container["command"]
        held, given = mounted(spec, container), found.variables(container)
        options = {"--appendonly": "yes", "--maxmemory-policy": "noeviction"}
        if program == "valkey-server" and not (
            words[0] in held and options.items() <= set(zip(words[1::2], words[2::2], strict=True))
        ):
            yield f"{name}: expected a password and {options}"
        if program == "weed":
            yield from _missing(
                name,
                {
                    "logs to standard error": "-logtostderr" in words,
                    "loopback for everything except S3": "-ip.bind=127.0.0.1" in words,
                    "identities": any(f"-s3.config={path}" in words for path in held),
                    "a certificate for S3's gRPC": {given.get(variable) for variable in CERTIFICATE}
                    <= held,
                },
            )


def secrets(found: Build, folder: Path) -> Iterator[str]:
    """Check that the README's commands, or the demo's script, make every required Secret."""
    required = {
        (volume["secret"]["secretName"], item["key"])
        for _, pod in found.pods()
        for volume in pod["spec"].get("volumes", [])
        if "secret" in volume and not volume["secret"].get("optional")
        for item in volume["secret"].get("items", [{"key": "all keys: no `items`"}])
    } | {
        (reference["name"], reference["key"])
        for trigger in found.of("TriggerAuthentication")
        for reference in trigger["spec"]["secretTargetRef"]
    }
    source = folder / found.name / "secrets.sh"
    source = source if source.is_file() else folder / "README.md"
    yield from (
        f"{name}: {key}: not made in {source.name}"
        for name, key in sorted(required - _made(source))
    )


def _made(source: Path) -> set[tuple[str, str]]:
    """Return the Secrets and keys that the commands of a file make."""
    lines = source.read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"^(?:kubectl .*secret generic|make) (\S+) (.*)$", lines, re.MULTILINE)
    return {
        (name, key) for name, rest in commands for key in re.findall(r"--from-file=([\w.-]+)", rest)
    }
