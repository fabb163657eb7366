"""One POST to a receiver of webhooks: through the guard, within its time, and without a redirect."""

from http import HTTPStatus
from typing import Final

import urllib3.exceptions
from requests import Response
from requests.exceptions import InvalidSchema, InvalidURL, RequestException
from ssrfguard import SSRFGuardError
from zlora.http.client import network_reason, refusal, retry_after
from zlora.http.ssrf_guard import CONNECT_SECONDS, GuardedSession

_SECONDS: Final = 15.0  # for all of it: a receiver may be silent until then


class WebhookDeliveryError(Exception):
    """Why a receiver has not taken a message, without the secrets of its URL.

    `final` where it never will; `retry_after` are the seconds that it asks to be left alone.
    """

    def __init__(self, reason: str, *, final: bool = False, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.final, self.retry_after = final, retry_after


def post(session: GuardedSession, url: str, body: bytes, headers: dict[str, str]) -> None:
    """Send JSON, and read no more of the answer than its head; raises `WebhookDeliveryError`."""
    told = {
        "Content-Type": "application/json",
        "User-Agent": "z-image-lora",
        "Accept-Encoding": "identity",
    }
    with session.deadline(_SECONDS) as over:
        try:
            with session.post(
                url,
                data=body,
                headers=told | headers,
                stream=True,
                timeout=(CONNECT_SECONDS, _SECONDS),
                allow_redirects=False,
            ) as response:
                _require_taken(response)
        except SSRFGuardError as error:
            raise WebhookDeliveryError(refusal(error), final=True) from None
        except (
            InvalidURL,
            InvalidSchema,
            UnicodeError,
        ):  # the last is of names that no name service takes
            raise WebhookDeliveryError("no URL that is opened", final=True) from None
        except (RequestException, urllib3.exceptions.HTTPError) as error:
            raise WebhookDeliveryError(
                "no answer in time" if over.is_set() else network_reason(error)
            ) from None


def _require_taken(response: Response) -> None:
    status = response.status_code
    if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        raise WebhookDeliveryError(
            f"the receiver answers {status}",
            final=status == HTTPStatus.GONE,
            retry_after=retry_after(response) or 0.0,
        )
