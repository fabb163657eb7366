"""The words for failure: each arrives as itself, and the drawing of their tree is true."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from zlora import errors
from zlora.errors import InvalidRequest, LoraTooLarge, ZloraError

CLASSES: list[type[ZloraError]] = [getattr(errors, name) for name in errors.__all__]
DETAILS = {"path": "$.loras[0]", "max_bytes": 7, "names": ["a", None], "deep": {"é": 0.5}}


def round_trip(error: ZloraError) -> object:
    """What a producer gets of an error that a worker raised, by Celery's own way: prepared, as JSON, raised again."""
    with Celery(broker="memory://", backend="cache+memory://", set_as_current=False) as app:
        app.conf.update(result_serializer="json", accept_content=["json"])
        wire = json.dumps(app.backend.prepare_exception(error))
        arrived: object = app.backend.exception_to_python(json.loads(wire))
    return arrived


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_crosses_the_broker_as_itself(cls: type[ZloraError]) -> None:
    arrived = round_trip(cls("a sentence, é", DETAILS))

    assert type(arrived) is cls
    assert str(arrived) == "a sentence, é"
    assert arrived.details == DETAILS


@pytest.mark.parametrize("cls", CLASSES)
def test_an_error_without_a_message_says_its_class_s_own_sentence(cls: type[ZloraError]) -> None:
    error = cls()

    assert str(error) == error.message == (cls.__doc__ or "").splitlines()[0]
    assert error.details == {}
    assert round_trip(error).__dict__ == error.__dict__


def test_a_code_names_one_class() -> None:
    assert len({cls.code for cls in CLASSES}) == len(CLASSES)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", cls.code) for cls in CLASSES)


def test_code_and_retryable_are_facts_of_each_class() -> None:
    """Neither is inherited by chance: a class says its own code, and is not retryable only because its parent is."""
    for cls in CLASSES:
        assert "code" in vars(cls)
        assert cls.retryable == vars(cls).get("retryable", False)


def drawn_tree() -> list[tuple[int, str, str, bool]]:
    """Depth, name, code and retryable of each line of the docstring's drawing."""
    lines = re.findall(
        r"^([│ ]*)[├└]── (\w+)(?: +(\w+) +\S.*?)?( retryable)?$", errors.__doc__ or "", re.MULTILINE
    )
    return [
        (1 + len(indent) // 4, name, code, bool(retryable))
        for indent, name, code, retryable in lines
    ]


def test_the_drawn_tree_is_the_tree() -> None:
    """Every class under its parent, with its code and whether it is retryable; `LoraError` is drawn by its name."""
    parents: dict[int, type[ZloraError]] = {0: ZloraError}
    drawn: list[type[ZloraError]] = [ZloraError]
    for depth, name, code, retryable in drawn_tree():
        cls = getattr(errors, name)
        assert cls.__bases__ == (parents[depth - 1],)
        assert (code, retryable) == (
            ("", False) if name == "LoraError" else (cls.code, cls.retryable)
        )
        parents[depth] = cls
        drawn.append(cls)

    assert len(drawn) == len(set(drawn))
    assert set(drawn) == set(CLASSES)


def test_all_is_sorted_and_complete() -> None:
    source = ast.parse(Path(errors.__file__).read_text())
    defined = {node.name for node in source.body if isinstance(node, ast.ClassDef)}

    assert errors.__all__ == sorted(defined)


def test_an_error_is_its_two_arguments() -> None:
    details: dict[str, Any] = {"max_bytes": 7}

    error = LoraTooLarge("too much", details)

    assert error.args == ("too much", details)
    assert isinstance(error, errors.LoraError)
    assert issubclass(errors.InvalidJobId, InvalidRequest)
