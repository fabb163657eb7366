"""The one HTTP session for untrusted addresses: it connects only to addresses that it checked.

Built on ssrfguard, which resolves a name once, checks every answer and connects to that answer, at every redirect.
"""

import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_network
from threading import Event, Timer
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from requests import PreparedRequest, Response
from requests.adapters import BaseAdapter
from ssrfguard import DEFAULT_DENIED, AddressTable, Block, Policy, Reach
from ssrfguard.requests import SafeAdapter

# Azure's metadata and DNS server: a public address by the registries, and inside every Azure machine.
_AZURE: Final = Block(ip_network("168.63.129.16/32"), "Azure's platform", "", Reach.DENIED)
_DENIED: Final = AddressTable((*DEFAULT_DENIED.blocks, _AZURE))
_ANY: Final = (ip_network("0.0.0.0/0"), ip_network("::/0"))
_MAX_REDIRECTS: Final = 5
# What may follow a redirect to another origin; all else may be a credential.
_PUBLIC_HEADERS: Final = frozenset({"accept", "accept-encoding", "connection", "if-none-match", "user-agent"})
CONNECT_SECONDS: Final = 5.0
READ_SECONDS: Final = 10.0  # between two pieces of an answer; the whole has the caller's deadline


class Deadline:
    """Ends the connections that it watches when their time is over, whatever they are in the middle of.

    A server that drips headers satisfies every timeout between two bytes.
    """

    def __init__(self) -> None:
        self.over = Event()
        self._watched: list[socket.socket] = []

    def watch(self, connection: socket.socket) -> None:
        """End this one too. A duplicate is kept: TLS takes the descriptor out of the original."""
        self._watched.append(connection.dup())
        if self.over.is_set():
            self.cut()

    def end(self) -> None:
        """The time is over."""
        self.over.set()
        self.cut()

    def cut(self) -> None:
        """End all connections so far: whoever reads meets the end of the stream."""
        while self._watched:
            with suppress(OSError), self._watched.pop() as connection:  # it may have ended by itself
                connection.shutdown(socket.SHUT_RDWR)


class GuardedSession(requests.Session):
    """Opens https on port 443 of public addresses, and what the operator allows.

    `allow_hosts` holds `host` or `host:port` in lower case: these may be private, speak plain http and, where named,
    listen on that port. Refusals are `ssrfguard.SSRFGuardError`. For one thread at a time.
    """

    def __init__(self, allow_hosts: Iterable[str] = ()) -> None:
        super().__init__()
        self.trust_env = False  # a proxy would resolve the name a second time; .netrc would add credentials
        self.max_redirects = _MAX_REDIRECTS
        self.headers["Connection"] = "close"  # so that each connection is opened, and watched, within its own deadline
        self._deadline: Deadline | None = None
        strict = Policy(allowed_schemes=frozenset({"https"}), allowed_ports=frozenset({443}), denied_networks=_DENIED)
        for scheme in ("http", "https"):
            self.mount(f"{scheme}://", _Adapter(strict, self))
        for host in allow_hosts:
            self._allow(host)

    def _allow(self, host: str) -> None:
        port = urlsplit(f"//{host}").port
        policy = Policy(allowed_ports=frozenset({port} if port else {80, 443}), allowed_networks=_ANY)
        for scheme in ("http", "https"):
            # The slash ends the authority, so that no other host begins with this prefix.
            self.mount(f"{scheme}://{host}/", _Adapter(policy, self))

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[Event]:
        """End every connection opened inside after `seconds`; yields an event that is set by then."""
        self._deadline = deadline = Deadline()
        timer = Timer(seconds, deadline.end)
        timer.daemon = True
        timer.start()
        try:
            yield deadline.over
        finally:
            timer.cancel()
            self._deadline = None
            deadline.cut()

    def watch(self, connection: socket.socket) -> None:
        """Put a new connection under the present deadline, if there is one."""
        if self._deadline:
            self._deadline.watch(connection)

    def cut(self) -> None:
        """End the connections of this deadline that are open now."""
        if self._deadline:
            self._deadline.cut()

    def get_adapter(self, url: str) -> BaseAdapter:
        """The adapter for this hop, once its policy has passed the URL."""
        adapter = super().get_adapter(url)
        if isinstance(adapter, SafeAdapter):
            adapter.policy.check_url(url)
        return adapter

    def rebuild_auth(self, prepared_request: PreparedRequest, response: Response) -> None:
        """Take nothing along to another origin that may be a credential."""
        super().rebuild_auth(prepared_request, response)  # type: ignore[no-untyped-call]
        here, there = str(response.request.url), str(prepared_request.url)
        if self.should_strip_auth(here, there):  # type: ignore[no-untyped-call]
            for name in [name for name in prepared_request.headers if name.lower() not in _PUBLIC_HEADERS]:
                del prepared_request.headers[name]


class _Adapter(SafeAdapter):
    """Shows each connection to its session, and reads no body of a redirect: requests would, whatever its size."""

    def __init__(self, policy: Policy, session: GuardedSession) -> None:
        self._session = session
        super().__init__(policy=policy)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        pools = self.poolmanager.pool_classes_by_scheme
        self.poolmanager.pool_classes_by_scheme = {
            scheme: _watched(pool, self._session) for scheme, pool in pools.items()
        }

    def send(self, request: PreparedRequest, *arguments: Any, **options: Any) -> Response:
        response = super().send(request, *arguments, **options)
        if response.is_redirect:
            response.close()
            self._session.cut()
            response._content = b""  # noqa: SLF001 - what a response that was read has
        return response


def _watched(pool: Any, session: GuardedSession) -> Any:
    """The pool's class with connections that `session` can end."""

    class Connection(pool.ConnectionCls):  # type: ignore[misc]
        def _new_conn(self) -> socket.socket:
            opened: socket.socket = super()._new_conn()
            session.watch(opened)
            return opened

    class Pool(pool):  # type: ignore[misc]
        ConnectionCls = Connection

    return Pool
