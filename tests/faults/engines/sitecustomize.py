"""On a worker's PYTHONPATH: what needs torch is taken from this folder, and the rest of the worker is the real one.

`FAKE_NETWORK` names a folder where the worker's network is made up: names resolve as `names.json` says, each time to
the next of their addresses; no connection leaves the machine, and each that is tried is a line of `connections`.
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

FOLDER: Final = Path(__file__).parent
FAKES: Final = {
    f"zlora_worker.{name}": FOLDER / f"{name}.py"
    for name in ("checkpoint", "engine", "lora", "merge")
}
LOOPBACK: Final = ("127.", "::1")


class Fakes:
    """Finds a fake before the real module is looked for."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Where to load `name` from, if it is one of the fakes."""
        return importlib.util.spec_from_file_location(name, FAKES[name]) if name in FAKES else None


def make_up_network(folder: Path) -> None:
    """Names from a table, and nobody outside."""
    table: dict[str, list[str]] = json.loads((folder / "names.json").read_text())
    real, asked = socket.getaddrinfo, Counter[str]()

    def getaddrinfo(host: Any, port: Any, *options: Any, **more: Any) -> Any:
        if host in table:
            answers = table[host]
            asked[host] += 1
            return real(answers[min(asked[host], len(answers)) - 1], port, *options, **more)
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


sys.meta_path.insert(0, Fakes())
if "FAKE_NETWORK" in os.environ:
    make_up_network(Path(os.environ["FAKE_NETWORK"]))
