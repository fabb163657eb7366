"""Split the time from the denoising of a job to that of the next one into parts."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final, NamedTuple

# The first three after the restore are no reason for a pause if they end once the next job has
# started: then the next job has not waited for them.
TAIL: Final = ("encode and upload", "manifest", "answer")
PARTS: Final = (
    "steps", "restore", *TAIL, "hand-over and claim", "fetch", "parse", "merge", "other",
)  # fmt: skip


class Times(NamedTuple):
    """Times of one job, in seconds since the epoch, in the order of a worker with one thread."""

    started: float  # claimed, and its manifest looked for
    fetched: float
    parsed: float
    merge: float  # begins
    merged: float
    begun: float  # the first step
    ended: float  # the last step
    restored: float
    uploaded: float  # all images are in the store
    kept: float  # the manifest is in the store
    answered: float  # a client can see the result


def pauses(jobs: Sequence[Times], denoising: float) -> Iterator[dict[str, float]]:
    """Yield the seconds of each part between one job and the next; they add up to what is lost.

    `jobs` are in their order, and `denoising` are the seconds of one. `steps` is what a job's own
    steps took more than that, for their reports and between two images.
    """
    for job, later in pairwise(jobs):
        parts = dict.fromkeys(PARTS, 0.0) | {"steps": job.ended - job.begun - denoising}
        reached = job.ended
        tail = zip(TAIL, (job.uploaded, job.kept, job.answered), strict=True)
        points = [
            ("restore", job.restored),
            *(point for point in tail if point[1] <= later.started),
            ("hand-over and claim", later.started),
            ("fetch", later.fetched),
            ("parse", later.parsed),
            ("other", later.merge),
            ("merge", later.merged),
            ("other", later.begun),
        ]
        for part, point in points:
            end = min(max(point, reached), later.begun)
            parts[part] += end - reached
            reached = end
        yield parts
