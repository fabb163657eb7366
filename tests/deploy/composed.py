"""Read the compose files by docker-compose, independent of this user's settings."""

import os
import subprocess
from pathlib import Path


def config(root: Path, *options: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run `docker-compose config` without `.env`, and with no other variables of the project."""
    command = ["docker-compose", "--env-file", "/dev/null", *options, "config", "--format", "json"]
    environ = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ZLORA_", "COMPOSE_"))
    }
    environ |= variables
    return subprocess.run(
        command, cwd=root, env=environ, capture_output=True, text=True, check=False
    )
