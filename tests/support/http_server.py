"""`zlora serve` as a process on a free port of loopback."""

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from support.processes import clean_environ, free_port, wait_until


@contextmanager
def serve(broker_url: str, *options: str, **variables: str) -> Iterator[str]:
    """Serve the queue of a broker; yield the base URL. `options` are those of the command."""
    port = free_port()
    command = [sys.executable, "-c", "from zlora.cli import main; main()", "serve"]
    process = subprocess.Popen(
        [*command, "--port", str(port), *options],
        env=clean_environ({"ZLORA_BROKER_URL": broker_url, **variables}),
    )

    def listens() -> bool:
        assert process.poll() is None, f"zlora serve has ended with {process.returncode}"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens, "zlora serve listens")
        scheme = "https" if "--certificate" in options else "http"
        yield f"{scheme}://localhost:{port}"
    finally:
        process.terminate()
        process.wait(20)
