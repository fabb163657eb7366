"""A broker that may be hurt and a tally for each file of fault tests, a queue and a folder for each test."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import figures
from support.figures import Tally
from support.scene import CLEAN, Scene
from support.valkey import Valkey

MakeScene = Callable[..., Scene]


def pytest_configure(config: pytest.Config) -> None:
    """Print the figures, also where only this folder is tested."""
    if not config.pluginmanager.has_plugin("support.figures"):
        config.pluginmanager.register(figures, "support.figures")


@pytest.fixture(scope="module")
def tally(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tally]:
    """The figures of one file."""
    counted = Tally()
    yield counted
    figures.record(figures.shared_folder(tmp_path_factory.getbasetemp()), counted)


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory, tally: Tally) -> Iterator[Valkey]:
    """A broker for one file, which leaves it as it was: running."""
    with Valkey(tmp_path_factory.mktemp("valkey"), tally) as server:
        yield server


@pytest.fixture
def scene(
    tmp_path: Path, valkey: Valkey, tally: Tally, request: pytest.FixtureRequest
) -> Iterator[Scene]:
    """A queue for one test. At its end every job has an answer, and only one."""
    queue = re.sub(r"\W+", "-", request.node.name)
    made = Scene(tmp_path / "scene", tally, broker_url=valkey.url, queue=queue)
    yield made
    try:
        assert made.audit() == CLEAN
    finally:
        made.close()
