"""The DHCP server as a state machine without I/O (RFC 2131, 4.3).

Theory of operation. `receive` takes a datagram, who sent it, and the time; it changes the bindings and
returns actions:

* Send: put this reply on the wire now (OFFER, NAK, the ACK to an INFORM).
* Commit: bring this binding to stable storage, *then* send the reply (ACK) and tell the event. Several may
share a sync. * Probe: ask by ARP whether somebody has the address already. The OFFER follows from
`handle_timer` when nobody answered
  within `probe_seconds`; `conflict` reports an answer, the address is quarantined and another one tried.
  Nobody else waits.
* Tell: a lease changed without the disk (it ran out).

Invariant: an address is in at most one client's ACK at a time; an ACK goes out only behind a Commit; what
one port can hold (leases, offers, quarantined addresses, requests per second) is bounded whatever it sends;
nothing that it sends raises an exception. `now` is in seconds since the epoch and never goes back.
"""

from dataclasses import dataclass

from rayos_net.dhcp import message as wire
from rayos_net.dhcp import option
from rayos_net.dhcp.answer import Answers, relay_value, subnet_values
from rayos_net.dhcp.binding import ACTIVE, FOREVER, Binding, BindingState, EventKind, LeaseEvent, client_key
from rayos_net.dhcp.bucket import Buckets
from rayos_net.dhcp.config import SubnetConfig
from rayos_net.dhcp.exchange import Exchanges
from rayos_net.dhcp.message import BadMessage, Message, MessageType
from rayos_net.dhcp.option import RelayCode
from rayos_net.dhcp.pool import Pool
from rayos_net.dhcp.server_action import Action, Commit, Probe, Send, Source, Tell

_PROBE_MEMORY_SECONDS = 60.0  # an address that did not answer is not asked again before


@dataclass(slots=True)
class _Probing:
    deadline: float
    request: Message
    source: Source
    pool: Pool


