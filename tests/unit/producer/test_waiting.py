"""Whoever waits for a job is rung and polls nobody, outlasts a restart of Redis, and is told of a lasting outage."""

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.figures import Tally
from support.played import ends, inside, says
from support.processes import wait_until
from support.proxy import Proxy
from zlora import AsyncClient, Client, JobState, waiting
from zlora.broker import celery_app, result_listener
from zlora.errors import BrokerUnavailable, InvalidRequest, LoraMismatch, ResultTimeout
from zlora.schema import GenerateResult

REQUEST = {"prompt": "a portrait"}
SHARED = 10  # connections of kombu's pool, which all clients of a process have in common


@pytest.fixture
def proxy(broker_url: str) -> Iterator[Proxy]:
    with Proxy(urlsplit(broker_url).port or 0, Tally()) as opened:
        yield opened


def watched(broker: Any, job_id: str) -> None:
    wait_until(lambda: broker.pubsub_numsub(f"celery-task-meta-{job_id}")[0][1], "somebody listens")


def asked(broker: Any) -> int:
    """Commands that have read something since the counts were set to nothing."""
    return sum(calls(broker, name) for name in ("get", "hmget", "hgetall", "mget"))


def calls(broker: Any, command: str) -> int:
    return int(broker.info("commandstats").get(f"cmdstat_{command}", {"calls": 0})["calls"])


def test_many_threads_wait_over_one_connection_and_ask_nothing(client: Client, broker: Any) -> None:
    jobs = client.submit_many([REQUEST] * 20)
    broker.config_resetstat()
    with ThreadPoolExecutor(20) as threads:
        results = [threads.submit(job.result, 60) for job in jobs]
        looked = 2 * len(jobs)  # at first, and where its subscription holds
        wait_until(lambda: calls(broker, "get") >= looked, "all of them wait")
        broker.config_resetstat()
        time.sleep(0.5)
        assert asked(broker) == 0
        assert len([item for item in broker.client_list() if int(item["sub"]) > 0]) == 1

        for job in jobs:
            ends(client, job.id)
        assert [result.result(10).job_id for result in results] == [job.id for job in jobs]


def test_events_tell_each_change_to_the_end(client: Client) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    events = job.events(timeout=30)
    seen = [next(events)]
    says(client, "job-1", {"phase": "denoising", "step": 1, "steps": 2, "attempt": 1}, "PROGRESS")
    seen.append(next(events))
    says(client, "job-1", LoraMismatch("it does not fit"), "FAILURE")
    seen.extend(events)

    assert [(status.state, status.phase, status.step) for status in seen] == [
        (JobState.PENDING, "queued", None),
        (JobState.PROGRESS, "denoising", 1),
        (JobState.FAILURE, None, None),
    ]


def test_a_watcher_sees_its_job_move_up_although_nobody_publishes_that(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zlora.handle._MOVES", 0.05)
    first, second = client.submit_many([REQUEST] * 2, job_ids=["a", "b"])
    events = second.events(timeout=30)
    assert next(events).position == 1

    first.cancel()

    assert next(events).position == 0


def test_events_of_a_job_without_an_end_stop_with_a_typed_error(client: Client) -> None:
    events = client.submit(REQUEST, job_id="job-1").events(timeout=0.1)

    assert next(events).state is JobState.PENDING
    with pytest.raises(ResultTimeout):
        next(events)


def test_a_restart_of_redis_is_outlasted(broker: Any, proxy: Proxy, client: Client) -> None:
    """What was published meanwhile is found."""
    found = []
    with Client(proxy.url) as cut:
        job = cut.submit(REQUEST, job_id="job-1")
        waiter = threading.Thread(target=lambda: found.append(job.result(timeout=60)))
        waiter.start()
        watched(broker, "job-1")
        proxy.break_at(b"PING|SUBSCRIBE|GET")
        broker.client_kill_filter(_type="pubsub")
        ends(client, "job-1")
        wait_until(
            lambda: not broker.pubsub_numsub("celery-task-meta-job-1")[0][1], "nobody listens"
        )
        proxy.restore()
        waiter.join(30)

    assert [result.job_id for result in found] == ["job-1"]


def test_an_outage_that_lasts_is_told_to_all_who_wait_and_not_found_out_by_each(
    broker: Any, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Redis that swallows everything costs whoever asks it two seconds: one connection finds out for all."""
    monkeypatch.setattr(celery_app, "IMPATIENCE", 0.3)
    monkeypatch.setattr(result_listener, "_SILENCE", 0.2)
    monkeypatch.setattr(waiting, "_OUTAGE", 0.5)

    async def run() -> list[BaseException | GenerateResult]:
        async with AsyncClient(proxy.url) as client:
            jobs = await client.submit_many([REQUEST] * 60)
            broker.config_resetstat()
            waits = [asyncio.create_task(job.result()) for job in jobs]
            looked = 2 * len(jobs)  # at first, and where its subscription holds
            await asyncio.to_thread(
                wait_until, lambda: calls(broker, "get") >= looked, "all of them wait"
            )
            proxy.black_out()
            async with asyncio.timeout(
                20
            ):  # each for itself, in eight threads, a look 0.3 s and more, for ever
                return await asyncio.gather(*waits, return_exceptions=True)

    ends = asyncio.run(run())

    assert {type(end) for end in ends} == {BrokerUnavailable}
    assert len(ends) == 60


@pytest.mark.parametrize("timeout", [float("nan"), "5", [5]])
def test_a_wait_of_no_number_of_seconds_is_refused(client: Client, timeout: Any) -> None:
    """A wait of NaN seconds would never be over."""
    with pytest.raises(InvalidRequest) as raised:
        client.job("job-1").result(timeout=timeout)
    assert raised.value.details["path"] == "timeout"


def test_a_client_that_is_closed_ends_what_waits_with_it(client: Client) -> None:
    job = client.submit(REQUEST, job_id="job-1")
    with ThreadPoolExecutor(2) as threads:
        waits: list[Future[Any]] = [
            threads.submit(job.result),
            threads.submit(lambda: list(job.events())),
        ]
        wait_until(lambda: inside(client)._listener._ear, "they wait")
        client.close()
        for wait in waits:
            with pytest.raises(BrokerUnavailable, match="closed"):
                wait.result(20)
    with pytest.raises(BrokerUnavailable, match="closed"):
        job.status()
    client.close()


def submit_on_and_on(client: Client) -> None:
    while True:
        client.submit(REQUEST)


def test_a_client_that_is_closed_in_the_middle_of_anything_says_so(
    broker_url: str, broker: Any
) -> None:
    """Sockets that are closed under their readers raise what they like; and nobody opens others."""
    threads_before, connections_before = threading.active_count(), len(broker.client_list())
    for _ in range(5):
        client = Client(broker_url)
        with ThreadPoolExecutor(4) as pool:
            asks = [partial(submit_on_and_on, client)] * 2 + [client.job("never").result] * 2
            ends = [pool.submit(ask) for ask in asks]
            time.sleep(0.05)
            client.close()
            errors = [end.exception(20) for end in ends]
        assert {type(error) for error in errors} == {BrokerUnavailable}
        with pytest.raises(BrokerUnavailable, match="closed"):
            next(client.job("late").events())

    wait_until(lambda: threading.active_count() == threads_before, "no thread is left")
    del client, asks, ends, errors
    gc.collect()  # what was opened in the moment of the closing
    wait_until(
        lambda: len(broker.client_list()) <= connections_before + SHARED, "no connection is left"
    )
