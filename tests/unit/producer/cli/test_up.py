"""`zlora up`, but for the stack itself."""

from pathlib import Path
from typing import Self

import pytest
from click.testing import CliRunner
from zlora import embedded
from zlora.cli import main


class Standing:
    """A stack over a broker with a password, until it is looked at."""

    broker_url, home = "redis://:a-secret@redis:6379/0", Path("/data")

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check(self) -> None:
        raise KeyboardInterrupt


def test_the_broker_is_told_without_its_password(
    monkeypatch: pytest.MonkeyPatch, handlers: None
) -> None:
    monkeypatch.setattr(embedded, "EmbeddedStack", Standing)

    told = CliRunner().invoke(main, ["up"]).output

    assert "redis://redis:6379/0" in told
    assert "a-secret" not in told
