"""Variables of a real worker, and a worker without a model."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.tiny_folder import tiny_model

if TYPE_CHECKING:  # imports torch
    from support.inline_worker import InlineWorker


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


@pytest.fixture(scope="module")
def inline_worker(
    broker_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator["InlineWorker"]:
    """Worker of a queue of its own, whose images are files that a server can read."""
    import celery.backends.redis
    import zlora_worker.generate
    from support.fakes import links
    from support.inline_worker import InlineWorker
    from zlora_worker.results.store import FolderStore

    with pytest.MonkeyPatch.context() as patch:
        # As in a child process: no subscription to results.
        patch.setattr(celery.backends.redis, "task_join_will_block", lambda: True)
        made = InlineWorker(broker_url, tmp_path_factory.mktemp("worker"))
        patch.setattr(zlora_worker.generate, "generate", made.generate)
        made.store = FolderStore(tmp_path_factory.mktemp("store"))  # type: ignore[assignment]
        made.urls = links(made.store)
        made.install()
        yield made
        made.close()
