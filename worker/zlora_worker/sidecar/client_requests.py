"""Answer clients that ask for an expired result, or for the end of a job that they cancelled."""

import logging
from typing import Any

import msgspec
from zlora.broker.job_store import JobStore
from zlora.broker.task_meta import revoked
from zlora.errors import InternalError, StoreFailed
from zlora.schema import JOB_ID, Cancellation

from zlora_worker.results.manifest import read_result
from zlora_worker.results.store import Store
from zlora_worker.results.urls import ImageUrls
from zlora_worker.sidecar.sweeper import end_unstarted

logger = logging.getLogger(__name__)


def reply_to_next(
    jobs: JobStore, store: Store, urls: ImageUrls, backend: Any, *, timeout: float
) -> None:
    """Wait up to `timeout` seconds for a request, and reply to it.

    The reply to a request for a manifest is empty if the store has no result of the job. Without an
    answer of the store there is no reply, and the client may find another sidecar.
    """
    if (request := jobs.next_request(timeout)) is None:
        return
    job_id, document = request.job_id, b""
    if not JOB_ID.fullmatch(job_id):  # an id becomes part of a key in the store
        jobs.reply(request.reply_key)
        return
    try:
        if request.is_cancel:
            if jobs.place(job_id) is Cancellation.QUEUED:
                end_unstarted(jobs, store, backend, job_id, revoked(job_id))
        elif (result := read_result(store, job_id)) is not None:
            document = msgspec.json.encode(urls.with_urls(result))
    except InternalError as error:  # a damaged manifest: the client reports what it cannot read
        document = str(error).encode()
    except StoreFailed as error:
        logger.warning(
            "job %s: no reply, the store does not answer: %s", job_id, error, extra={"job": job_id}
        )
        return
    jobs.reply(request.reply_key, document)
