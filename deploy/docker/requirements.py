"""Print what an image installs: the dependencies in a pyproject.toml, and those of given extras.

Usage: `requirements.py pyproject.toml extra ...`.
"""

import sys
import tomllib
from pathlib import Path

file, *extras = sys.argv[1:]
project = tomllib.loads(Path(file).read_text(encoding="utf-8"))["project"]
lines = [
    *project["dependencies"],
    *(line for extra in extras for line in project["optional-dependencies"][extra]),
]
print("\n".join(sorted(set(lines))))  # noqa: T201 - for a file
