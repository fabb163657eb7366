"""Errors: each crosses the broker as itself, and the tree in the docstring is true."""

import json
import re
from typing import Any

from celery import Celery
from zlora import errors
from zlora.errors import ERRORS, InvalidRequest, LoraTooLarge, ZloraError

DETAILS = {"path": "$.loras[0]", "max_bytes": 7, "names": ["a", None], "deep": {"é": 0.5}}


def round_trip(error: ZloraError) -> object:
    """Return what a producer gets of an error that a worker raised, by way of Celery's JSON."""
    with Celery(broker="memory://", backend="cache+memory://", set_as_current=False) as app:
        app.conf.update(result_serializer="json", accept_content=["json"])
        wire = json.dumps(app.backend.prepare_exception(error))
        arrived: object = app.backend.exception_to_python(json.loads(wire))
    return arrived


def test_each_error_crosses_the_broker_as_itself() -> None:
    for cls in ERRORS:
        arrived = round_trip(cls("a sentence, é", DETAILS))

        assert type(arrived) is cls
        assert str(arrived) == "a sentence, é"
        assert arrived.details == DETAILS


def test_the_default_message_is_the_first_line_of_the_docstring() -> None:
    for cls in ERRORS:
        error = cls()

        assert str(error) == error.message == (cls.__doc__ or "").splitlines()[0]
        assert error.message.endswith(".")
        assert error.details == {}
        assert round_trip(error).__dict__ == error.__dict__


def test_each_class_has_its_own_code_and_says_itself_whether_it_is_retryable() -> None:
    assert len({cls.code for cls in ERRORS}) == len(ERRORS)
    for cls in ERRORS:
        assert re.fullmatch(r"[a-z]+(_[a-z]+)*", vars(cls)["code"])
        assert cls.retryable == vars(cls).get("retryable", False)
        assert errors.by_code(cls.code) is cls
    assert errors.by_code("of_a_newer_version") is ZloraError


def test_the_tree_in_the_docstring_is_the_tree_of_classes() -> None:
    drawn: list[type[ZloraError]] = [ZloraError]
    parents: dict[int, type[ZloraError]] = {0: ZloraError}
    lines = re.findall(r"^([│ ]*)[├└]── (\w+)$", errors.__doc__ or "", re.MULTILINE)
    for indent, name in lines:
        depth = 1 + len(indent) // 4
        cls = getattr(errors, name)
        assert cls.__bases__ == (parents[depth - 1],)
        parents[depth] = cls
        drawn.append(cls)

    assert drawn == list(ERRORS)


def test_an_error_is_its_two_arguments() -> None:
    details: dict[str, Any] = {"max_bytes": 7}

    error = LoraTooLarge("too much", details)

    assert error.args == ("too much", details)
    assert isinstance(error, errors.LoraError)
    assert issubclass(errors.InvalidJobId, InvalidRequest)


def test_details_that_are_added_later_travel_too() -> None:
    error = LoraTooLarge("too much", {"max_bytes": 7})
    error.add_details(index=1)

    arrived = round_trip(error)

    assert isinstance(arrived, LoraTooLarge)
    assert arrived.details == {"max_bytes": 7, "index": 1}


def test_a_message_is_one_line() -> None:
    assert str(LoraTooLarge("a\nb\x1b[0m")) == "a b [0m"
