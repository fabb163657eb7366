"""Split brain: a worker of one primary draws a job that a client of the other one cancels.

Only the store is common to both. Its manifest decides how the job ends.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from support.figures import Tally
from support.processes import clean_environ, wait_until
from support.scene import CLEAN, Scene
from support.valkey import Valkey
from zlora import Cancellation, JobState
from zlora.broker.keys import job_key
from zlora.errors import JobRevoked
from zlora_worker.results.manifest import load_end
from zlora_worker.results.store import FolderStore


@contextmanager
def sidecar(scene: Scene) -> Iterator[None]:
    """Run a sidecar without a worker, as beside a worker that is busy."""
    with (scene.folder / "sidecar.log").open("wb") as log:
        command = [sys.executable, "-m", "zlora_worker.sidecar"]
        process = subprocess.Popen(command, env=clean_environ(scene.environ), stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def test_a_job_that_is_drawn_beside_one_primary_and_cancelled_at_the_other_has_one_end(
    tmp_path: Path, tally: Tally
) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    with Valkey(tmp_path / "old", tally) as old, Valkey(tmp_path / "new", tally) as new:
        new.follow(old.port)
        drawing = Scene(tmp_path / "one", tally, broker_url=old.url, queue="split")
        store = {"ZLORA_STORE": drawing.environ["ZLORA_STORE"]}
        waiting = Scene(tmp_path / "two", tally, broker_url=new.url, queue="split", **store)
        with closing(drawing), closing(waiting), sidecar(waiting), waiting.broker() as broker:
            handle = drawing.submit(steps=10, step=0.3)
            wait_until(lambda: broker.exists(job_key(handle.id)), "the replica knows the job")
            new.promote()
            with drawing.worker():
                drawing.wait_step(handle)
                cancelled = waiting.client.job(handle.id)
                wait_until(
                    lambda: cancelled.cancel() is not Cancellation.RUNNING, "a sidecar ends the job"
                )
                wait_until(lambda: drawing.events("end", handle), "the worker has drawn the job")
                drawing.wait_settled()

                assert handle.status().state is JobState.REVOKED
                assert cancelled.status().state is JobState.REVOKED
            end = load_end(FolderStore(drawing.store), handle.id, None)
            assert isinstance(end, JobRevoked)
            assert drawing.files(handle) == []
            assert drawing.audit() == CLEAN
