"""Guests' names on the bridge: `NAME.guest.rayos` for each machine that has an address, by our DNS.

Invariant: a machine's name stands for the address that its own card leased; what another client of the bridge
calls itself counts only where no machine has that name. Trouble (port 53 is taken) ends the names, not the network.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import trio

from rayos_net.dhcp.binding import Binding, BindingState
from rayos_net.dns.service import DnsError, DnsService, serve_dns
from rayos_net.dns.zone import Zone
from rayos_vmm.errors import one_error
from rayos_vmm.events import EventLog
from rayos_vmm.network.view import NamesView

LOG: Final = logging.getLogger(__name__)
DOMAIN: Final = "guest.rayos"
_RESOLV_CONF: Final = Path("/etc/resolv.conf")


class GuestNames:
    """The names of one subnet. `trouble` says why there are none, if there are none."""

    def __init__(self) -> None:
        self.trouble = "DNS has not started"
        self._dns: DnsService | None = None

    @property
    def is_serving(self) -> bool:
        return self._dns is not None

    def status(self) -> NamesView:
        """Domain, trouble and counters, as `rayos dhcp status` shows them."""
        counters = {} if self._dns is None else dict(sorted(self._dns.counters.items()))
        return NamesView(domain=DOMAIN, trouble=self.trouble, counters=counters)

    def take(self, binding: Binding, machines: Mapping[str, str]) -> None:
        """A lease changed, or was found in the store; `machines` are their names by MAC."""
        if self._dns is None:
            return
        zone = self._dns.zone
        if binding.state is not BindingState.BOUND:
            zone.put(binding.ip, None)
            return
        name = machines.get(binding.mac)
        if name is not None:
            holder = zone.holder(name)
            if holder is not None and holder != binding.ip:
                zone.put(holder, None)
        elif binding.host_name not in machines.values():
            name = binding.host_name
        zone.put(binding.ip, name)

    async def serve(
        self,
        link: str,
        subnet: ipaddress.IPv4Network,
        resolver: str,
        events: EventLog,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """DNS at the first address of `subnet` on `link` until cancelled; returns when that is not possible."""
        server = subnet.network_address + 1
        zone = Zone(DOMAIN, subnet, server)
        try:
            with one_error():
                async with trio.open_nursery() as nursery:
                    self._dns = await nursery.start(
                        lambda task_status: serve_dns(
                            link, zone, server, resolver=_resolver(resolver), task_status=task_status
                        )
                    )
                    self.trouble = ""
                    task_status.started()
        except DnsError as error:
            self.trouble = str(error)
            LOG.warning("Guests have no names", extra={"why": self.trouble})
            events.publish("names.failed", None, reason=self.trouble)
            task_status.started()
        finally:
            self._dns = None


def _resolver(words: str) -> ipaddress.IPv4Address | None:
    """Returns the resolver of the setting: none, the host's own first name server, or an address."""
    if words != "host":
        return ipaddress.IPv4Address(words) if words else None
    try:
        lines = _RESOLV_CONF.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        kind, *rest = line.split()[:2] or [""]
        if kind == "nameserver" and rest:
            try:
                return ipaddress.IPv4Address(rest[0])
            except ValueError:
                continue  # IPv6
    LOG.warning(
        "The host has no IPv4 name server; other names are refused", extra={"file": str(_RESOLV_CONF)}
    )
    return None
