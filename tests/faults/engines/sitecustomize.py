"""Replaces the worker's modules that need torch by fakes, if this folder is on PYTHONPATH.

`FAKE_ENGINE` names another folder of fakes; modules without a file in it are the real ones.
`FAKE_NETWORK` names a folder for a simulated network: `names.json` maps each name to its addresses,
of which each lookup returns the next; no connection leaves the machine, and the file `connections`
gets one line per attempt. `FAKE_CLOCK` is the number of seconds by which the clock is wrong.
"""

import importlib.util
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Final

FOLDER: Final = Path(os.environ.get("FAKE_ENGINE", Path(__file__).parent))
MODULES: Final = {
    "loader.py": "zlora_worker.model.loader",
    "pipeline.py": "zlora_worker.model.pipeline",
    "reader.py": "zlora_worker.lora.reader",
    "merge.py": "zlora_worker.lora.merge",
}
FAKES: Final = {name: FOLDER / file for file, name in MODULES.items() if (FOLDER / file).exists()}
LOOPBACK: Final = ("127.", "::1")


class Fakes:
    """Finds a fake before Python looks for the real module."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Return the location of a fake, or None for every other module."""
        if name not in FAKES:
            return None
        return importlib.util.spec_from_file_location(name, FAKES[name])


def simulate_network(folder: Path) -> None:
    """Resolve names by a table, and refuse every connection that leaves the machine."""
    table: dict[str, list[str]] = json.loads((folder / "names.json").read_text())
    real, lookups = socket.getaddrinfo, Counter[str]()

    def getaddrinfo(host: Any, port: Any, *options: Any, **more: Any) -> Any:
        if host in table:
            answers = table[host]
            lookups[host] += 1
            return real(answers[min(lookups[host], len(answers)) - 1], port, *options, **more)
        if str(host)[:1].isdigit() or ":" in str(host) or host == "localhost":
            return real(host, port, *options, **more)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    def on_audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            host, port = arguments[1][:2]
            with (folder / "connections").open("a") as file:
                file.write(f"{host} {port}\n")
            if not host.startswith(LOOPBACK):
                raise ConnectionRefusedError(f"a test must not connect to {host}")

    socket.getaddrinfo = getaddrinfo
    sys.addaudithook(on_audit)


if "FAKE_CLOCK" in os.environ:
    from faults.engines import clock

    clock.set_wrong(float(os.environ["FAKE_CLOCK"]))
if "flower" not in sys.orig_argv:
    # A plugin of the command `celery`, which would import a web server at each start of a worker.
    sys.modules["flower"] = None  # type: ignore[assignment]
sys.meta_path.insert(0, Fakes())
if "FAKE_NETWORK" in os.environ:
    simulate_network(Path(os.environ["FAKE_NETWORK"]))
