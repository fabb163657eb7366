"""A `rediss://` broker: nothing is sent to a server that is not verified.

Jobs run through TLS in `tests/deploy/test_broker_users.py`. `make check-deploy` runs both files
with a server that has TLS of its own.
"""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.figures import Tally
from support.guarded import GuardedRedis
from support.processes import clean_environ, wait_until
from support.scene import Scene
from support.servers import Authority
from support.tls import TlsFront
from zlora import Client
from zlora.cli import doctor
from zlora.errors import BrokerUnavailable, InvalidSetting

PROMPT = {"prompt": "x"}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedRedis]:
    with GuardedRedis(tmp_path_factory.mktemp("tls")) as running:
        yield running


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Return an authority that neither the broker nor its clients know."""
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture
def impostor(broker: GuardedRedis, stranger: Authority) -> Iterator[TlsFront]:
    """Run a server that has the broker's name and another authority's certificate."""
    with TlsFront(broker.port, stranger, clients=None) as running:
        yield running


def redirected(broker: GuardedRedis, impostor: TlsFront, **options: str | None) -> str:
    """Return a URL of the broker whose connections go to the impostor."""
    url = broker.url("worker", **options)
    return url.replace(f":{broker.port}/", f":{impostor.port}/")


# without an option, the authorities of this machine are trusted
OPTIONS: list[dict[str, Any]] = [
    {},
    {"ssl_ca_certs": None},
    {"ssl_ca_certs": None, "ssl_certfile": None, "ssl_keyfile": None},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["own authority", "no authority", "no option"])
def test_a_client_sends_nothing_to_an_impostor(
    broker: GuardedRedis, impostor: TlsFront, options: dict[str, Any]
) -> None:
    url = redirected(broker, impostor, **options)

    with Client(url) as client, pytest.raises(BrokerUnavailable, match="certificate verify failed"):
        client.submit(PROMPT)
    found = {check.name: check for check in doctor.checks({"ZLORA_BROKER_URL": url})}

    assert "certificate verify failed" in found["broker"].told
    assert "ssl_ca_certs" in (found["broker"].advice or "")
    assert impostor.accepted == 0


def test_a_worker_sends_nothing_to_an_impostor_and_waits(
    broker: GuardedRedis, impostor: TlsFront, tmp_path: Path
) -> None:
    """Also if the URL has no options for TLS, and the result backend is another Redis."""
    url = redirected(broker, impostor, **OPTIONS[-1])
    backend = broker.url("default", ssl_cert_reqs="required")
    variables = {"ZLORA_BROKER_URL": url, "ZLORA_RESULT_BACKEND": backend}
    scene = Scene(tmp_path / "scene", Tally(), broker_url=backend, queue="gpu")
    with closing(scene), scene.starting_worker(**variables) as running:
        wait_until(lambda: running.lines("certificate verify failed"), "the worker tells why")
        running.process.send_signal(signal.SIGTERM)

        assert running.process.wait(30) == 0
    assert impostor.accepted == 0


def test_the_name_in_the_certificate_is_compared(broker: GuardedRedis) -> None:
    url = broker.url("producer").replace("@localhost:", "@127.0.0.1:")

    with Client(url) as client, pytest.raises(BrokerUnavailable, match="IP address mismatch"):
        client.submit(PROMPT)


@pytest.mark.parametrize("is_shown", [False, True])
def test_a_client_without_the_right_certificate_is_refused_and_doctor_says_so(
    broker: GuardedRedis, stranger: Authority, is_shown: bool
) -> None:
    """The reason may be lost in the client, which writes as soon as it may."""
    certificate = key = None
    if is_shown:
        certificate = str(stranger.certificate("client"))
        key = certificate.replace(".pem", ".key")
    url = broker.url("producer", ssl_certfile=certificate, ssl_keyfile=key)

    with Client(url) as client, pytest.raises(BrokerUnavailable, match="`zlora doctor` checks"):
        client.submit(PROMPT)
    found = {check.name: check for check in doctor.checks({"ZLORA_BROKER_URL": url})}

    assert "TLS" in found["broker"].told
    assert "ssl_certfile" in (found["broker"].advice or "")


def test_only_an_explicit_option_turns_verification_off_and_doctor_warns(
    broker: GuardedRedis,
) -> None:
    url = broker.url("operator", ssl_cert_reqs="none").replace("@localhost:", "@127.0.0.1:")

    found = {check.name: check.status for check in doctor.checks({"ZLORA_BROKER_URL": url})}

    assert (found["broker"], found["broker: TLS"]) == ("ok", "warn")


def test_a_file_that_cannot_be_used_is_told_in_one_line(broker: GuardedRedis) -> None:
    url = broker.url("worker", ssl_ca_certs="/nowhere.pem")
    told = "ZLORA_BROKER_URL: ssl_ca_certs=/nowhere.pem: No such file or directory"

    ran = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "zlora_worker.app", "worker"],
        env=clean_environ({"ZLORA_BROKER_URL": url}),
        capture_output=True,
        text=True,
        check=False,
    )
    with pytest.raises(InvalidSetting) as raised:
        Client(url)

    assert (ran.returncode, ran.stderr) == (1, f"zlora: {told}\n")
    assert str(raised.value) == told
