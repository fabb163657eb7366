"""The sidecar of a real worker prefetches the next job's LoRA, and jobs do not depend on it."""

import threading
from collections.abc import Iterator
from typing import Any

from support.processes import wait_until
from support.scene import Scene
from support.servers import Answer, Request, lora_bytes, reply, serving
from zlora import JobHandle

LORA = lora_bytes(1, size=100_000)


def with_lora(scene: Scene, url: str, **options: Any) -> JobHandle:
    return scene.submit(fields={"loras": [{"file": {"url": f"{url}/a.safetensors"}}]}, **options)


def test_the_next_lora_is_fetched_and_parsed_while_a_job_runs(scene: Scene) -> None:
    with serving(reply(LORA)) as host, scene.worker(ZLORA_ALLOW_HOSTS=host.name):
        running = scene.submit(steps=200, step=0.5)
        scene.wait_begun(running)
        following = with_lora(scene, host.url)
        wait_until(lambda: scene.events("parsed"), "the next job's LoRA is parsed")
        assert (scene.events("end", running), scene.begun(following)) == ([], 0)

        running.cancel()
        (receipt,) = following.result(timeout=60).loras

        assert (receipt.tier, host.asked) == ("memory", ["GET /a.safetensors"])
        assert len(scene.events("parsed")) == 1


def test_without_prefetch_the_job_fetches_its_lora(scene: Scene) -> None:
    with (
        serving(reply(LORA)) as host,
        scene.worker(ZLORA_ALLOW_HOSTS=host.name, ZLORA_LOOK_AHEAD="0"),
    ):
        (receipt,) = with_lora(scene, host.url).result(timeout=60).loras

        assert (receipt.tier, host.asked) == ("network", ["GET /a.safetensors"])


def test_a_job_continues_the_download_of_a_killed_sidecar(scene: Scene) -> None:
    """The job or the next sidecar continues the draft."""
    begun, killed = threading.Event(), threading.Event()

    with (
        serving(once_endless(begun, killed)) as host,
        scene.worker(ZLORA_ALLOW_HOSTS=host.name) as worker,
    ):
        running = scene.submit(steps=200, step=0.5)
        scene.wait_begun(running)
        following = with_lora(scene, host.url)
        assert begun.wait(60), "the sidecar fetches"
        scene.kill(worker.sidecar())
        killed.set()
        running.cancel()
        result = following.result(timeout=60)

        assert (result.loras[0].size, result.attempt) == (len(LORA), 1)
        assert list((scene.folder / "loras/drafts").iterdir()) == []


def test_a_job_waits_for_the_same_download_of_the_sidecar(scene: Scene) -> None:
    """The same file is not downloaded twice at the same time."""
    begun, go_on = threading.Event(), threading.Event()

    def slowly(_: Request) -> Iterator[bytes]:
        whole = reply(LORA)
        yield whole[:1000]
        begun.set()
        go_on.wait(60)
        yield whole[1000:]

    with serving(slowly) as host, scene.worker(ZLORA_ALLOW_HOSTS=host.name):
        running = scene.submit(steps=200, step=0.5)
        scene.wait_begun(running)
        following = with_lora(scene, host.url)
        assert begun.wait(60), "the sidecar fetches"
        running.cancel()
        wait_until(lambda: following.status().phase == "fetching", "the job waits for its LoRA")
        go_on.set()

        assert following.result(timeout=60).loras[0].tier != "network"
        assert len(host.requests) == 1


def test_the_prefetch_continues_after_a_restart_of_the_broker(scene: Scene, valkey: Any) -> None:
    with serving(reply(LORA)) as host, scene.worker(ZLORA_ALLOW_HOSTS=host.name):
        running = scene.submit(steps=200, step=0.5)
        scene.wait_begun(running)
        valkey.kill()
        valkey.start()
        following = with_lora(scene, host.url)
        wait_until(lambda: host.sent, "the next job's LoRA is fetched")

        running.cancel()
        assert following.result(timeout=60).loras[0].tier != "network"


def once_endless(begun: threading.Event, killed: threading.Event) -> Answer:
    """Answer the first request with a part until `killed` is set, and the others completely."""
    whole, asked = reply(LORA), iter(range(1000))

    def answer(_: Request) -> Iterator[bytes]:
        if next(asked):
            yield whole
            return
        yield whole[:1000]
        begun.set()
        killed.wait(60)

    return answer
