"""Errors as problem documents (RFC 9457)."""

import json
from collections.abc import Iterator

import pytest
from zlora import errors
from zlora.errors import BrokerUnavailable, InvalidRequest, InvalidSetting, LoraError, ZloraError
from zlora.server import problems


def descendants(kind: type[ZloraError]) -> Iterator[type[ZloraError]]:
    """Yield a class and all of its subclasses."""
    yield kind
    for child in kind.__subclasses__():
        yield from descendants(child)


@pytest.mark.parametrize("kind", [*descendants(InvalidRequest), *descendants(LoraError)])
def test_an_error_of_the_request_is_no_fault_of_the_server(kind: type[ZloraError]) -> None:
    """Files of other servers are 502, a full cache is 503; all else is 4xx."""
    status = problems.status_of(kind())
    assert status < 500 or (kind.retryable and status in (502, 503))


@pytest.mark.parametrize("kind", list(descendants(ZloraError)))
def test_an_error_is_a_document_with_its_code(kind: type[ZloraError]) -> None:
    answer = problems.answer(kind("what", {"path": "$.x", "value": 1, "more": [2]}))
    document = json.loads(bytes(answer.body))

    assert document["code"] == kind.code
    assert document["status"] == answer.status_code
    assert (document["path"], document["value"]) == ("$.x", 1)
    assert document["details"] == {"more": [2]}
    must_wait = answer.status_code in (429, 503)
    assert ("retry-after" in answer.headers) == must_wait
    assert not must_wait or kind.retryable


def test_half_a_surrogate_pair_is_answered() -> None:
    """Names of files may have such text, which UTF-8 has not."""
    answer = problems.answer(errors.LoraNotFound("no file", {"name": "a\ud800"}))
    assert json.loads(bytes(answer.body))["details"] == {"name": "a\ud800"}


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "2"), (0, "2"), (0.2, "1"), (59.2, "60"), ("soon", "2")]
)
def test_retry_after_is_in_whole_seconds(seconds: object, shown: str) -> None:
    answer = problems.answer(problems.TooManyRequests("", {"retry_after": seconds}))
    assert answer.headers["retry-after"] == shown


def test_clients_see_nothing_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    """Addresses, paths and rights are in the log only; the job's id stays."""
    secret = "redis.internal:6379 user producer"
    broker = problems.public(BrokerUnavailable(secret, {"job_id": "j", "host": secret}))
    setting = problems.public(InvalidSetting(secret, {"name": secret}))

    for error in (broker, setting):
        assert secret not in json.dumps(error.as_document())
        assert error.retryable
    assert broker.details == {"job_id": "j"}
    assert caplog.text.count(secret) == 2
