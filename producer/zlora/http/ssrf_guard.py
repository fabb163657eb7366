"""An HTTP session for untrusted URLs: it connects only to addresses that it checked.

Built on ssrfguard, which resolves a name once, checks every address of the answer and connects to
one of them; the same for every redirect.
"""

import logging
import socket
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from http.cookiejar import DefaultCookiePolicy
from ipaddress import ip_network
from threading import Event, Thread, Timer, local
from typing import Any, Final
from urllib.parse import urlsplit

import requests
from requests import PreparedRequest, Response
from requests.adapters import BaseAdapter
from ssrfguard import DEFAULT_DENIED, AddressTable, Block, Policy, Reach
from ssrfguard.requests import SafeAdapter

# Azure's metadata and DNS server: public by the registries, internal on every Azure machine.
_AZURE: Final = Block(ip_network("168.63.129.16/32"), "Azure's platform", "", Reach.DENIED)
# Networks that IANA has not allocated: a local network may route them, as ::ffff:0:127.0.0.1.
_UNALLOCATED: Final = [
    Block(ip_network(network), "not global unicast", "", Reach.DENIED)
    for network in ("::/3", "4000::/2", "8000::/1")
]
_DENIED: Final = AddressTable((*DEFAULT_DENIED.blocks, _AZURE, *_UNALLOCATED))
_ANY: Final = (ip_network("0.0.0.0/0"), ip_network("::/0"))
_MAX_REDIRECTS: Final = 5
_NO_LINGER: Final = struct.pack("ii", 1, 0)  # `struct linger`: on, 0 seconds
# Headers that a redirect to another origin keeps; every other header may be a credential.
_PUBLIC_HEADERS: Final = frozenset(
    {"accept", "accept-encoding", "connection", "if-none-match", "range", "user-agent"}
)
_MAX_ATTEMPTS: Final = 2  # addresses of one name that are tried
NAME_SECONDS: Final = 5.0  # for the name service, which has no timeout of its own
CONNECT_SECONDS: Final = 5.0  # for each connection attempt
HEAD_SECONDS: Final = 30.0  # for the head of an answer: one that drips passes every other timeout
READ_SECONDS: Final = 10.0  # between two pieces of an answer


class HeadTimeout(requests.exceptions.RequestException):
    """The head of an answer was not complete in time."""


class _Deadline:
    """Ends the connections that it watches when their time is over.

    A timeout between two bytes is not enough: a server that drips bytes never meets it.
    """

    def __init__(self) -> None:
        self.over = Event()
        self._watched: list[socket.socket] = []

    def watch(self, connection: socket.socket) -> None:
        """End `connection` too. Keeps a duplicate: TLS detaches the original's descriptor."""
        self._watched.append(connection.dup())
        if self.over.is_set():
            self.cut()

    def end(self) -> None:
        """Mark the time as over and end all connections."""
        self.over.set()
        self.cut(reset=True)

    def cut(self, *, reset: bool = False) -> None:
        """End all connections so far, so that a thread that reads meets the end of the stream.

        `reset` informs the server too, which otherwise may wait a minute until it can send again.
        """
        while self._watched:
            # The connection may have ended, or the timer's thread may have taken it meanwhile.
            with suppress(OSError, IndexError), self._watched.pop() as connection:
                if reset:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
                connection.shutdown(socket.SHUT_RDWR)


