"""A real worker's companion fetches the next job's LoRA while a job is drawn, and is never missed."""

import threading
from collections.abc import Iterator
from typing import Any

from support.processes import wait_until
from support.scene import Scene
from support.servers import Answer, Request, lora_bytes, reply, serving
from zlora import JobHandle

SOUND = lora_bytes(1, size=100_000)


def with_lora(scene: Scene, url: str, **told: Any) -> JobHandle:
    return scene.submit(fields={"loras": [{"file": {"url": f"{url}/a.safetensors"}}]}, **told)


def test_the_next_job_s_lora_comes_while_a_job_is_drawn(scene: Scene) -> None:
    with serving(reply(SOUND)) as host, scene.worker(ZLORA_ALLOW_HOSTS=host.name):
        drawn = scene.submit(steps=200, step=0.5)
        scene.wait_begun(drawn)
        following = with_lora(scene, host.url)
        wait_until(lambda: host.sent, "the next job's LoRA is fetched")
        assert (scene.events("end", drawn), scene.begun(following)) == ([], 0)

        drawn.cancel()
        (receipt,) = following.result(timeout=60).loras

        assert (receipt.tier, host.asked) == ("disk", ["GET /a.safetensors"])


def test_a_worker_with_no_look_ahead_fetches_for_the_job_alone(scene: Scene) -> None:
    with (
        serving(reply(SOUND)) as host,
        scene.worker(ZLORA_ALLOW_HOSTS=host.name, ZLORA_LOOK_AHEAD="0"),
    ):
        (receipt,) = with_lora(scene, host.url).result(timeout=60).loras

        assert (receipt.tier, host.asked) == ("network", ["GET /a.safetensors"])


def test_a_companion_killed_in_a_download_leaves_the_job_what_it_needs(scene: Scene) -> None:
    """The draft is taken over, by the job or by the companion after it."""
    begun, dead = threading.Event(), threading.Event()

    with (
        serving(once_endless(begun, dead)) as host,
        scene.worker(ZLORA_ALLOW_HOSTS=host.name) as running,
    ):
        drawn = scene.submit(steps=200, step=0.5)
        scene.wait_begun(drawn)
        following = with_lora(scene, host.url)
        assert begun.wait(60), "the companion fetches"
        scene.kill(running.companion())
        dead.set()
        drawn.cancel()
        result = following.result(timeout=60)

        assert (result.loras[0].size, result.attempt) == (len(SOUND), 1)
        assert list((scene.folder / "loras/drafts").iterdir()) == []


def test_a_job_that_meets_a_download_of_the_companion_waits_for_it(scene: Scene) -> None:
    """Nobody fetches the same at the same time."""
    begun, go_on = threading.Event(), threading.Event()

    def slowly(_: Request) -> Iterator[bytes]:
        whole = reply(SOUND)
        yield whole[:1000]
        begun.set()
        go_on.wait(60)
        yield whole[1000:]

    with serving(slowly) as host, scene.worker(ZLORA_ALLOW_HOSTS=host.name):
        drawn = scene.submit(steps=200, step=0.5)
        scene.wait_begun(drawn)
        following = with_lora(scene, host.url)
        assert begun.wait(60), "the companion fetches"
        drawn.cancel()
        wait_until(lambda: following.status().phase == "fetching", "the job waits for its LoRA")
        go_on.set()

        assert (following.result(timeout=60).loras[0].tier, len(host.requests)) == ("disk", 1)


def test_a_broker_that_goes_away_and_comes_back_is_looked_at_again(
    scene: Scene, valkey: Any
) -> None:
    with serving(reply(SOUND)) as host, scene.worker(ZLORA_ALLOW_HOSTS=host.name):
        drawn = scene.submit(steps=200, step=0.5)
        scene.wait_begun(drawn)
        valkey.kill()
        valkey.start()
        following = with_lora(scene, host.url)
        wait_until(lambda: host.sent, "the next job's LoRA is fetched")

        drawn.cancel()
        assert following.result(timeout=60).loras[0].tier == "disk"


def once_endless(begun: threading.Event, dead: threading.Event) -> Answer:
    """A host whose first answer stops in the middle, until somebody is dead, and whose others are whole."""
    whole, asked = reply(SOUND), iter(range(1000))

    def answer(_: Request) -> Iterator[bytes]:
        if next(asked):
            yield whole
            return
        yield whole[:1000]
        begun.set()
        dead.wait(60)

    return answer
