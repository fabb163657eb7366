"""The ways in which one delivery of a job can end."""

from dataclasses import dataclass

from zlora.errors import ZloraError
from zlora.schema import GenerateResult


@dataclass(frozen=True)
class Succeeded:
    """The job has a result."""

    result: GenerateResult


@dataclass(frozen=True)
class Drawn:
    """The job is in the spool, in the folder `entry`: the sidecar stores its images and ends it."""

    entry: str
    nbytes: int  # of its images


@dataclass(frozen=True)
class Failed:
    """The job has ended with an error, or was cancelled, or expired.

    `is_recorded` says that the error is in the job's record in Redis, as its verdict.
    """

    error: ZloraError
    is_recorded: bool = True


@dataclass(frozen=True)
class Retry:
    """The same job may succeed `after` seconds from now."""

    error: ZloraError
    after: float


@dataclass(frozen=True)
class Requeue:
    """Nothing is wrong with the job; another delivery looks at it `after` seconds from now."""

    reason: str
    after: float


@dataclass(frozen=True)
class NotMine:
    """The job id belongs to another request, which stays as it is."""

    reason: str


@dataclass(frozen=True)
class Corrupted:
    """The base model of this child is not what was loaded: the job goes to a new child."""

    reason: str


Outcome = Succeeded | Drawn | Failed | Retry | Requeue | NotMine | Corrupted


class JobDrawn(BaseException):
    """Leaves the task of a job that is drawn: the parent acknowledges its message at its end.

    No `Exception`, of which Celery would keep the traceback: that takes longer than the hand-over.
    """

    def __init__(self, entry: str, nbytes: int) -> None:
        super().__init__(entry, nbytes)
        self.entry, self.nbytes = entry, nbytes
