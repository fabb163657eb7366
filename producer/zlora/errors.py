"""Errors of producers and workers.

```
ZloraError
├── InvalidRequest
│   └── InvalidJobId
├── LoraError
│   ├── LoraNotAllowed
│   ├── LoraNotFound
│   ├── LoraForbidden
│   ├── LoraUnreachable
│   ├── LoraTooLarge
│   ├── LoraCorrupt
│   ├── NotSafetensors
│   ├── LoraMismatch
│   ├── EmbeddingMismatch
│   └── CacheFull
├── GenerationFailed
├── OutOfMemory
├── BaseNotRestored
├── StoreFailed
├── InternalError
├── ModelUnavailable
├── BrokerUnavailable
├── ResultTimeout
├── ImageUnavailable
├── JobLost
├── JobPoisoned
├── JobTimeout
├── JobExpired
├── JobRevoked
├── JobUnknown
│   └── JobVanished
├── Conflict
├── InvalidWebhook
├── InvalidSetting
└── StackError
```

`code` is the word for programs and dashboards, and never changes; `retryable` says whether the same
request may succeed later. Both are facts of the class. An instance has a message for people and a
dict of plain JSON details. These two are exactly its `args`, which Celery's JSON result carries, so
an error that is raised in the worker arrives in the producer as the same class.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Final, Self


class ZloraError(Exception):
    """An error of a newer version, with a code that this version does not know."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None, details: dict[str, Any] | None = None) -> None:
        """Take a message for people (default: the class's summary) and details for programs."""
        text = message or self.summary()
        # A file name or a header may be part of the text: it must not begin a new line in a log.
        self.message = "".join(letter if letter.isprintable() else " " for letter in text)
        self.details = details or {}
        super().__init__(self.message, self.details)

    @classmethod
    def summary(cls) -> str:
        """Return the first line of the docstring of the class."""
        return (cls.__doc__ or cls.__name__).strip().splitlines()[0]

    def add_details(self, **details: Any) -> None:
        """Add details that are known only after the error was raised."""
        self.details = {**self.details, **details}
        self.args = (self.message, self.details)

    def as_document(self) -> dict[str, Any]:
        """Return the error as plain JSON data: `code`, `message`, `retryable` and `details`."""
        return {
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            "details": self.details,
        }

    @property
    def retry_after(self) -> float:
        """Seconds to wait before the next request to the same server; 0 if it did not say."""
        seconds = self.details.get("retry_after")
        return float(seconds) if isinstance(seconds, int | float) else 0.0

    def __str__(self) -> str:
        return self.message


class InvalidRequest(ZloraError):
    """The request does not match the schema.

    Details: `path`, `value`, `expected`.
    """

    code = "invalid_request"


class InvalidJobId(InvalidRequest):
    """The job id is not 1 to 64 characters of A-Z, a-z, 0-9, `_` and `-`."""

    code = "invalid_job_id"


class LoraError(ZloraError):
    """A LoRA, an embedding or an image cannot be used: the parent of all errors of their files.

    Details: of a LoRA `index` in the request's `loras`; of an embedding that in its `embeddings`,
    and the name of that list as `field`.
    """

    code = "lora_error"


class LoraNotAllowed(LoraError):
    """The scheme, host or address of the file is not allowed by the operator of the worker."""

    code = "lora_not_allowed"


class LoraNotFound(LoraError):
    """There is no file at that address."""

    code = "lora_not_found"


class LoraForbidden(LoraError):
    """The source of the file denies access to this worker."""

    code = "lora_forbidden"


class LoraUnreachable(LoraError):
    """The source of the file does not answer, answers with an error, or is too slow.

    Details: `status`, `retry_after` in seconds.
    """

    code = "lora_unreachable"
    retryable = True


class LoraTooLarge(LoraError):
    """The file has more bytes than the worker accepts."""

    code = "lora_too_large"


class LoraCorrupt(LoraError):
    """The bytes of the file do not match the sha256 of the request."""

    code = "lora_corrupt"


class NotSafetensors(LoraError):
    """The file is not a valid safetensors file."""

    code = "not_safetensors"


class LoraMismatch(LoraError):
    """The LoRA is a valid file, but does not fit the model of the worker."""

    code = "lora_mismatch"


