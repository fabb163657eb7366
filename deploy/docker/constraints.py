"""Print the pins of the images: the installed version of each package that the given extras need.

Run it after `make test`:

    cd deploy/docker
    ../../.venv/bin/python constraints.py worker flower preflight > constraints.txt
"""

import sys
from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.version import Version

pins: dict[str, str] = {}
seen: set[tuple[str, frozenset[str]]] = set()
wanted = [("z-image-lora", frozenset(sys.argv[1:]))]
while wanted:
    name, extras = wanted.pop()
    if (name, extras) in seen:
        continue
    seen.add((name, extras))
    found = distribution(name)
    pins[found.name] = Version(
        found.version
    ).public  # CPU wheels have the same version with a suffix
    for line in found.requires or []:
        needed = Requirement(line)
        if not needed.marker or any(
            needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)
        ):
            wanted.append((needed.name, frozenset(needed.extras)))
del pins["z-image-lora"]
print("# Written by deploy/docker/constraints.py: what the tests ran with.")  # noqa: T201 - for a file
print("\n".join(f"{name}=={pins[name]}" for name in sorted(pins, key=str.lower)))  # noqa: T201 - for a file
