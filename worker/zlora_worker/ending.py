"""The end of one attempt at a job: in the store first, which decides, then in Redis.

The child ends a job that it cannot draw; the sidecar ends a job that is drawn.
"""

import logging
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from zlora.broker.job_store import Submission
from zlora.errors import StoreFailed, ZloraError
from zlora.schema import GenerateRequest, GenerateResult

from zlora_worker.delivery.lease import LEASE, JobLeases
from zlora_worker.delivery.outcome import Failed, Outcome, Requeue, Succeeded
from zlora_worker.results.manifest import delete_images, image_keys, load_end, write_verdict
from zlora_worker.results.store import Store
from zlora_worker.results.urls import ImageUrls

_STORE_PATIENCE: Final = 300.0  # seconds that a job waits for a store that does not answer

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Ending:
    """Ends one attempt at a job. `request`, `digest` and `token` are set as they become known."""

    leases: JobLeases
    store: Store
    urls: ImageUrls
    job_id: str
    request: GenerateRequest | None = None
    digest: str | None = None  # of the request as it was sent
    token: str = ""  # of the claim

    def end(self, error: ZloraError, *, submission: Submission | None = None) -> Outcome:
        """End the job with this error, unless it has ended otherwise by now.

        The manifest decides. While the store does not answer, the job waits for it, but not
        longer than `_STORE_PATIENCE`. With a submission the job is kept as a dead job. Raises
        `LeaseLost` if another worker has taken the job.
        """
        self.leases.require_newest(self.job_id, self.token)
        try:
            end = write_verdict(self.store, self.job_id, error, self.digest)
        except StoreFailed as failure:
            if not self.is_store_lost():
                self.leases.note_error(self.job_id, self.token, error)
                return Requeue(f"the store does not answer: {failure}", LEASE)
            logger.warning("job %s: its error is in Redis alone: %s", self.job_id, failure)
            end = error
        except ZloraError:  # the manifest is damaged, or of another request: no result can follow
            end = error
        else:
            if isinstance(end, GenerateResult):
                return self.with_urls(end)
            self.delete_images()
        return Failed(self.leases.record_verdict(self.job_id, end, submission=submission))

    def delete_images(self) -> None:
        """Delete the images of a job whose manifest has a verdict."""
        if self.request is not None:
            keys = image_keys(self.job_id, self.request)
            if self.token:
                keys += image_keys(self.job_id, self.request, token=self.token)
            delete_images(self.store, keys)

    def delete_images_of_an_error(self) -> None:
        """Delete the images of a job that another process has ended with an error by now.

        If it ends so later, that process deletes them.
        """
        with suppress(ZloraError):
            if isinstance(load_end(self.store, self.job_id, self.digest), ZloraError):
                self.delete_images()

    def with_urls(self, result: GenerateResult) -> Outcome:
        """Add URLs to the images. If the store cannot sign now, do that later, or never."""
        try:
            return Succeeded(self.urls.with_urls(result))
        except StoreFailed as error:
            if self.is_store_lost():
                return Succeeded(result)
            return Requeue(f"the URLs of its images cannot be made: {error}", LEASE)

    def is_store_lost(self) -> bool:
        """Record that the store does not answer; return whether the job has waited long enough.

        An attempt without a claim leaves that to the worker that has the job.
        """
        if not self.token:
            return False
        return self.leases.note_store_outage(self.job_id, self.token) > _STORE_PATIENCE
