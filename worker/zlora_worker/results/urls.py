"""URLs of a result's images, and small images inside the result."""

import base64
import hashlib
import time
from typing import Final, NoReturn
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
    """Adds URLs to stored results, as the operator's settings and the request have it.

    A signed URL is a secret with an end, so no URL is ever stored.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        """Raise `InvalidSetting` if the store has no URLs of a kind that the settings name."""
        self._store, self._settings = store, settings
        default: UrlPolicy = "public" if settings.public_url else store.own_urls
        self._policies = settings.urls or (default,)
        for policy in self._policies:
            if policy in ("presigned", "file") and policy != store.own_urls:
                raise InvalidSetting(
                    f"{_SETTING}={policy}: this store has {store.own_urls} URLs",
                    {"name": _SETTING},
                )
            if policy == "public" and not settings.public_url:
                raise InvalidSetting(
                    f"{_SETTING}=public: ZLORA_PUBLIC_URL is not set", {"name": _SETTING}
                )

    @property
    def max_seconds(self) -> int:
        """Largest `url_expires_in` of a request."""
        return self._settings.url_seconds

    @property
    def policies(self) -> tuple[UrlPolicy, ...]:
        """URL policies that requests may choose, the default first."""
        return tuple(dict.fromkeys((*self._policies, "key")))

    def require(self, request: GenerateRequest) -> None:
        """Raise `InvalidRequest` if a request wants URLs that the operator does not give."""
        policy, seconds = request.url_policy, request.url_expires_in
        bound = self._settings.url_seconds
        if policy is not None and policy not in self.policies:
            choices = ", ".join(sorted(self.policies))
            _refuse("url_policy", f"Expected one of {choices}", policy)
        if seconds and self._policy(request) != "presigned":
            _refuse("url_expires_in", "Expected none, since no URL is signed here", seconds)
        if seconds and seconds > bound:
            _refuse("url_expires_in", f"Expected up to {bound}, this worker's bound", seconds)

    def with_urls(self, result: GenerateResult) -> GenerateResult:
        """Return a stored result with URLs made now; raise `StoreFailed` if they cannot be made."""
        request = result.request or GenerateRequest(prompt="")
        sheet = () if result.sheet is None else (result.sheet,)
        images = [self._with_url(image, request) for image in (*result.images, *sheet)]
        size = sum(image.size for image in images)
        if request.inline and size <= self._settings.inline_bytes:
            images = [self._with_data_uri(image) for image in images]
        return msgspec.structs.replace(
            result,
            images=tuple(images[: len(result.images)]),
            sheet=images[-1] if sheet else None,
        )

    def _policy(self, request: GenerateRequest) -> UrlPolicy:
        """Return the request's policy, or the default if the operator no longer offers it."""
        policy = request.url_policy
        if policy in self.policies:
            return policy
        return self._policies[0]

    def _with_url(self, image: ImageRef, request: GenerateRequest) -> ImageRef:
        policy = self._policy(request)
        if policy == "key":
            return msgspec.structs.replace(image, url=None, url_expires_at=None)
        if policy == "public":
            url = f"{self._settings.public_url}/{quote(self._store.name(image.key))}"
            return msgspec.structs.replace(image, url=url, url_expires_at=None)
        bound = self._settings.url_seconds
        seconds = min(request.url_expires_in or bound, bound)
        expires_at = time.time() + seconds if policy == "presigned" else None
        url = self._store.url(image.key, seconds)
        return msgspec.structs.replace(image, url=url, url_expires_at=expires_at)

    def _with_data_uri(self, image: ImageRef) -> ImageRef:
        # A result without inline data is complete, so a store that fails now costs only that data.
        try:
            data = self._store.get(image.key)
        except StoreFailed as error:
            logger.warning("%s is not inlined: %s", image.key, error)
            return image
        if data is None or hashlib.sha256(data).hexdigest() != image.sha256:
            logger.warning("%s is not inlined: the store has other bytes or none", image.key)
            return image
        uri = f"data:{image.content_type};base64,{base64.b64encode(data).decode()}"
        return msgspec.structs.replace(image, data_uri=uri)


def _refuse(field: str, expected: str, value: object) -> NoReturn:
    details = {"path": f"$.{field}", "value": str(value), "expected": expected}
    raise InvalidRequest(f"$.{field}: {expected}; the value is {value}", details)
