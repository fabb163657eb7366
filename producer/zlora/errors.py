"""The words for failure, shared by producer and worker.

```
ZloraError
├── InvalidRequest            invalid_request        the document breaks the schema or a bound
│   └── InvalidJobId          invalid_job_id         the task id cannot be a path
├── LoraError
│   ├── LoraNotAllowed        lora_not_allowed       scheme, host or address the operator does not allow
│   ├── LoraNotFound          lora_not_found         the source says that there is no such file
│   ├── LoraForbidden         lora_forbidden         the source refuses it to this worker
│   ├── LoraUnreachable       lora_unreachable       no answer, a broken one, or too slow        retryable
│   ├── LoraTooLarge          lora_too_large         more bytes than a LoRA may have
│   ├── LoraCorrupt           lora_corrupt           bytes and digest differ
│   ├── NotSafetensors        not_safetensors        another kind of file, or a damaged one
│   ├── LoraMismatch          lora_mismatch          a sound file that does not fit the resident model
│   └── CacheFull             cache_full             the LoRA cache has no room, or a bad disk   retryable
├── GenerationFailed          generation_failed      the model gave NaN, Inf or nothing
├── OutOfMemory               out_of_memory          the picture needs more memory than the worker has
├── BaseNotRestored           base_not_restored      the base differs after the job              retryable
├── StoreFailed               store_failed           the picture could not be stored             retryable
├── InternalError             internal               a fault of the worker's own
├── ModelUnavailable          model_unavailable      the base model cannot be loaded
├── BrokerUnavailable         broker_unavailable     Redis does not answer                       retryable
├── ResultTimeout             result_timeout         no result within the caller's patience      retryable
├── ImageUnavailable        picture_unavailable    a result's picture cannot be fetched       retryable
├── JobLost                   job_lost               the worker died over the job                retryable
├── JobPoisoned               poisoned               worker after worker died over the job
├── JobTimeout                timeout                the job took longer than it may
├── JobExpired                expired                the job was not begun in time
├── JobRevoked                job_revoked            the job was cancelled
├── JobUnknown                unknown                no job has this id
├── Conflict                  conflict               the job id belongs to another request
├── InvalidWebhook            invalid_webhook        a webhook that is not ours, too old, or was heard before
├── InvalidSetting            invalid_setting        an environment variable that makes no sense
└── StackError                stack_error            the embedded stack cannot start
```

`code` is the word that dashboards and programs match on; `retryable` says whether the same request may succeed
later. Both are facts of the class. An instance is one message for people and one dict of plain JSON details: exactly
`args`, which is what Celery's JSON result carries, so an error raised in the worker arrives as the same class.
"""

from typing import Any, ClassVar, Final, Self

__all__ = [
    "BaseNotRestored",
    "BrokerUnavailable",
    "CacheFull",
    "Conflict",
    "GenerationFailed",
    "ImageUnavailable",
    "InternalError",
    "InvalidJobId",
    "InvalidRequest",
    "InvalidSetting",
    "InvalidWebhook",
    "JobExpired",
    "JobLost",
    "JobPoisoned",
    "JobRevoked",
    "JobTimeout",
    "JobUnknown",
    "LoraCorrupt",
    "LoraError",
    "LoraForbidden",
    "LoraMismatch",
    "LoraNotAllowed",
    "LoraNotFound",
    "LoraTooLarge",
    "LoraUnreachable",
    "ModelUnavailable",
    "NotSafetensors",
    "OutOfMemory",
    "ResultTimeout",
    "StackError",
    "StoreFailed",
    "ZloraError",
]


class ZloraError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str | None = None, details: dict[str, Any] | None = None) -> None:
        """Take the sentence for people (default: the class's own) and details that JSON can carry."""
        self.message = _one_line(message or _first_line(type(self)))
        self.details = details or {}
        super().__init__(self.message, self.details)

    def tell(self, **details: Any) -> None:
        """Add details that are known only later; they travel too."""
        self.details = {**self.details, **details}
        self.args = (self.message, self.details)

    def as_document(self) -> dict[str, Any]:
        """The error for a program, as plain JSON data."""
        return {
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            "details": self.details,
        }

    @property
    def retry_after(self) -> float:
        """Seconds that a server asks to be left alone; 0 where it says nothing."""
        seconds = self.details.get("retry_after")
        return float(seconds) if isinstance(seconds, int | float) else 0.0

    def __str__(self) -> str:
        return self.message


def _one_line(text: str) -> str:
    """Text that can be logged and sent: what a stranger chose in it, a name or a value, forges no line."""
    return "".join(character if character.isprintable() else " " for character in text)


