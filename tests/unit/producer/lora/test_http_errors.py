"""Each failed HTTP request for a LoRA is one LoRA error."""

import pytest
from zlora.errors import (
    LoraError,
    LoraForbidden,
    LoraNotAllowed,
    LoraNotFound,
    LoraTooLarge,
    LoraUnreachable,
)
from zlora.http.client import AddressRefused, BodyTooLarge, CertificateRefused, HttpError
from zlora.lora.http_errors import lora_error


@pytest.mark.parametrize(
    ("statuses", "kind"),
    [
        ((404, 410), LoraNotFound),
        ((400, 401, 402, 403, 405, 416, 418, 451), LoraForbidden),
        ((408, 425, 429, 500, 502, 503, 504, 599), LoraUnreachable),
        ((201, 204, 206, 300, 301, 304, 305), LoraUnreachable),
    ],
)
def test_each_status_is_a_lora_error_with_the_status(
    statuses: tuple[int, ...], kind: type[LoraError]
) -> None:
    for status in statuses:
        error = lora_error(HttpError(f"answers {status}", status=status), name="https://h/x")

        assert type(error) is kind
        assert error.message == f"https://h/x: answers {status}"
        assert error.details == {"status": status}


def test_each_failure_without_a_status_is_a_lora_error() -> None:
    for failure, kind in (
        (AddressRefused("x"), LoraNotAllowed),
        (CertificateRefused("x"), LoraNotAllowed),
        (BodyTooLarge("x"), LoraTooLarge),
        (HttpError("x"), LoraUnreachable),
        (HttpError("x", transient=True), LoraUnreachable),
    ):
        error = lora_error(failure, name="https://h/x")

        assert type(error) is kind
        assert error.details == {}


def test_retry_after_is_a_detail_of_transient_failures_only() -> None:
    busy = HttpError("x", status=503, retry_after=7.0, transient=True)
    absent = HttpError("x", status=404, retry_after=7.0)

    assert lora_error(busy, name="a").retry_after == 7.0
    assert lora_error(absent, name="a").retry_after == 0.0