class GuardedSession(requests.Session):
    """Opens https on port 443 of public addresses, and the hosts that the operator allows.

    `allow_hosts` holds `host` or `host:port` in lower case: these may have private addresses, use
    plain http and, if a port is given, listen on that port. `certificates` is a file of
    certificates to trust instead of certifi's. Refusals raise `ssrfguard.SSRFGuardError`. For one
    thread at a time.
    """

    def __init__(self, allow_hosts: Iterable[str] = (), *, certificates: str = "") -> None:
        super().__init__()
        self.verify = certificates or True
        # A proxy would resolve the name a second time; .netrc would add credentials.
        self.trust_env = False
        self.max_redirects = _MAX_REDIRECTS
        # A cookie that a site sets for one job must not open the site to the next job.
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        # Each connection is opened, and watched, within its own deadline.
        self.headers["Connection"] = "close"
        self._deadline: _Deadline | None = None
        strict = Policy(
            allowed_schemes=frozenset({"https"}),
            allowed_ports=frozenset({443}),
            denied_networks=_DENIED,
            max_connection_attempts=_MAX_ATTEMPTS,
        )
        for scheme in ("http", "https"):
            self.mount(f"{scheme}://", _Adapter(strict, self))
        for host in allow_hosts:
            port = urlsplit(f"//{host}").port
            policy = Policy(
                allowed_ports=frozenset({port} if port else {80, 443}),
                allowed_networks=_ANY,
                max_connection_attempts=_MAX_ATTEMPTS,
            )
            for scheme in ("http", "https"):
                # The slash ends the authority, so that no other host begins with this prefix.
                self.mount(f"{scheme}://{host}/", _Adapter(policy, self))

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[Event]:
        """End each connection of the block after `seconds`; yield an event that is set then."""
        self._deadline = deadline = _Deadline()
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
        """Put a new connection under the current deadline, if there is one."""
        if self._deadline:
            self._deadline.watch(connection)

    def cut(self) -> None:
        """End the open connections of the current deadline."""
        if self._deadline:
            self._deadline.cut()

    def get_adapter(self, url: str) -> BaseAdapter:
        """Return the adapter for the URL of a request or redirect, if its policy allows it."""
        adapter = super().get_adapter(url)
        if isinstance(adapter, SafeAdapter):
            adapter.policy.check_url(url)
        return adapter

    def rebuild_auth(self, prepared_request: PreparedRequest, response: Response) -> None:
        """Remove every header that may be a credential from a redirect to another origin."""
        super().rebuild_auth(prepared_request, response)  # type: ignore[no-untyped-call]
        here, there = str(response.request.url), str(prepared_request.url)
        if self.should_strip_auth(here, there):  # type: ignore[no-untyped-call]
            for name in list(prepared_request.headers):
                if name.lower() not in _PUBLIC_HEADERS:
                    del prepared_request.headers[name]


class _Adapter(SafeAdapter):
    """Shows each connection to its session, and reads no body of a redirect, as requests would."""

    def __init__(self, policy: Policy, session: GuardedSession) -> None:
        self._session = session
        super().__init__(policy=policy, resolver=_resolve)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        pools = self.poolmanager.pool_classes_by_scheme
        self.poolmanager.pool_classes_by_scheme = {
            scheme: _watched_pool(pool, self._session) for scheme, pool in pools.items()
        }

    def send(self, request: PreparedRequest, *arguments: Any, **options: Any) -> Response:
        late = Event()

        def cut() -> None:
            late.set()
            self._session.cut()

        timer = Timer(HEAD_SECONDS, cut)
        timer.daemon = True
        timer.start()
        try:
            with _without_logs():
                response = super().send(request, *arguments, **options)
        except requests.exceptions.RequestException as error:
            raise HeadTimeout(request=request) if late.is_set() else error from None
        finally:
            timer.cancel()
        if response.is_redirect:
            response.close()
            self._session.cut()
            response._content = b""  # noqa: SLF001 - as in a response whose body was read
        return response


class _GuardedRequestFilter(logging.Filter):
    """Drops urllib3's records of guarded requests: they quote URLs, which may hold secrets."""

    current = local()

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002 - every record
        return not getattr(self.current, "guarded", False)


@contextmanager
def _without_logs() -> Iterator[None]:
    _GuardedRequestFilter.current.guarded = True
    try:
        yield
    finally:
        _GuardedRequestFilter.current.guarded = False


for _name in ("connection", "connectionpool", "poolmanager", "util.retry"):
    logging.getLogger(f"urllib3.{_name}").addFilter(_GuardedRequestFilter())


def _resolve(*question: Any) -> Any:
    """Return the answer of the name service; a hostile one could block the thread for minutes."""
    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(socket.getaddrinfo(*question))
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
            answer.set_exception(error)

    Thread(target=ask, daemon=True).start()
    return answer.result(NAME_SECONDS)


def _watched_pool(pool: Any, session: GuardedSession) -> Any:
    """Return `pool`, a class, with connections that `session` can end."""

    class Connection(pool.ConnectionCls):  # type: ignore[misc]
        def _new_conn(self) -> socket.socket:
            opened: socket.socket = super()._new_conn()
            session.watch(opened)
            return opened

    class Pool(pool):  # type: ignore[misc]
        ConnectionCls = Connection

    return Pool
