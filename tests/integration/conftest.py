"""Variables of a real worker."""

from pathlib import Path

import pytest
from support.tiny_folder import tiny_model


@pytest.fixture(scope="module")
def worker_environ(
    broker_url: str, model_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Variables of a worker with the tiny model, a store and a cache, for one test file."""
    folder = tmp_path_factory.mktemp("worker")
    return {
        "ZLORA_BROKER_URL": broker_url,
        "ZLORA_HOME": str(model_home),
        "ZLORA_MODEL": str(tiny_model(model_home)),
        "ZLORA_DEVICE": "cpu",
        "ZLORA_STORE": (folder / "store").as_uri(),
        "ZLORA_LORA_CACHE": str(folder / "loras"),
    }
