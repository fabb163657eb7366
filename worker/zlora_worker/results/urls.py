"""How whoever asked for a job gets its pictures: by URLs, and small ones inside the answer."""

import base64
import time
from typing import Final
from urllib.parse import quote

import msgspec
from celery.utils.log import get_logger
from zlora.errors import InvalidRequest, InvalidSetting, StoreFailed
from zlora.schema import GenerateRequest, GenerateResult, ImageRef, UrlPolicy

from zlora_worker.results.store import Store
from zlora_worker.settings import Settings

_SETTING: Final = "ZLORA_URLS"

logger = get_logger(__name__)


class ImageUrls:
    """What the operator's settings make of a stored result; a signature is a secret, and ends, so none is stored."""

    def __init__(self, store: Store, settings: Settings) -> None:
        """Raises `InvalidSetting` where the store has no such URLs."""
        self._store, self._settings = store, settings
        self._policies = settings.urls or (
            ("public",) if settings.public_url else (store.own_urls,)
        )
        for policy in self._policies:
            if policy in ("presigned", "file") and policy != store.own_urls:
                raise InvalidSetting(
                    f"{_SETTING}={policy}: this store's own are {store.own_urls}",
                    {"name": _SETTING},
                )
            if policy == "public" and not settings.public_url:
                raise InvalidSetting(
                    f"{_SETTING}=public: ZLORA_PUBLIC_URL is not set", {"name": _SETTING}
                )

    def require(self, request: GenerateRequest) -> None:
        """Raises `InvalidRequest` where a request asks for more than the operator gives."""
        bound = self._settings.url_seconds
        if request.url_policy not in (None, "key", *self._policies):
            _refuse(
                "url_policy",
                f"Expected one of {', '.join(sorted({'key', *self._policies}))}",
                request.url_policy,
            )
        if request.url_expires_in and self._policy(request) != "presigned":
            _refuse(
                "url_expires_in",
                "Expected none, since no URL is signed here",
                request.url_expires_in,
            )
        if request.url_expires_in and request.url_expires_in > bound:
            _refuse(
                "url_expires_in",
                f"Expected up to {bound}, this worker's bound",
                request.url_expires_in,
            )

    def shown(self, result: GenerateResult) -> GenerateResult:
        """A stored result with URLs as of now; raises `StoreFailed` where they cannot be made."""
        request = result.request or GenerateRequest(prompt="")
        images = tuple(self._linked(image, request) for image in result.images)
        small = sum(image.size for image in images) <= self._settings.inline_bytes
        if request.inline and small:
            images = tuple(self._inlined(image) for image in images)
        return msgspec.structs.replace(result, images=images)

    def _policy(self, request: GenerateRequest) -> UrlPolicy:
        """What a request asked for may be given no more when its result is asked for again."""
        asked = request.url_policy
        return asked if asked and asked in ("key", *self._policies) else self._policies[0]

    def _linked(self, image: ImageRef, request: GenerateRequest) -> ImageRef:
        policy, expires_at = self._policy(request), None
        url: str | None = None
        if policy == "public":
            url = f"{self._settings.public_url}/{quote(self._store.name(image.key))}"
        elif policy != "key":
            bound = self._settings.url_seconds
            seconds = min(request.url_expires_in or bound, bound)
            expires_at = time.time() + seconds if policy == "presigned" else None
            url = self._store.url(image.key, seconds)
        return msgspec.structs.replace(image, url=url, url_expires_at=expires_at)

    def _inlined(self, image: ImageRef) -> ImageRef:
        """With its bytes, where the store gives them now: the result is one without them too, and has its URL."""
        try:
            data = self._store.get(image.key)
        except StoreFailed as error:
            logger.warning("%s does not come inline: %s", image.key, error)
            return image
        if data is None:
            return image
        uri = f"data:{image.content_type};base64,{base64.b64encode(data).decode()}"
        return msgspec.structs.replace(image, data_uri=uri)


def _refuse(field: str, expected: str, value: object) -> None:
    details = {"path": f"$.{field}", "value": str(value), "expected": expected}
    raise InvalidRequest(f"$.{field}: {expected}; the value is {value}", details)