class Server:
    """The server of a link: its own subnet and those behind relay agents."""

    def __init__(self, subnet: SubnetConfig, *, remote: tuple[SubnetConfig, ...] = ()) -> None:
        self.config = subnet
        self.pools = [Pool(one) for one in (subnet, *remote)]
        self.counters: dict[str, int] = {}
        self.exchanges = Exchanges()
        self._why = ""  # nothing was answered to the last request
        self._host_names = dict(subnet.host_names)
        self._answers = {
            id(pool): Answers(
                int(pool.config.server),
                subnet_values(pool.config),
                boot=pool.config.boot,
                host_names=self._host_names,
            )
            for pool in self.pools
        }
        self._relays = [(int(one.network_address), int(one.broadcast_address)) for one in subnet.relays]
        self._probing: dict[int, _Probing] = {}
        self._probed: dict[int, float] = {}
        self._buckets = Buckets(subnet.limits.requests_per_second, subnet.limits.burst)

    def restore(self, bindings: list[Binding]) -> int:
        """Take over stored bindings; return how many belong to none of the subnets."""
        for pool in self.pools:
            mine = [one for one in bindings if pool.contains(one.ip)]
            bindings = [one for one in bindings if not pool.contains(one.ip)]
            self.count("restore_skipped", pool.restore(mine))
        return len(bindings)

    def leases(self) -> list[Binding]:
        """All bindings, also those offered, released, expired and quarantined, by address."""
        return sorted((one for pool in self.pools for one in pool.by_ip.values()), key=lambda one: one.ip)

    def admit(self, port: str, now: float) -> float:
        """Ask before each datagram, also one that can't be read: 0 when the port may send it, else the seconds
        until it may send again.
        """
        wait = self._buckets.take(port, now)
        if wait:
            self.count("drop_rate_limited")
        return wait

    def receive(self, data: bytes, source: Source, now: float) -> list[Action]:
        """Handles an admitted datagram to port 67. Never raises on account of its content."""
        self._why = ""
        try:
            request = wire.decode(data)
        except BadMessage:
            self.exchanges.note(now, source.port, None, None, "malformed")
            return self._drop("malformed")
        actions = self._dispatch(request, source, now)
        self._note(request, source, actions, now)
        return actions

    def _dispatch(self, request: Message, source: Source, now: float) -> list[Action]:
        if request.op != wire.BOOT_REQUEST:
            return self._drop("not_a_request")
        kind = request.type
        if kind is None:
            return self._drop("bootp")
        if source.hardware is not None and not request.giaddr and request.chaddr != source.hardware:
            return self._drop("foreign_hardware")  # in another's name
        pool = self._pool_for(request, source)
        if pool is None:
            return self._drop("no_subnet")
        match kind:
            case MessageType.DISCOVER:
                self.count("discover")
                return self._discover(pool, request, source, now)
            case MessageType.REQUEST:
                return self._request(pool, request, source, now)
            case MessageType.DECLINE:
                return self._decline(pool, request, source, now)
            case MessageType.RELEASE:
                return self._release(pool, request, source, now)
            case MessageType.INFORM:
                return self._inform(pool, request)
        return self._drop("ignored_type")

    def _note(self, request: Message, source: Source, actions: list[Action], now: float) -> None:
        reply = None
        for action in actions:
            if isinstance(action, Probe):
                self._why = "probing"
            elif not isinstance(action, Tell) and action.reply is not None:
                reply = action.reply
        self.exchanges.note(now, source.port, request, reply, self._why)

    def conflict(self, ip: int, hardware: bytes, now: float) -> list[Action]:
        """Somebody answered the probe for `ip`: quarantine it and offer another address."""
        probing = self._probing.get(ip)
        if probing is None or hardware == probing.request.chaddr:
            return []
        del self._probing[ip]
        self.count("probe_conflicts")
        binding = probing.pool.by_ip[ip].changed(
            BindingState.DECLINED, now + probing.pool.config.quarantine_seconds
        )
        probing.pool.put(binding)
        actions: list[Action] = [Commit(binding, None, LeaseEvent(EventKind.DECLINED, binding))]
        return actions + self._discover(probing.pool, probing.request, probing.source, now)

    def deadline(self) -> float | None:
        """When `handle_timer` has something to do next, in seconds since the epoch."""
        times = [one.deadline for one in self._probing.values()]
        for pool in self.pools:
            deadline = pool.deadline()
            if deadline is not None:
                times.append(deadline)
        return min(times, default=None)

    def handle_timer(self, now: float) -> list[Action]:
        """Send the offers whose probe found nobody; free what has run out."""
        actions: list[Action] = []
        for ip in [ip for ip, one in self._probing.items() if one.deadline <= now]:
            probing = self._probing.pop(ip)
            self._remember_probe(ip, now)
            self._why = ""
            offered = self._discover(probing.pool, probing.request, probing.source, now)
            self._note(probing.request, probing.source, offered, now)
            actions += offered
        for pool in self.pools:
            for binding in pool.expire(now):
                if binding.state is BindingState.BOUND:
                    self.count("expired")
                    gone = binding.changed(BindingState.EXPIRED, binding.expires)
                    actions.append(Tell(LeaseEvent(EventKind.EXPIRED, gone)))
        return actions

    def release(self, ip: int, now: float) -> list[Action]:
        """Take a lease back by order of the administrator; its client notices when it renews."""
        for pool in self.pools:
            binding = pool.by_ip.get(ip)
            if binding is not None and binding.state not in (BindingState.RELEASED, BindingState.EXPIRED):
                return self._freed(pool, binding, now)
        return []

    def set_host_name(self, mac: str, name: str) -> None:
        """The name that the client with this MAC is given from now on; "" for none."""
        if name:
            self._host_names[mac] = name
        else:
            self._host_names.pop(mac, None)

    def count(self, what: str, by: int = 1) -> None:
        """Something happened `by` times more."""
        self.counters[what] = self.counters.get(what, 0) + by

    def _pool_for(self, request: Message, source: Source) -> Pool | None:
        # RFC 3527 and RFC 3011 before giaddr; a relay is believed only from the configured networks.
        own = self.pools[0]
        if not request.giaddr:
            if source.unicast and request.ciaddr and not own.contains(request.ciaddr):
                return next((one for one in self.pools if one.contains(request.ciaddr)), own)
            return own
        at = request.giaddr
        for first, last in self._relays:
            if first <= at <= last:
                break
        else:
            return None
        options = request.options
        if 82 in options or 118 in options:
            selected = option.u32(relay_value(request, RelayCode.LINK_SELECTION))
            at = selected or option.u32(options.get(118)) or at
        for pool in self.pools:
            if pool.contains(at):
                return pool
        return None

    def _discover(self, pool: Pool, request: Message, source: Source, now: float) -> list[Action]:
        config = pool.config
        client = client_key(request.options.get(61), request.chaddr)
        if not self._make_room(pool, client, source, now):
            return self._drop("port_full")
        # RFC 2131, table 5, has ciaddr 0 in a DISCOVER; a client that fills it in asks for that address.
        wanted = option.u32(request.options.get(50)) or request.ciaddr or None
        ip = pool.choose(client, request.chaddr, wanted, now)
        if ip is None:
            return self._drop("pool_exhausted")
        held = pool.by_ip.get(ip)
        if held is None or held.client != client or held.state not in ACTIVE or held.expires <= now:
            known = held is not None and held.client == client
            held = self._binding(
                request, client, ip, BindingState.OFFERED, now + config.offer_seconds, now, source
            )
            pool.put(held)
            if not known and self._start_probe(pool, request, source, ip, now):
                return [Probe(ip)]
        elif ip in self._probing:
            self._probing[ip].request = request
            return []
        elif held.state is BindingState.OFFERED:
            pool.put(held.changed(BindingState.OFFERED, now + config.offer_seconds))
        if config.rapid_commit and 80 in request.options:
            return self._bind(pool, request, source, client, ip, now, rapid=True)
        answers = self._answers[id(pool)]
        reply = answers.lease(request, MessageType.OFFER, ip, self._seconds(pool, request))
        self.count("offer")
        return [Send(reply)]

    def _request(self, pool: Pool, request: Message, source: Source, now: float) -> list[Action]:
        # RFC 2131, 4.3.2 and table 4: the kind of request follows from options 54 and 50 and from ciaddr.
        self.count("request")
        client = client_key(request.options.get(61), request.chaddr)
        # Some clients fill option 54 with zeros where they know no server.
        server_id = option.u32(request.options.get(54)) or None
        requested = option.u32(request.options.get(50))
        answers = self._answers[id(pool)]
        if server_id is not None and server_id not in (answers.server, answers.server_id(request)):
            return self._not_chosen(pool, client)
        ip = request.ciaddr or requested
        if ip is None or ip == 0:
            return self._drop("request_without_address")
        known = pool.by_client.get(client)
        if not pool.contains(ip):
            return self._nak(pool, request, "address is not on this network")
        if known is None or known.ip != ip:
            if server_id is None and not pool.config.authoritative:
                if known is None or request.ciaddr:
                    return self._drop("unknown_client")
                return self._nak(pool, request, "another address was leased to this client")
            if known is not None and known.state in ACTIVE and known.expires > now:
                return self._nak(pool, request, "another address was leased to this client")
        if not pool.is_allowed(ip, request.chaddr, now):
            return self._nak(pool, request, "address is reserved or outside the pool")
        if not pool.is_free(ip, client, now):
            holder = pool.by_ip[ip]
            if holder.state is BindingState.DECLINED or pool.reserved.get(ip) != request.chaddr:
                return self._nak(pool, request, "address is in use")
            if holder.hardware != request.chaddr:
                return self._nak(pool, request, "address is still leased to another client")
        if not self._make_room(pool, client, source, now):
            return self._drop("port_full")
        return self._bind(pool, request, source, client, ip, now)

    def _bind(
        self,
        pool: Pool,
        request: Message,
        source: Source,
        client: bytes,
        ip: int,
        now: float,
        *,
        rapid: bool = False,
    ) -> list[Action]:
        self._probing.pop(ip, None)
        seconds = self._seconds(pool, request)
        expires = FOREVER if seconds == option.INFINITE else now + seconds
        before = pool.by_ip.get(ip)
        renewed = before is not None and before.client == client and before.state is BindingState.BOUND
        since = before.since if renewed and before is not None else now
        binding = self._binding(request, client, ip, BindingState.BOUND, expires, since, source)
        pool.put(binding)
        reply = self._answers[id(pool)].lease(request, MessageType.ACK, ip, seconds, rapid=rapid)
        self.count("ack")
        kind = EventKind.RENEWED if renewed else EventKind.BOUND
        return [Commit(binding, reply, LeaseEvent(kind, binding))]

    def _not_chosen(self, pool: Pool, client: bytes) -> list[Action]:
        # The client took another server's offer: ours lapses, silently (RFC 2131, 4.3.2).
        held = pool.by_client.get(client)
        if held is not None and held.state is BindingState.OFFERED:
            self._probing.pop(held.ip, None)
            pool.put(held.changed(BindingState.EXPIRED, held.since))
        return self._drop("chose_another_server")

    def _decline(self, pool: Pool, request: Message, source: Source, now: float) -> list[Action]:
        self.count("decline")
        client = client_key(request.options.get(61), request.chaddr)
        held = pool.by_client.get(client)
        ip = option.u32(request.options.get(50)) or request.ciaddr
        if held is None or held.ip != ip or held.state not in ACTIVE or held.port != source.port:
            return self._drop("decline_of_foreign_address")
        if pool.quarantined_by(source.port) >= pool.config.limits.quarantined_per_port:
            return self._drop("decline_over_limit")
        binding = held.changed(BindingState.DECLINED, now + pool.config.quarantine_seconds)
        pool.put(binding)
        return [Commit(binding, None, LeaseEvent(EventKind.DECLINED, binding))]

    def _release(self, pool: Pool, request: Message, source: Source, now: float) -> list[Action]:
        self.count("release")
        held = pool.by_client.get(client_key(request.options.get(61), request.chaddr))
        if held is None or held.ip != request.ciaddr or held.state not in ACTIVE or held.port != source.port:
            return self._drop("release_of_foreign_address")
        return self._freed(pool, held, now)

    def _freed(self, pool: Pool, held: Binding, now: float) -> list[Action]:
        binding = held.changed(BindingState.RELEASED, now)
        pool.put(binding)
        return [Commit(binding, None, LeaseEvent(EventKind.RELEASED, binding))]

    def _inform(self, pool: Pool, request: Message) -> list[Action]:
        self.count("inform")
        if not request.ciaddr or not pool.contains(request.ciaddr):
            return self._drop("inform_without_address")
        return [Send(self._answers[id(pool)].lease(request, MessageType.ACK, request.ciaddr, None))]

    def _nak(self, pool: Pool, request: Message, reason: str) -> list[Action]:
        self.count("nak")
        return [Send(self._answers[id(pool)].nak(request, reason))]

    def _make_room(self, pool: Pool, client: bytes, source: Source, now: float) -> bool:
        # A port at its cap loses its oldest offer, never a lease; a client that has its place needs no room.
        cap = pool.config.limits.leases_per_port
        held = pool.held_by(source.port)
        if cap is None or len(held) < cap:
            return True
        own = pool.by_client.get(client)
        if own is not None and own.ip in held:
            return True
        offers = [pool.by_ip[ip] for ip in held if pool.by_ip[ip].state is BindingState.OFFERED]
        if not offers:
            return False
        oldest = min(offers, key=lambda one: one.since)
        self._probing.pop(oldest.ip, None)
        pool.put(oldest.changed(BindingState.EXPIRED, now))
        return True

    def _start_probe(self, pool: Pool, request: Message, source: Source, ip: int, now: float) -> bool:
        # Only on our own link: behind a relay nobody would answer our ARP.
        wait = pool.config.probe_seconds
        if wait <= 0 or request.giaddr or pool is not self.pools[0]:
            return False
        if now - self._probed.get(ip, 0.0) < _PROBE_MEMORY_SECONDS:
            return False
        self._probing[ip] = _Probing(now + wait, request, source, pool)
        self.count("probe")
        return True

    def _remember_probe(self, ip: int, now: float) -> None:
        self._probed[ip] = now
        if len(self._probed) > 4096:
            self._probed = {one: at for one, at in self._probed.items() if now - at < _PROBE_MEMORY_SECONDS}

    def _seconds(self, pool: Pool, request: Message) -> int:
        config = pool.config
        asked = option.u32(request.options.get(51))
        if asked is None:
            return config.lease_seconds
        return min(max(asked, config.lease_seconds_min), config.lease_seconds_max)

    def _binding(
        self,
        request: Message,
        client: bytes,
        ip: int,
        state: BindingState,
        expires: float,
        since: float,
        source: Source,
    ) -> Binding:
        options = request.options
        name = option.host_name(options.get(12)) or option.fqdn_name(options.get(81))
        return Binding(ip, client, request.chaddr, options.get(61), name, state, expires, since, source.port)

    def _drop(self, why: str) -> list[Action]:
        self.count("drop_" + why)
        self._why = why
        return []
