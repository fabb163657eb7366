"""Answer clients that ask for a result which Celery's backend no longer has."""

import logging

import msgspec
from zlora.broker.job_store import JobStore
from zlora.errors import InternalError, StoreFailed
from zlora.schema import JOB_ID

from zlora_worker.results.manifest import read_result
from zlora_worker.results.store import Store
from zlora_worker.results.urls import ImageUrls

logger = logging.getLogger(__name__)


def reply_to_next(jobs: JobStore, store: Store, urls: ImageUrls, *, timeout: float) -> None:
    """Wait up to `timeout` seconds for a request, and reply with the job's manifest.

    The reply is empty if the store has no such job. Without an answer of the store there is no
    reply, and the client may find another sidecar.
    """
    if (request := jobs.next_request(timeout)) is None:
        return
    job_id, reply_key = request
    document = b""
    try:
        result = read_result(store, job_id) if JOB_ID.fullmatch(job_id) else None
        if result is not None:
            document = msgspec.json.encode(urls.with_urls(result))
    except InternalError as error:  # a damaged manifest: the client reports what it cannot read
        document = str(error).encode()
    except StoreFailed as error:
        logger.warning(
            "job %s: no reply, the store does not answer: %s", job_id, error, extra={"job": job_id}
        )
        return
    jobs.reply(reply_key, document)
