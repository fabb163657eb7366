"""Write what the images install: `<image>.lock`, with version and sha256 of each package.

The versions are those in this environment, so run it after `make test`, on Linux on x86_64:

    .venv/bin/python deploy/docker/locks.py

pip downloads the packages from PyPI, 3 GB with CUDA's, and installs none.
"""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Final

from packaging.utils import canonicalize_name
from packaging.version import Version

FOLDER: Final = Path(__file__).parent
ROOT: Final = FOLDER.parents[1]
# Extras of this package by image; `build` is what makes the wheel of this package.
IMAGES: Final = {"build": (), "tools": ("flower", "preflight", "server"), "worker": ("worker",)}
_HEADER: Final = "# Written by deploy/docker/locks.py for Python 3.11 on Linux on x86_64.\n"


def requirements(image: str) -> list[str]:
    """Return the requirements of an image, as pyproject.toml names them."""
    document = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    if image == "build":
        return list(document["build-system"]["requires"])
    project = document["project"]
    lines = list(project["dependencies"])
    for extra in IMAGES[image]:
        lines += project["optional-dependencies"][extra]
    return lines


def lock(image: str) -> str:
    """Return the lock file of an image: pip resolves it from PyPI alone."""
    installed = {canonicalize_name(found.name): found.version for found in distributions()}
    pins = [f"{name}=={Version(version).public}" for name, version in installed.items()]
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "constraints"), Path(folder, "report")
        constraints.write_text("\n".join(pins), encoding="utf-8")
        options = ["--dry-run", "--ignore-installed", "--no-input", "--only-binary=:all:"]
        files = ["--constraint", str(constraints), "--report", str(report)]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", *options, *files, *requirements(image)],
            env=environ | {"PIP_CONFIG_FILE": os.devnull},
            check=True,
        )
        found = json.loads(report.read_bytes())["install"]
    return _HEADER + "\n".join(sorted(map(_line, found))) + "\n"


def _line(package: dict[str, Any]) -> str:
    name, version = package["metadata"]["name"], package["metadata"]["version"]
    sha256 = package["download_info"]["archive_info"]["hashes"]["sha256"]
    return f"{canonicalize_name(name)}=={version} --hash=sha256:{sha256}"


if __name__ == "__main__":
    for each in IMAGES:
        (FOLDER / f"{each}.lock").write_text(lock(each), encoding="utf-8")
