"""Many waits of one process at once survive a restart of the broker.

`make bench-producer` does the same with a thousand.
"""

import asyncio

from support.crowd import gathered
from support.scene import Scene
from support.valkey import Valkey
from zlora import AsyncClient

JOBS = 60


def test_no_result_is_missed_of_many_when_the_broker_restarts(scene: Scene, valkey: Valkey) -> None:
    restarts = 0

    def restart_in_the_middle(done: int) -> None:
        nonlocal restarts
        if done >= JOBS // 3 and not restarts:
            restarts += 1
            valkey.kill()
            valkey.start()

    async def run() -> None:
        async with AsyncClient.from_url(valkey.url, queue=scene.queue) as client:
            crowd = await gathered(client, JOBS, look=restart_in_the_middle)
        assert crowd.missed == []
        assert 0 < crowd.connections <= 24

    with scene.worker():
        asyncio.run(run())
    assert restarts == 1
