"""Fixtures of the server's tests."""

from collections.abc import Iterator

import pytest
import redis
from support.http_door import RIGHTS, SECRET_PROMPT, Door
from support.http_server import running, write_keys


@pytest.fixture(scope="module")
def door(broker_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    """Return a running server with three tenants."""
    folder = tmp_path_factory.mktemp("door")
    keys = write_keys(folder / "keys.json", **RIGHTS)
    log = folder / "log"
    with redis.Redis.from_url(broker_url) as broker:
        broker.flushall()
    with running(broker_url, log=log, ZLORA_API_KEYS=str(folder / "keys.json")) as server:
        port = redis.Redis.from_url(broker_url).connection_pool.connection_kwargs["port"]
        found = Door(server, log, keys, "", port)
        with found.client("other") as client:
            answer = client.post("/v1/jobs", json={"prompt": SECRET_PROMPT})
        yield found._replace(others_job=answer.json()["id"])
