"""Every machine's firewall, seen from the service: which rules it has, which addresses, and what its worker says.

A machine's effective rules are a list with an origin each: its own, what it inherits (`merge`), and `defaults` behind
all others. A change is compiled and obeyed by the machine's worker when `set_rules` returns, and it is told them again
whenever the connection is made anew: after a worker's death it knows them by itself, after ours from us. A machine that
does not run gets them when it starts.

Leases go to a page in the machine's run directory (`shared/addresses.py`), in force before the guest hears of them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import trio

from rayos_net.firewall.text import BadText
from rayos_net.guard import ANY_SERVER
from rayos_net.naming import tap_name
from rayos_vmm.config.firewall import (
    VM,
    ZONE,
    FirewallConfig,
    FirewallRule,
    OwnedRule,
    check_firewall,
    names,
    resolve,
)
from rayos_vmm.errors import Conflict, GuestGone, Invalid, NotFound
from rayos_vmm.shared.addresses import PAGE_NAME, AddressPage
from rayos_vmm.shared.packet import WorkerError, WorkerGone
from rayos_vmm.shared.spec import Firewall as WorkerFirewall
from rayos_vmm.shared.view import Verdict
from rayos_vmm.worker.firewall import BYTES_MAX, RULES_MAX, Settings, explain_alone

log = logging.getLogger(__name__)

DEVICE: Final = "net"
DEFAULT: Final = "default"
#: Behind every rule that has been written by somebody.
_LAST: Final = 65535


class Channel(Protocol):
    """The firewall's requests to a machine's worker."""

    async def set_rules(self, device: str, settings: bytes) -> int: ...
    async def explain(self, device: str, packet: str) -> Verdict: ...
    async def rule_counts(self, device: str) -> tuple[int, list[int]]: ...
    def trace(self, device: str) -> AbstractAsyncContextManager[Any]: ...


class Kernel(Protocol):
    """The guards on the taps themselves: a second line, behind the workers'."""

    def set(self, tap: str, mac: bytes, addresses: Iterable[int]) -> None: ...
    def remove(self, tap: str) -> None: ...
    async def commit(self) -> None: ...


@dataclass(slots=True)
class _Port:
    """A machine's network card. `page` and `channel` are there while it runs."""

    config: FirewallConfig
    mac: str
    is_upstream: bool = False  # its address is somebody else's to give
    rules: tuple[OwnedRule, ...] = ()  # effective, without the defaults
    revision: int = 0
    leased: set[int] = field(default_factory=set)
    page: AddressPage | None = None
    channel: Channel | None = None
    lock: trio.Lock = field(default_factory=trio.Lock)

    @property
    def hardware(self) -> bytes:
        return bytes.fromhex(self.mac.replace(":", ""))

    @property
    def addresses(self) -> set[int]:
        """The addresses that the guest may use."""
        return {*self.leased, *(int(IPv4Address(one)) for one in self.config.addresses)}


async def _forget(_vm: str, _config: FirewallConfig) -> None:
    """Rules of a firewall that nobody stores."""


class Inherited(Protocol):
    """The rules that a machine has beside its own. Who changes an answer calls `Firewall.refresh` afterwards."""

    def merge(self, vm: str, own: Sequence[OwnedRule]) -> Sequence[OwnedRule]:
        """A machine's effective rules, from its own."""
        ...

    def members(self, word: str) -> Iterable[str]:
        """The machines in a `zone:NAME`. Raises Invalid when there is no such zone."""
        ...


class NothingInherited:
    """A machine has its own rules alone, and there are no zones."""

    def merge(self, vm: str, own: Sequence[OwnedRule]) -> Sequence[OwnedRule]:
        return own

    def members(self, word: str) -> Iterable[str]:
        raise Invalid(f"there is no {word}")


class Network(Protocol):
    """Where the guests live: the first address is the host's."""

    @property
    def subnet(self) -> IPv4Network: ...
    def addresses_of(self, mac: str) -> Iterable[str]:
        """The addresses that a card has a lease for now."""
        ...


