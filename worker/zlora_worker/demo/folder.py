"""Where the demo model lies: made in the data folder at first use, by whoever comes first."""

import os
import shutil
import tempfile
from pathlib import Path

_VERSION = 1  # of what `model` and `loras` build; a data folder may hold older ones


def demo_folder(home: Path) -> Path:
    """Where the demo model is, in diffusers' layout, with its LoRAs under `loras/`; it may not be built yet."""
    return home / "demo" / f"v{_VERSION}"


def build_demo(home: Path) -> Path:
    """The demo model's folder, built where it is missing."""
    folder = demo_folder(home)
    if not folder.is_dir():
        _build(folder)
    return folder


def _build(folder: Path) -> None:
    """Build aside and rename, so that the folder is whole or absent, whoever else builds it at the same time."""
    from diffusers import StableDiffusionXLPipeline  # seconds to import: only where there is something to build
    from zlora_worker.demo import loras, model

    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix="draft-", dir=folder.parent))
    try:
        model.build(draft)
        loras.build(StableDiffusionXLPipeline.from_pretrained(draft, local_files_only=True), draft / "loras")
        os.rename(draft, folder)
    except OSError:
        if not folder.is_dir():  # else another process was first, and its copy is the same
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
