"""`zlora serve` as a process on a free port of loopback, and its API keys."""

import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import httpx
from support.processes import clean_environ, free_port, wait_until
from zlora.server import tenants
from zlora.server.tenants import KeyFile, Tenant

_END_SECONDS: Final = 20.0  # for open requests, before the process is killed

_NO_TLS: Final = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the default takes 30 ms to load


class Server:
    """A server process, which can be killed and started again."""

    def __init__(
        self,
        broker_url: str,
        *options: str,
        log: Path | None,
        first: str = "",
        python: str = sys.executable,
        **variables: str,
    ) -> None:
        self.port, self._options, self.log, self._python = free_port(), options, log, python
        self._code = f"{first}\nfrom zlora.cli import main; main()"
        self._environ = clean_environ({"ZLORA_BROKER_URL": broker_url, **variables})
        self.url = f"{'https' if '--certificate' in options else 'http'}://localhost:{self.port}"

    def start(self) -> None:
        """Start the process, and wait until it listens."""
        command = [self._python, "-P", "-c", self._code, "serve"]
        command += ["--port", str(self.port), *self._options]
        if self.log is None:
            self.process = subprocess.Popen(command, env=self._environ)
        else:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    command, env=self._environ, stdout=log, stderr=subprocess.STDOUT
                )
        wait_until(self._listens, "zlora serve listens")

    def stop(self) -> None:
        """End the process."""
        self.process.terminate()
        try:
            self.process.wait(_END_SECONDS)
        finally:
            self.kill()

    def kill(self) -> None:
        """Kill the process (kill -9)."""
        self.process.kill()
        self.process.wait()

    def client(self, key: str | None = None) -> httpx.Client:
        """Return a client, with an API key."""
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(
            base_url=self.url, headers=headers, trust_env=False, verify=_NO_TLS, timeout=60
        )

    def memory(self) -> int:
        """Return the resident memory of the process in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (kilobytes,) = (line.split()[1] for line in status.splitlines() if "VmRSS:" in line)
        return int(kilobytes) * 1024

    def _listens(self) -> bool:
        assert self.process.poll() is None, f"zlora serve has ended: {self.process.returncode}"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


@contextmanager
def running(
    broker_url: str,
    *options: str,
    log: Path | None = None,
    first: str = "",
    python: str = sys.executable,
    **variables: str,
) -> Iterator[Server]:
    """Serve the queue of a broker; `options` are those of the command.

    `first` is code that the process runs before, such as one that shortens a deadline. `python` may
    be that of another version.
    """
    server = Server(broker_url, *options, log=log, first=first, python=python, **variables)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextmanager
def serve(broker_url: str, *options: str, **variables: str) -> Iterator[str]:
    """Serve the queue of a broker; yield the base URL. `options` are those of the command."""
    with running(broker_url, *options, log=None, first="", **variables) as server:
        yield server.url


def write_keys(file: Path, **rights: Tenant) -> dict[str, str]:
    """Write a file of API keys, one for each tenant; return the keys by tenant."""
    found = {name: tenants.new_key(name, now=time.time()) for name in rights}
    content = KeyFile(tenants=dict(rights), keys=tuple(key for _, key in found.values()))
    tenants.write(file, content)
    return {name: text for name, (text, _) in found.items()}