def _first_line(cls: type) -> str:
    return (cls.__doc__ or cls.__name__).strip().splitlines()[0]


class InvalidRequest(ZloraError):
    """The request breaks the schema. Details: `path`, `value`, `expected`."""

    code = "invalid_request"


class InvalidJobId(InvalidRequest):
    """The job id is not 1 to 64 characters of A-Z, a-z, 0-9, `_` and `-`."""

    code = "invalid_job_id"


class LoraError(ZloraError):
    """A LoRA cannot be used."""

    code = "lora_error"


class LoraNotAllowed(LoraError):
    """The LoRA's address is not one that this worker may open."""

    code = "lora_not_allowed"


class LoraNotFound(LoraError):
    """There is no LoRA at that address."""

    code = "lora_not_found"


class LoraForbidden(LoraError):
    """The source of the LoRA refuses it to this worker."""

    code = "lora_forbidden"


class LoraUnreachable(LoraError):
    """The source of the LoRA does not answer, or not as it should. Details: `status`, `retry_after` in seconds."""

    code = "lora_unreachable"
    retryable = True


class LoraTooLarge(LoraError):
    """The LoRA has more bytes than this worker takes."""

    code = "lora_too_large"


class LoraCorrupt(LoraError):
    """The bytes of the LoRA are not those that its digest names."""

    code = "lora_corrupt"


class NotSafetensors(LoraError):
    """The LoRA is not a sound safetensors file."""

    code = "not_safetensors"


class LoraMismatch(LoraError):
    """The LoRA does not fit the resident model."""

    code = "lora_mismatch"


class CacheFull(LoraError):
    """The LoRA cache cannot take the file: all of it is in use, or its disk is too small or fails."""

    code = "cache_full"
    retryable = True


class GenerationFailed(ZloraError):
    """The model gave no usable picture."""

    code = "generation_failed"


class OutOfMemory(ZloraError):
    """The job needs more memory than this worker has. Details: `width`, `height`."""

    code = "out_of_memory"


class BaseNotRestored(ZloraError):
    """The base model is not what it was before the job: nothing drawn with it can be trusted."""

    code = "base_not_restored"
    retryable = True


class StoreFailed(ZloraError):
    """The result could not be stored."""

    code = "store_failed"
    retryable = True


class InternalError(ZloraError):
    """The worker met a fault of its own."""

    code = "internal"


class ModelUnavailable(ZloraError):
    """The base model cannot be loaded."""

    code = "model_unavailable"


class BrokerUnavailable(ZloraError):
    """The broker does not answer."""

    code = "broker_unavailable"
    retryable = True


class ResultTimeout(ZloraError):
    """There is no result yet."""

    code = "result_timeout"
    retryable = True


class ImageUnavailable(ZloraError):
    """A picture cannot be brought here. Details: `key`."""

    code = "picture_unavailable"
    retryable = True


class JobLost(ZloraError):
    """The worker died over the job."""

    code = "job_lost"
    retryable = True


class JobPoisoned(ZloraError):
    """Worker after worker died over the job. Details: `attempts`, each with `host`, `worker`, `at` and `signal`."""

    code = "poisoned"


class JobTimeout(ZloraError):
    """The job took longer than it may. Details: `seconds`."""

    code = "timeout"


class JobExpired(ZloraError):
    """The job was not begun by the time that its producer set."""

    code = "expired"


class JobRevoked(ZloraError):
    """The job was cancelled."""

    code = "job_revoked"


class JobUnknown(ZloraError):
    """No job has this id, or all that was known of it is gone."""

    code = "unknown"


class Conflict(ZloraError):
    """The job id belongs to another request: one id, one job. Details: `job_id`."""

    code = "conflict"

    @classmethod
    def of(cls, job_id: str) -> Self:
        """Return the error for a job id that another request has."""
        return cls(f"job {job_id} belongs to another request", {"job_id": job_id})


class InvalidWebhook(ZloraError):
    """The webhook is not to be believed. Details: `reason`."""

    code = "invalid_webhook"


class InvalidSetting(ZloraError):
    """An environment variable has a value that makes no sense. Details: `name`."""

    code = "invalid_setting"


class StackError(ZloraError):
    """The embedded stack cannot start."""

    code = "stack_error"


def named(code: str) -> type[ZloraError]:
    """The class of a code; a code that is not known here, such as a newer worker's, is a `ZloraError`."""
    return _BY_CODE.get(code, ZloraError)


_BY_CODE: Final[dict[str, type[ZloraError]]] = {
    globals()[name].code: globals()[name] for name in __all__
}
