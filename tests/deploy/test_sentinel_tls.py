"""A Sentinel and a primary that speak TLS only: worker, clients and `zlora doctor` find it.

It needs a server with TLS of its own, as Debian's, which `make check-deploy` installs.
"""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import pytest
from support.figures import Tally
from support.guarded import GuardedRedis
from support.processes import free_port
from support.scene import Scene, request
from support.servers import Authority
from zlora import Client
from zlora.cli import doctor
from zlora.errors import BrokerUnavailable

SERVER: Final = shutil.which("valkey-server")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedRedis]:
    with GuardedRedis(tmp_path_factory.mktemp("tls"), tls_server=SERVER) as running:
        yield running


@contextmanager
def sentinel(broker: GuardedRedis, folder: Path) -> Iterator[int]:
    """Run a Sentinel of the broker, which calls it `localhost`, as its certificate does."""
    port, file = free_port(), folder / "sentinel.conf"
    password = broker.url("default").partition("@")[0].rpartition(":")[2]
    lines = {
        "port": "0",
        "tls-port": str(port),
        "bind": "127.0.0.1",
        "dir": str(folder),
        "tls-replication": "yes",  # to the broker, too
        **broker.tls_options(),
        "sentinel resolve-hostnames": "yes",
        "sentinel announce-hostnames": "yes",
        "sentinel monitor main": f"localhost {broker.port} 1",
        "sentinel auth-pass main": password,
    }
    file.write_text("".join(f"{name} {value}\n" for name, value in lines.items()))
    assert SERVER is not None
    process = subprocess.Popen([SERVER, file, "--sentinel"], stdout=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.kill()
        process.wait()


def test_all_processes_find_the_primary_by_tls(broker: GuardedRedis, tmp_path: Path) -> None:
    with sentinel(broker, tmp_path) as port:
        producer, worker, operator = (
            by_sentinel(broker, port, user) for user in ("producer", "worker", "operator")
        )
        scene = Scene(tmp_path / "scene", Tally(), broker_url=broker.url("default"), queue="gpu")
        with (
            closing(scene),
            scene.worker(ZLORA_BROKER_URL=worker),
            Client(producer) as client,
        ):
            assert client.submit(request("job")).result(timeout=60).base_intact
            found = {
                check.name: check.status for check in doctor.checks({"ZLORA_BROKER_URL": operator})
            }

    assert (found["broker"], found["workers"]) == ("ok", "ok")
    assert broker.denials() == []


def test_a_sentinel_that_is_not_verified_is_refused(broker: GuardedRedis, tmp_path: Path) -> None:
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    with sentinel(broker, tmp_path) as port:
        url = by_sentinel(broker, port, "producer", ssl_ca_certs=str(Authority(stranger).bundle))

        with Client(url) as client, pytest.raises(BrokerUnavailable):
            client.submit({"prompt": "x"})


def by_sentinel(broker: GuardedRedis, port: int, user: str, **options: str) -> str:
    """Return a user's URL that names the Sentinel."""
    url = broker.url(user, **options).replace("rediss://", "sentinel://")
    return url.replace(f":{broker.port}/", f":{port}/") + "&master=main"
