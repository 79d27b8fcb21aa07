"""The addresses of one subnet and who has them (RFC 2131, 4.3.1).

Invariant: an address has at most one binding, a client at most one active one; an address reserved for a MAC
is never free for another client. Memory is bounded by the number of addresses. Every step costs O(log n) at
most.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from rayos_net.dhcp.binding import ACTIVE, FOREVER, FREE, Binding, BindingState
from rayos_net.dhcp.config import SubnetConfig


class Pool:
    """Bindings of one subnet, by address, by client and by port."""

    def __init__(self, config: SubnetConfig) -> None:
        self.config = config
        self.by_ip: dict[int, Binding] = {}
        self.by_client: dict[bytes, Binding] = {}
        self.reservations: dict[bytes, int] = {}
        self.reserved: dict[int, bytes] = {}
        self._ranges = () if config.reserved_only else config.ranges()
        self._first = int(config.network.network_address)
        self._last = int(config.network.broadcast_address)
        self._own = {self._first, self._last, int(config.server)}
        if config.router is not None:
            self._own.add(int(config.router))
        self._fresh = self._walk()
        self._idle: OrderedDict[int, None] = OrderedDict()  # free again, the longest free first
        self._expiry: list[tuple[float, int]] = []  # heap; an entry is stale unless its binding says the same
        self._ports: dict[str, set[int]] = {}
        self._quarantine: dict[str, set[int]] = {}
        for mac, address in config.reservations.items():
            self.reserve(bytes.fromhex(mac.replace(":", "")), int(address))

    def restore(self, bindings: Iterable[Binding]) -> int:
        """Take over stored bindings; return how many did not fit the subnet and were left out."""
        skipped = 0
        for binding in bindings:
            if self._first < binding.ip < self._last and binding.ip not in self._own:
                self.put(binding)
            else:
                skipped += 1
        return skipped

    def contains(self, ip: int) -> bool:
        """Whether the address lies in the subnet."""
        return self._first <= ip <= self._last

    def reserve(self, hardware: bytes, ip: int) -> None:
        """Keep the address for one MAC from now on."""
        self.unreserve(hardware)
        self.reserved.pop(ip, None)
        self.reservations[hardware] = ip
        self.reserved[ip] = hardware

    def unreserve(self, hardware: bytes) -> bool:
        """Give a reserved address back to the pool; return whether there was one."""
        ip = self.reservations.pop(hardware, None)
        if ip is None:
            return False
        self.reserved.pop(ip, None)
        binding = self.by_ip.get(ip)
        if self._in_ranges(ip) and (binding is None or binding.state in FREE):
            self._idle[ip] = None
        return True

    def is_allowed(self, ip: int, hardware: bytes, now: float) -> bool:
        """Whether the MAC may have this address at all, whoever has it now."""
        reserved = self.reservations.get(hardware)
        if reserved is not None and (ip == reserved or self._is_obtainable(reserved, hardware, now)):
            return ip == reserved
        return ip not in self.reserved and ip not in self._own and self._in_ranges(ip)

    def is_free(self, ip: int, client: bytes, now: float) -> bool:
        """Whether nobody but `client` has the address."""
        binding = self.by_ip.get(ip)
        if binding is None or binding.expires <= now or binding.state in FREE:
            return True
        return binding.state is not BindingState.DECLINED and binding.client == client

    def choose(self, client: bytes, hardware: bytes, requested: int | None, now: float) -> int | None:
        """The address for a client: reserved, its present or former one, the requested one, a new one; None:
        full.
        """
        reserved = self.reservations.get(hardware)
        if reserved is not None and self._is_obtainable(reserved, hardware, now):
            return reserved
        own = self.by_client.get(client)
        if own is not None and self.is_allowed(own.ip, hardware, now) and self.is_free(own.ip, client, now):
            return own.ip
        if (
            requested is not None
            and self.is_allowed(requested, hardware, now)
            and self.is_free(requested, client, now)
        ):
            return requested
        return self._allocate(now)

    def put(self, binding: Binding) -> None:
        """Make this the binding of its address and, unless it is quarantined, of its client."""
        ip = binding.ip
        before = self.by_ip.get(ip)
        if before is not None:
            if _is_kept(before, binding) and self.by_client.get(binding.client) is before:
                self.by_ip[ip] = self.by_client[binding.client] = binding
                self._expect(binding)
                return
            self._forget(before)
        other = self.by_client.get(binding.client)
        if other is not None and other.ip != ip and other.state in ACTIVE and binding.state in ACTIVE:
            self.put(other.changed(BindingState.EXPIRED, binding.since))
        self.by_ip[ip] = binding
        if binding.state is BindingState.DECLINED:
            self._quarantine.setdefault(binding.port, set()).add(ip)
        elif other is None or other.ip == ip or other.state not in ACTIVE or binding.state in ACTIVE:
            self.by_client[binding.client] = binding  # an old address never hides the present one
        if binding.state in FREE:
            self._idle[ip] = None
            return
        if binding.state in ACTIVE:
            self._ports.setdefault(binding.port, set()).add(ip)
        self._expect(binding)

    def held_by(self, port: str) -> set[int]:
        """The addresses offered or leased on a port."""
        return self._ports.get(port, set())

    def quarantined_by(self, port: str) -> int:
        """How many addresses the DECLINEs from a port block now."""
        return len(self._quarantine.get(port, ()))

    def deadline(self) -> float | None:
        """When the next binding runs out, in seconds since the epoch; None when none does."""
        while self._expiry:
            expires, ip = self._expiry[0]
            binding = self.by_ip.get(ip)
            if binding is not None and binding.expires == expires and binding.state not in FREE:
                return expires
            heapq.heappop(self._expiry)
        return None

    def expire(self, now: float) -> list[Binding]:
        """Free what has run out by `now`; return the bindings as they were."""
        gone: list[Binding] = []
        while True:
            deadline = self.deadline()
            if deadline is None or deadline > now:
                return gone
            _, ip = heapq.heappop(self._expiry)
            binding = self.by_ip[ip]
            gone.append(binding)
            self.put(binding.changed(BindingState.EXPIRED, binding.expires))

    def _expect(self, binding: Binding) -> None:
        if binding.expires != FOREVER:
            heapq.heappush(self._expiry, (binding.expires, binding.ip))
            if len(self._expiry) > 64 + 4 * len(self.by_ip):
                self._tidy()

    def _is_obtainable(self, ip: int, hardware: bytes, now: float) -> bool:
        # A reserved address: not while its former user's lease runs, nor in quarantine.
        holder = self.by_ip.get(ip)
        if holder is None or holder.expires <= now or holder.state in FREE:
            return True
        return holder.state is not BindingState.DECLINED and holder.hardware == hardware

    def _forget(self, binding: Binding) -> None:
        ip = binding.ip
        if self.by_client.get(binding.client) is binding:
            del self.by_client[binding.client]
        for table in (self._ports, self._quarantine):
            held = table.get(binding.port)
            if held is not None:
                held.discard(ip)
                if not held:
                    del table[binding.port]
        self._idle.pop(ip, None)

    def _allocate(self, now: float) -> int | None:
        for ip in self._fresh:
            if ip not in self.by_ip and ip not in self.reserved:
                return ip
        for _ in range(len(self._idle)):
            ip, _nothing = self._idle.popitem(last=False)
            if ip not in self.reserved and self._in_ranges(ip) and ip not in self._own:
                self._idle[ip] = None  # stays in the list until it is put
                return ip
        return None

    def _walk(self) -> Iterator[int]:
        for first, last in self._ranges:
            for ip in range(first, last + 1):
                if ip not in self._own:
                    yield ip

    def _in_ranges(self, ip: int) -> bool:
        for first, last in self._ranges:  # noqa: SIM110 - a generator costs more than the few ranges
            if first <= ip <= last:
                return True
        return False

    def _tidy(self) -> None:
        self._expiry = [
            (one.expires, ip)
            for ip, one in self.by_ip.items()
            if one.state not in FREE and one.expires != FOREVER
        ]
        heapq.heapify(self._expiry)


def _is_kept(before: Binding, after: Binding) -> bool:
    # The usual case, an offer taken or a lease renewed: the address stays in the tables where it is.
    return (
        after.state in ACTIVE
        and before.state in ACTIVE
        and before.client == after.client
        and before.port == after.port
    )