class EmbeddingMismatch(LoraError):
    """The embedding is a valid file, but does not fit the model or the other embeddings of the job.

    Details: `token`, if the error is about one.
    """

    code = "embedding_mismatch"


class CacheFull(LoraError):
    """The LoRA cache cannot store the file: all of it is in use, or its disk is full or fails."""

    code = "cache_full"
    retryable = True


class GenerationFailed(ZloraError):
    """The model returned no image, or one with NaN or Inf."""

    code = "generation_failed"


class OutOfMemory(ZloraError):
    """The image needs more memory than the worker has.

    Details: `width`, `height`.
    """

    code = "out_of_memory"


class BaseNotRestored(ZloraError):
    """The base model differs after the job, so its images cannot be trusted."""

    code = "base_not_restored"
    retryable = True


class StoreFailed(ZloraError):
    """The result could not be written to the object store."""

    code = "store_failed"
    retryable = True


class InternalError(ZloraError):
    """The worker failed because of a fault of its own."""

    code = "internal"


class ModelUnavailable(ZloraError):
    """The base model cannot be loaded."""

    code = "model_unavailable"


class BrokerUnavailable(ZloraError):
    """Redis does not answer."""

    code = "broker_unavailable"
    retryable = True


class ResultTimeout(ZloraError):
    """There is no result within the timeout of the caller; the job goes on."""

    code = "result_timeout"
    retryable = True


class ImageUnavailable(ZloraError):
    """An image of a result cannot be downloaded.

    Details: `key`.
    """

    code = "picture_unavailable"  # older than the name of the class; programs compare it
    retryable = True


class JobLost(ZloraError):
    """The worker was killed or crashed during the job."""

    code = "job_lost"
    retryable = True


class JobPoisoned(ZloraError):
    """Too many child processes ended, or too many workers were lost, while they had the job.

    Details: `attempts`, each with `host`, `worker`, `pid`, `at` and `signal`.
    """

    code = "poisoned"


class JobTimeout(ZloraError):
    """The job took longer than its timeout.

    Details: `seconds`.
    """

    code = "timeout"


class JobExpired(ZloraError):
    """The job did not start within `expires_in` seconds."""

    code = "expired"


class JobRevoked(ZloraError):
    """The job was cancelled."""

    code = "job_revoked"


class JobUnknown(ZloraError):
    """No job has this id, or nothing is known of it any more."""

    code = "unknown"


class JobVanished(JobUnknown):
    """Redis has lost the job, by a fail-over for instance: submit it again under the same id."""

    code = "job_unknown"
    retryable = True


class Conflict(ZloraError):
    """The job id belongs to another request.

    Details: `job_id`.
    """

    code = "conflict"

    @classmethod
    def of(cls, job_id: str) -> Self:
        """Return the error for a job id that another request has."""
        return cls(f"job {job_id} belongs to another request", {"job_id": job_id})


class InvalidWebhook(ZloraError):
    """The webhook is not signed with our secret, is too old, or was received before.

    Details: `reason`.
    """

    code = "invalid_webhook"


class InvalidSetting(ZloraError):
    """An environment variable has an invalid value.

    Details: `name`.
    """

    code = "invalid_setting"


class StackError(ZloraError):
    """The embedded stack of `zlora up` cannot start."""

    code = "stack_error"


ERRORS: Final = tuple(
    found
    for found in globals().copy().values()
    if isinstance(found, type) and issubclass(found, ZloraError)
)
"""All classes, parents first: tables, exit statuses and metrics are made from it."""

_BY_CODE: Final = {cls.code: cls for cls in ERRORS}


@contextmanager
def naming_file(**place: Any) -> Iterator[None]:
    """Add to a `LoraError` of the block which file of the request it is about.

    That is its `index` in `loras`, or in the list that `field` names.
    """
    try:
        yield
    except LoraError as error:
        error.add_details(**place)
        raise


__all__ = [*(cls.__name__ for cls in ERRORS)]  # noqa: PLE0604 - names of classes


def by_code(code: str) -> type[ZloraError]:
    """Return the class of a code, or `ZloraError` for a code of a newer version."""
    return _BY_CODE.get(code, ZloraError)