class Firewall:
    """Use it from one trio run. `host()` has the host's other addresses; `save(vm, config)` stores own rules."""

    def __init__(
        self,
        network: Network,
        kernel: Kernel | None = None,
        host: Callable[[], Iterable[str]] = tuple,
        *,
        inherited: Inherited | None = None,
        save: Callable[[str, FirewallConfig], Awaitable[None]] = _forget,
    ) -> None:
        self._network = network
        self._kernel = kernel
        self._host = host
        self._inherited = inherited or NothingInherited()
        self._save = save
        self._ports: dict[str, _Port] = {}
        self._stale: set[str] = set()
        self._is_stale = trio.Event()

    def check(self, config: FirewallConfig, known: Sequence[FirewallRule] = ()) -> None:
        """Whether a machine's own rules make sense here; those in `known` were checked before.

        Raises:
            Invalid: they do not, or name a zone that there is not.
        """
        check_firewall(config, known)
        for word in names(config.rules):
            if word.startswith(ZONE):
                self._inherited.members(word)

    # -- machines ------------------------------------------------------------------------------------------------

    def define(self, vm: str, config: FirewallConfig, mac: str, *, is_upstream: bool = False) -> None:
        """A machine, with its own rules, which are sound, and its card's hardware address."""
        port = _Port(config, mac, is_upstream)
        port.rules = tuple(self._inherited.merge(vm, _owned(vm, config)))
        self._ports[vm] = port

    def forget(self, vm: str) -> None:
        """The machine is removed."""
        self.detach(vm)
        self._ports.pop(vm, None)
        self._mark(f"{VM}{vm}")

    async def plug(self, vm: str, runtime: Path) -> WorkerFirewall:
        """Returns the settings for the machine's new worker; the descriptor in it is the caller's to close. Its tap,
        which is there, is guarded when this returns. Errors: OSError.
        """
        port = self._port(vm)
        self.detach(vm)
        port.leased.clear()
        port.revision += 1
        port.rules = tuple(self._inherited.merge(vm, _owned(vm, port.config)))
        port.page = AddressPage(runtime / PAGE_NAME, is_new=True)
        self._guard_tap(vm, port)
        await self.commit()
        return WorkerFirewall(
            mac=port.mac,
            server=str(self._dhcp_server(port)),
            is_guarded=port.config.guard,
            addresses=tuple(port.config.addresses),
            page_fd=os.open(runtime / PAGE_NAME, os.O_RDONLY | os.O_CLOEXEC),
            revision=port.revision,
            rules=self._resolve(port.rules),
        )

    async def attach(self, vm: str, runtime: Path, channel: Channel) -> None:
        """The machine's worker is there, perhaps since before we were: it judges by our rules when this returns.

        A machine without a card of ours has nothing to be told.
        """
        port = self._ports.get(vm)
        if port is None:
            return
        if port.page is None:
            try:
                port.page = AddressPage(runtime / PAGE_NAME, is_new=False)
            except OSError:
                return  # no card, or one of a version without a firewall
            port.leased = {int(IPv4Address(one)) for one in self._network.addresses_of(port.mac)}
            port.page.write(port.leased)
            self._guard_tap(vm, port)
            await self.commit()
        port.channel = channel
        try:
            known, _ = await channel.rule_counts(DEVICE)
            port.revision = max(port.revision, known)
            await self.refresh(vm)
        except (WorkerError, WorkerGone, GuestGone, Invalid) as error:
            log.warning("a machine's firewall was not told its rules", extra={"vm": vm, "why": str(error)})

    def detach(self, vm: str) -> None:
        """The worker is gone, or we are. Safe to call again."""
        port = self._ports.get(vm)
        if port is not None:
            port.channel = None
            if port.page is not None:
                port.page.close()
                port.page = None

    async def unplug(self, vm: str) -> None:
        """The machine has ended. Safe to call again."""
        self.detach(vm)
        if vm in self._ports and self._kernel is not None:
            self._kernel.remove(tap_name(vm))
            await self.commit()

    async def commit(self) -> None:
        """Returns when the kernel's guards know the leases too."""
        if self._kernel is not None:
            await self._kernel.commit()

    def _guard_tap(self, vm: str, port: _Port) -> None:
        if self._kernel is not None and port.config.guard:
            self._kernel.set(tap_name(vm), port.hardware, port.addresses)

    # -- leases --------------------------------------------------------------------------------------------------

    def bind(self, mac: str, address: str) -> bool:
        """The card `mac` may use `address` from now on; whether it is one of ours and this is news."""
        return self._lease(mac, int(IPv4Address(address)), is_bound=True)

    def unbind(self, mac: str, address: str) -> bool:
        """It may not any more."""
        return self._lease(mac, int(IPv4Address(address)), is_bound=False)

    def _lease(self, mac: str, address: int, *, is_bound: bool) -> bool:
        for vm, port in self._ports.items():
            if port.mac != mac or (address in port.leased) is is_bound:
                continue
            port.leased ^= {address}
            if port.page is not None:
                port.page.write(port.leased)
                self._guard_tap(vm, port)
            self._mark(f"{VM}{vm}")
            return True
        return False

    def _mark(self, word: str) -> None:
        """Rules that name this machine, or a zone, mean something else now; so does the kernel's guard."""
        self._is_stale.set()
        for vm, port in self._ports.items():
            used = names(one.rule for one in port.rules)
            if word in used or any(not one.startswith(VM) for one in used):
                self._stale.add(vm)

    def host_changed(self) -> None:
        """The host has other addresses: the defaults of every machine mean something else now."""
        self._stale.update(self._ports)
        self._is_stale.set()

    async def run(self) -> None:
        """Tells workers what the names in their rules stand for now. Ends when cancelled."""
        while True:
            await self._is_stale.wait()
            self._is_stale = trio.Event()
            await self.commit()
            while self._stale:
                vm = self._stale.pop()
                with suppress(GuestGone, Conflict, Invalid, NotFound):
                    await self.set_rules(vm, self._port(vm).rules)

    # -- rules ---------------------------------------------------------------------------------------------------

    def rules(self, vm: str) -> list[OwnedRule]:
        """The effective rules, the defaults last. Raises NotFound."""
        return [*self._port(vm).rules, *self._defaults()]

    def own(self, vm: str) -> list[FirewallRule]:
        """The machine's own rules. Raises NotFound."""
        return list(self._port(vm).config.rules)

    async def set_own(self, vm: str, rules: Sequence[FirewallRule]) -> int:
        """Replaces the machine's own rules: stored, and obeyed by its worker, when this returns the revision.

        Raises:
            Invalid: they make no sense; nothing is changed.
            GuestGone: the worker did not take them: they are stored, and it gets them when it can be reached.
        """
        port = self._port(vm)
        config = msgspec.structs.replace(port.config, rules=list(rules))
        self.check(config, port.config.rules)
        await self._save(vm, config)
        port.config = config
        return await self.refresh(vm)

    async def refresh(self, vm: str) -> int:
        """Merges the machine's rules anew and tells its worker. Raises as `set_rules`."""
        return await self.set_rules(vm, self._inherited.merge(vm, _owned(vm, self._port(vm).config)))

    def check_inherited(self, vm: str, inherited: Sequence[OwnedRule]) -> None:
        """Whether these rules, with the machine's own, are what a worker takes. Raises Invalid."""
        if vm in self._ports:
            self._encode(vm, [*inherited, *_owned(vm, self._ports[vm].config)])

    async def set_rules(self, vm: str, rules: Sequence[OwnedRule]) -> int:
        """Replaces a machine's effective rules (the defaults stay behind them); returns the revision that is obeyed.

        Raises:
            NotFound: there is no such machine.
            Invalid: a rule makes no sense, or names what there is not; nothing is changed.
            GuestGone: the worker did not take them.
        """
        port = self._port(vm)
        async with port.lock:
            settings = self._encode(vm, rules)
            port.rules = tuple(rules)
            port.revision += 1
            if port.channel is None:
                return port.revision
            try:
                port.revision = await port.channel.set_rules(DEVICE, settings)
            except WorkerGone as error:
                raise GuestGone(f"{vm}: its devices did not take the rules: {error}") from None
            except WorkerError as error:
                raise Invalid(f"{vm}: its devices refused the rules: {error}") from None
            return port.revision

    # -- questions -----------------------------------------------------------------------------------------------

    async def explain(self, vm: str, packet: str) -> Verdict:
        """Explains the fate of a packet in words, and by which rule; the worker is asked while the machine runs.

        Raises:
            Invalid: the words are no packet.
        """
        port = self._port(vm)
        try:
            if port.channel is not None:
                return await port.channel.explain(DEVICE, packet)
            rules = self._resolve(port.rules)
            server = int(self._dhcp_server(port))
            return explain_alone(port.hardware, rules, port.addresses, server, packet)
        except BadText as error:
            raise Invalid(str(error)) from None
        except WorkerError as error:
            raise Invalid(str(error)) from None
        except WorkerGone as error:
            raise GuestGone(f"{vm}: {error}") from None

    def trace(self, vm: str) -> AbstractAsyncContextManager[Any]:
        """Each verdict from now on, as long as the context is open.

        Raises:
            Conflict: it does not run.
        """
        return self._running(vm).trace(DEVICE)

    async def counts(self, vm: str) -> list[int] | None:
        """How many frames each of `rules` decided; None while it does not run, or they are just changing."""
        port = self._port(vm)
        if port.channel is None:
            return None
        try:
            revision, counts = await port.channel.rule_counts(DEVICE)
        except (WorkerError, WorkerGone):
            return None
        index = iter(counts)
        present = [self._resolved(one) is not None for one in self.rules(vm)]
        if revision != port.revision or sum(present) != len(counts):
            return None
        return [next(index) if is_there else 0 for is_there in present]

    # -- inner workings ------------------------------------------------------------------------------------------

    def _encode(self, vm: str, rules: Sequence[OwnedRule]) -> bytes:
        resolved = self._resolve(rules)
        settings = msgspec.json.encode(Settings(revision=self._port(vm).revision + 1, rules=resolved))
        if len(resolved) > RULES_MAX or len(settings) > BYTES_MAX:
            seen = f"{len(resolved)} rules of {len(settings)} bytes"
            raise Invalid(f"{vm}: {seen}; at most {RULES_MAX} of {BYTES_MAX} are allowed")
        return settings

    @property
    def _server(self) -> IPv4Address:
        return self._network.subnet.network_address + 1

    def _dhcp_server(self, port: _Port) -> IPv4Address:
        # An upstream one is not known before it answers; the bridge carries no answers but ours
        # (rayos_net.dhcp.upstream).
        return IPv4Address(ANY_SERVER) if port.is_upstream else self._server

    def _port(self, vm: str) -> _Port:
        try:
            return self._ports[vm]
        except KeyError:
            raise NotFound(f"there is no machine {vm!r} with a network card") from None

    def _running(self, vm: str) -> Channel:
        channel = self._port(vm).channel
        if channel is None:
            raise Conflict(f"{vm} does not run with a firewall", hint="start it first")
        return channel

    def _defaults(self) -> list[OwnedRule]:
        """From the host everything; to it DHCP, names and ping; to other guests nothing; to the rest all it begins."""
        host, subnet = f"{self._server}/32", str(self._network.subnet)
        here: dict[str, Any] = {
            "direction": "out",
            "to": sorted({host, *(f"{one}/32" for one in self._host())}),
        }
        return [
            OwnedRule(DEFAULT, FirewallRule(name=name, action=action, priority=_LAST, **sides))  # type: ignore[arg-type]
            for name, action, sides in (
                ("host-in", "allow", {"direction": "in", "from_": host}),
                ("host-dhcp", "allow", {**here, "protocol": "udp", "ports": 67}),
                ("host-dns", "allow", {**here, "protocol": "udp", "ports": 53}),
                ("host-dns-tcp", "allow", {**here, "protocol": "tcp", "ports": 53}),
                ("host-ping", "allow", {**here, "protocol": "icmp"}),
                ("host", "reject", here),
                ("isolation", "deny", {"direction": "out", "to": subnet}),
            )
        ]

    def _resolve(self, rules: Sequence[OwnedRule]) -> list[dict[str, Any]]:
        found = [self._resolved(one) for one in (*rules, *self._defaults())]
        return [table for table in found if table is not None]

    def _resolved(self, one: OwnedRule) -> dict[str, Any] | None:
        table = resolve(one.rule, self._lookup)
        return None if table is None else {"name": one.rule.name, "origin": one.origin, **table}

    def _lookup(self, word: str) -> list[str]:
        found: list[str] = []
        vms: Iterable[str] = [word.removeprefix(VM)]
        if word.startswith(ZONE):
            vms = ()
            with suppress(Invalid):  # it was there when the rule was made
                vms = self._inherited.members(word)
        for vm in vms:
            port = self._ports.get(vm)
            if port is not None:
                found += [*port.config.addresses, *(str(IPv4Address(one)) for one in sorted(port.leased))]
        return found


def _owned(vm: str, config: FirewallConfig) -> list[OwnedRule]:
    return [OwnedRule(f"{VM}{vm}", rule) for rule in config.rules]
