"""On a worker's PYTHONPATH: what needs torch is taken from this folder, and the rest of the worker is the real one."""

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Final

FOLDER: Final = Path(__file__).parent
FAKES: Final = {f"zlora_worker.{name}": FOLDER / f"{name}.py" for name in ("checkpoint", "engine", "lora", "merge")}


class Fakes:
    """Finds a fake before the real module is looked for."""

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 - the import system's signature
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Where to load `name` from, if it is one of the fakes."""
        return importlib.util.spec_from_file_location(name, FAKES[name]) if name in FAKES else None


sys.meta_path.insert(0, Fakes())
