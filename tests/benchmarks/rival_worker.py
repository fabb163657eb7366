"""A worker app with another design: `celery -A benchmarks.rival_worker worker`.

`BENCH_DESIGN` is one of

- `inline`: the child encodes and stores each image before it draws the next one;
- `handed`: the child gives the pixels to another process through Redis, and takes its next job.

The app serves the same task on a queue of its own with the fake model. It has no leases, no
progress, no sidecar and no embedded metadata, so that it does less work for a job than our worker.
"""

import os
from typing import Any, Final

from benchmarks import publisher
from benchmarks.publisher import settings
from celery import Celery
from celery.exceptions import Ignore
from faults.engines.pipeline import Pipeline
from zlora.broker.celery_app import shared_config
from zlora.schema import TASK_NAME, GenerateResult, parse_request, to_dict
from zlora_worker.results.manifest import write_result

DESIGN: Final = os.environ["BENCH_DESIGN"]

app: Final = Celery("rival", set_as_current=False)
app.conf.update(
    **shared_config(
        broker_url=settings.broker_url, result_backend=settings.result_backend, queue=settings.queue
    ),
    worker_concurrency=1,
    worker_prefetch_multiplier=1,
    worker_disable_prefetch=True,
    task_acks_late=True,
    broker_connection_retry_on_startup=True,
)
_pipeline: Final = Pipeline(name="fake")


@app.task(name=TASK_NAME, bind=True)
def generate(task: Any, document: dict[str, Any]) -> dict[str, Any]:
    """Draw the images of one job, and store or give away each before the next one."""
    job_id, request = str(task.request.id), parse_request(document)
    seed = request.seed_for(job_id)
    images = []
    for index in range(request.num_images):
        (image,) = _pipeline.draw(request, [seed + index], lambda _: None)
        if DESIGN == "handed":
            publisher.give_image(job_id, index, image, document)
        else:
            images.append(publisher.store_image(job_id, index, image, request))
    result = GenerateResult(
        job_id=job_id,
        images=tuple(images),
        loras=(),
        seed=seed,
        timings={},
        base_intact=True,
        model=_pipeline.name,
        versions={},
        request=request,
    )
    if DESIGN == "handed":
        publisher.give_result(result)
        raise Ignore("the publisher stores the result")
    whole = write_result(publisher.store(), result)
    assert isinstance(whole, GenerateResult)
    return to_dict(whole)
