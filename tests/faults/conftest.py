"""Fixtures of fault tests: a broker and a tally for each file, a queue for each test."""

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from support import figures
from support.figures import Tally
from support.scene import CLEAN, Scene, Shared
from support.valkey import Valkey

MakeScene = Callable[..., Scene]


def pytest_configure(config: pytest.Config) -> None:
    """Print the sums also if only this folder is tested."""
    if not config.pluginmanager.has_plugin("support.figures"):
        config.pluginmanager.register(figures, "support.figures")


@pytest.fixture(scope="module")
def tally(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tally]:
    """Return the figures of one file."""
    counted = Tally()
    yield counted
    figures.record(figures.shared_folder(tmp_path_factory.getbasetemp()), counted)


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory, tally: Tally) -> Iterator[Valkey]:
    """Return the broker of one file; each test leaves it running."""
    with Valkey(tmp_path_factory.mktemp("valkey"), tally) as server:
        yield server


@pytest.fixture(scope="module")
def shared(
    tmp_path_factory: pytest.TempPathFactory, valkey: Valkey, tally: Tally
) -> Iterator[Shared]:
    """Return a queue and its worker for those tests of a file that leave the worker running."""
    folder = tmp_path_factory.mktemp("shared")
    made = Scene(folder / "scene", tally, broker_url=valkey.url, queue="shared")
    with closing(made):
        with made.worker() as running:
            yield made, running
        assert made.audit() == CLEAN


@pytest.fixture
def scene(
    tmp_path: Path, valkey: Valkey, tally: Tally, request: pytest.FixtureRequest
) -> Iterator[Scene]:
    """Return a queue for one test; at its end every job must have one result."""
    queue = re.sub(r"\W+", "-", request.node.name)
    made = Scene(tmp_path / "scene", tally, broker_url=valkey.url, queue=queue)
    yield made
    try:
        assert made.audit() == CLEAN
    finally:
        made.close()
