"""The one HTTP session for untrusted addresses: it connects only to addresses that it checked.

Built on ssrfguard, which resolves a name once, checks every answer and connects to that answer, at every redirect.
"""

from collections.abc import Iterable
from ipaddress import ip_network
from typing import Final
from urllib.parse import urlsplit

import requests
from requests.adapters import BaseAdapter
from ssrfguard import DEFAULT_DENIED, AddressTable, Block, Policy, Reach
from ssrfguard.requests import SafeAdapter

# Azure's metadata and DNS server: a public address by the registries, and inside every Azure machine.
_AZURE: Final = Block(ip_network("168.63.129.16/32"), "Azure's platform", "", Reach.DENIED)
_DENIED: Final = AddressTable((*DEFAULT_DENIED.blocks, _AZURE))
_ANY: Final = (ip_network("0.0.0.0/0"), ip_network("::/0"))
CONNECT_SECONDS: Final = 5.0
READ_SECONDS: Final = 10.0  # between two pieces of an answer; the whole has the caller's deadline


class GuardedSession(requests.Session):
    """Opens https on port 443 of public addresses, and what the operator allows.

    `allow_hosts` holds `host` or `host:port` in lower case: these may be private, speak plain http and, where named,
    listen on that port. Refusals are `ssrfguard.SSRFGuardError`.
    """

    def __init__(self, allow_hosts: Iterable[str] = ()) -> None:
        super().__init__()
        self.trust_env = False  # a proxy would resolve the name a second time; .netrc would add credentials
        strict = Policy(allowed_schemes=frozenset({"https"}), allowed_ports=frozenset({443}), denied_networks=_DENIED)
        for scheme in ("http", "https"):
            self.mount(f"{scheme}://", SafeAdapter(policy=strict))
        for host in allow_hosts:
            self._allow(host)

    def _allow(self, host: str) -> None:
        port = urlsplit(f"//{host}").port
        policy = Policy(allowed_ports=frozenset({port} if port else {80, 443}), allowed_networks=_ANY)
        for scheme in ("http", "https"):
            # The slash ends the authority, so that no other host begins with this prefix.
            self.mount(f"{scheme}://{host}/", SafeAdapter(policy=policy))

    def get_adapter(self, url: str) -> BaseAdapter:
        """The adapter for this hop, once its policy has passed the URL."""
        adapter = super().get_adapter(url)
        if isinstance(adapter, SafeAdapter):
            adapter.policy.check_url(url)
        return adapter
