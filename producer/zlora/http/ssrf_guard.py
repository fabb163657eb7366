"""The one HTTP session for untrusted addresses: it connects only to addresses that it checked.

Built on ssrfguard, which resolves a name once, checks every answer and connects to that answer, at every redirect.
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

# Azure's metadata and DNS server: a public address by the registries, and inside every Azure machine.
_AZURE: Final = Block(ip_network("168.63.129.16/32"), "Azure's platform", "", Reach.DENIED)
# What IANA has given to nobody: an address there means what the local network makes of it, as ::ffff:0:127.0.0.1 does.
_OUTSIDE: Final = [
    Block(ip_network(network), "not global unicast", "", Reach.DENIED)
    for network in ("::/3", "4000::/2", "8000::/1")
]
_DENIED: Final = AddressTable((*DEFAULT_DENIED.blocks, _AZURE, *_OUTSIDE))
_ANY: Final = (ip_network("0.0.0.0/0"), ip_network("::/0"))
_MAX_REDIRECTS: Final = 5
_NO_LINGERING: Final = struct.pack("ii", 1, 0)  # `struct linger`: on, for no time
# What may follow a redirect to another origin; all else may be a credential.
_PUBLIC_HEADERS: Final = frozenset(
    {"accept", "accept-encoding", "connection", "if-none-match", "range", "user-agent"}
)
_MAX_ATTEMPTS: Final = 2  # addresses of one name that are tried
NAME_SECONDS: Final = 5.0  # for the name service, which has no deadline of its own
CONNECT_SECONDS: Final = 5.0  # for each attempt
ANSWER_SECONDS: Final = (
    30.0  # for the head of an answer: a server that drips it satisfies every timeout
)
READ_SECONDS: Final = 10.0  # between two pieces of an answer; the whole has the caller's deadline


class NoAnswer(requests.exceptions.RequestException):
    """The head of an answer was not there in time."""


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
        self.cut(abruptly=True)

    def cut(self, *, abruptly: bool = False) -> None:
        """End all connections so far: whoever reads meets the end of the stream.

        `abruptly` tells the server too, which else may wait for a minute until it can send on.
        """
        while self._watched:
            # It may have ended by itself, or been taken by the timer's thread meanwhile.
            with suppress(OSError, IndexError), self._watched.pop() as connection:
                if abruptly:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGERING)
                connection.shutdown(socket.SHUT_RDWR)


class GuardedSession(requests.Session):
    """Opens https on port 443 of public addresses, and what the operator allows.

    `allow_hosts` holds `host` or `host:port` in lower case: these may be private, speak plain http and, where named,
    listen on that port. `certificates` is a file of those to trust instead of certifi's. Refusals are
    `ssrfguard.SSRFGuardError`. For one thread at a time.
    """

    def __init__(self, allow_hosts: Iterable[str] = (), *, certificates: str = "") -> None:
        super().__init__()
        self.verify = certificates or True
        self.trust_env = (
            False  # a proxy would resolve the name a second time; .netrc would add credentials
        )
        self.max_redirects = _MAX_REDIRECTS
        # What a site sets for one producer must not open it to the next.
        self.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
        self.headers["Connection"] = (
            "close"  # so that each connection is opened, and watched, within its own deadline
        )
        self._deadline: Deadline | None = None
        strict = Policy(
            allowed_schemes=frozenset({"https"}),
            allowed_ports=frozenset({443}),
            denied_networks=_DENIED,
            max_connection_attempts=_MAX_ATTEMPTS,
        )
        for scheme in ("http", "https"):
            self.mount(f"{scheme}://", _Adapter(strict, self))
        for host in allow_hosts:
            self._allow(host)

    def _allow(self, host: str) -> None:
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
            for name in [
                name for name in prepared_request.headers if name.lower() not in _PUBLIC_HEADERS
            ]:
                del prepared_request.headers[name]


class _Adapter(SafeAdapter):
    """Shows each connection to its session, and reads no body of a redirect: requests would, whatever its size."""

    def __init__(self, policy: Policy, session: GuardedSession) -> None:
        self._session = session
        super().__init__(policy=policy, resolver=_addresses)

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        pools = self.poolmanager.pool_classes_by_scheme
        self.poolmanager.pool_classes_by_scheme = {
            scheme: _watched(pool, self._session) for scheme, pool in pools.items()
        }

    def send(self, request: PreparedRequest, *arguments: Any, **options: Any) -> Response:
        late = Event()

        def cut() -> None:
            late.set()
            self._session.cut()

        timer = Timer(ANSWER_SECONDS, cut)
        timer.daemon = True
        timer.start()
        try:
            with _quiet():
                response = super().send(request, *arguments, **options)
        except requests.exceptions.RequestException as error:
            raise NoAnswer(request=request) if late.is_set() else error from None
        finally:
            timer.cancel()
        if response.is_redirect:
            response.close()
            self._session.cut()
            response._content = b""  # noqa: SLF001 - what a response that was read has
        return response


class _Quiet(logging.Filter):
    """Drops what urllib3 says of guarded requests: whole URLs, in warnings too, and they may hold secrets."""

    asking = local()

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002 - whatever it is
        return not getattr(self.asking, "now", False)


@contextmanager
def _quiet() -> Iterator[None]:
    _Quiet.asking.now = True
    try:
        yield
    finally:
        _Quiet.asking.now = False


for _name in ("connection", "connectionpool", "poolmanager", "util.retry"):
    logging.getLogger(f"urllib3.{_name}").addFilter(_Quiet())


def _addresses(*question: Any) -> Any:
    """What the name service answers, within its time: a hostile one could hold the caller for as long as it likes."""
    answer: Future[Any] = Future()

    def ask() -> None:
        try:
            answer.set_result(socket.getaddrinfo(*question))
        except Exception as error:  # noqa: BLE001 - it is raised where the answer is waited for
            answer.set_exception(error)

    Thread(target=ask, daemon=True).start()
    return answer.result(NAME_SECONDS)


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
