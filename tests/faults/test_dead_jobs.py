"""Jobs that kill each child become dead jobs, and can be submitted again."""

import socket

import pytest
from click.testing import CliRunner
from support.scene import Scene, request
from zlora.broker.dead_jobs import DeadJobs, next_id
from zlora.broker.job_store import connect
from zlora.cli import main
from zlora.errors import JobPoisoned
from zlora.schema import TASK_NAME

POISON = ["kill-child"] * 3  # the next attempt would succeed


def test_poisoned_jobs_keep_their_evidence_and_are_drawn_under_a_new_id(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a job of another Celery program, which has no record when it is submitted."""
    for name in ("ZLORA_BROKER_URL", "ZLORA_QUEUE"):
        monkeypatch.setenv(name, scene.environ[name])
    with scene.worker(), scene.any_client() as other:
        ours = scene.submit(do=POISON)
        theirs = scene.answer_for(scene.client.job("theirs"))
        document = request(theirs.id, do=POISON)
        other.send_task(TASK_NAME, args=[document], task_id=theirs.id, priority=9)
        for handle in (ours, theirs):
            with pytest.raises(JobPoisoned):
                handle.result(timeout=60)

        with connect(scene.environ["ZLORA_BROKER_URL"]) as redis:
            dead = DeadJobs(redis, scene.queue).all()
        assert [job.job_id for job in dead] == [ours.id, theirs.id]
        assert [job.submission.priority for job in dead] == [5, 9]
        for job in dead:
            signals = [(attempt["host"], attempt["signal"]) for attempt in job.attempts]
            assert signals == [(socket.gethostname(), "SIGKILL")] * 3

        for handle in (ours, theirs):
            asked = CliRunner().invoke(main, ["dead", "requeue", handle.id])
            assert asked.stdout == f"{next_id(handle.id)}\n"
            again = scene.answer_for(scene.client.job(next_id(handle.id)))
            assert again.result(timeout=60).base_intact
