"""The compose files as docker-compose itself understands them, whatever this machine's user has set."""

import os
import subprocess
from pathlib import Path


def config(root: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """`docker-compose config`, as JSON: without `.env` and without variables of the files or of docker-compose."""
    command = ["docker-compose", "--env-file", "/dev/null", *options, "config", "--format", "json"]
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ZLORA_", "COMPOSE_"))
    }
    return subprocess.run(
        command, cwd=root, env=environ, capture_output=True, text=True, check=False
    )
