"""One POST to the receiver of a webhook: guarded, in bounded time, without redirects."""

from http import HTTPStatus
from typing import Final

from zlora.http.client import AddressRefused, HttpClient, HttpError

_SECONDS: Final = 15.0  # for the whole request; a receiver may be silent until then


class WebhookDeliveryError(Exception):
    """A receiver has not accepted a webhook; the message contains no part of its URL.

    If `final`, the receiver will never accept it. `retry_after` is the receiver's `Retry-After` in
    seconds, 0 if there is none.
    """

    def __init__(self, reason: str, *, final: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.final, self.retry_after = final, retry_after


def post(client: HttpClient, url: str, body: bytes, headers: dict[str, str]) -> None:
    """Send JSON; raise `WebhookDeliveryError` if the receiver does not answer 2xx."""
    headers = {"Content-Type": "application/json", "User-Agent": "z-image-lora", **headers}
    try:
        client.post(url, body, headers=headers, seconds=_SECONDS)
    except AddressRefused as error:
        raise WebhookDeliveryError(str(error), final=True) from None
    except HttpError as error:
        if error.status is None:
            raise WebhookDeliveryError(str(error)) from None
        raise WebhookDeliveryError(
            f"the receiver answers {error.status}",
            final=error.status == HTTPStatus.GONE,
            retry_after=error.retry_after or 0.0,
        ) from None
