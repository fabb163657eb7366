"""A server with API keys, and what two tenants have there."""

from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
from support.http_server import Server
from zlora.server.tenants import Tenant

RIGHTS: Final = {
    "mine": Tenant(),
    "other": Tenant(),
    "limited": Tenant(
        sources=("hf://owner/", "https://files.example/loras/"),
        catalogue=("public-*",),
        models=("small",),
    ),
}
SECRET_PROMPT: Final = "the secret of another tenant"


class Door(NamedTuple):
    """A server, its log, the keys by tenant, and a job of another tenant."""

    server: Server
    log: Path
    keys: dict[str, str]
    others_job: str
    broker_port: int

    def client(self, tenant: str = "mine") -> httpx.Client:
        """Return a client with the key of a tenant."""
        return self.server.client(self.keys[tenant])


def code_of(answer: httpx.Response) -> Any:
    """Return the code of an answer that is a problem document (RFC 9457)."""
    assert answer.headers["content-type"] == "application/problem+json"
    document = answer.json()
    assert document["status"] == answer.status_code
    assert document["type"] == f"urn:zlora:error:{document['code']}"
    assert document["title"]
    assert document["detail"]
    return document["code"]
