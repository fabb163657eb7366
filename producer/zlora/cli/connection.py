"""Where the commands get their client: the one place for tests to put another."""

from typing import TYPE_CHECKING

from zlora.client import Client

if TYPE_CHECKING:
    from zlora.async_client import AsyncClient


def client() -> Client:
    """A client by the environment."""
    return Client.from_env()


def async_client() -> "AsyncClient":
    """The same for asyncio."""
    from zlora.async_client import AsyncClient

    return AsyncClient.from_env()
