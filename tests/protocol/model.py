"""Explore the protocol of one end in larger forms: `make model`.

Prints for each form the number of states, and the depth: the moves to the farthest state. The exit
status is 1 if a state violates a property; the shortest way to that state is printed.
"""

import sys
import time
from typing import Final

from protocol.one_end import Bounds, explore_protocol

FORMS: Final = {
    "an error, a killed process, a late request": Bounds(errors=1, deaths=1, late=1),
    "two errors, two late requests": Bounds(errors=2, deaths=0, late=2, expires=False),
    "two images, one of them taken": Bounds(
        errors=1, deaths=1, late=0, images=2, has_strange_image=True
    ),
    "three workers": Bounds(errors=1, deaths=0, late=0, workers=3, expires=False),
    "a loss of Redis": Bounds(errors=0, deaths=0, late=0, losses=1, has_replies=True),
}


def main() -> int:
    """Explore all forms, and return the exit status."""
    status = 0
    for name, bounds in FORMS.items():
        start = time.monotonic()
        found = explore_protocol(bounds)
        seconds = time.monotonic() - start
        extent = "all" if found.is_complete else "the first"
        sys.stdout.write(
            f"{name}: {extent} {found.states:,} states, depth {found.depth}, {seconds:.0f} s\n"
        )
        sys.stdout.flush()
        if found.violation:
            sys.stdout.write(found.text() + "\n")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
