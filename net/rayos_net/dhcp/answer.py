"""Contents and destination of a reply (RFC 2131, 4.1 and table 3; RFC 2132; RFC 3046, 2.2; RFC 6842, 3).

Invariant: the options that a client can't do without come first, so a small maximum size costs the optional
ones; the relay agent information is last and as it came.
"""

import struct
from collections.abc import Mapping
from enum import Enum
from ipaddress import IPv4Address, IPv4Network
from typing import Final, NamedTuple

from rayos_net.dhcp import message as wire
from rayos_net.dhcp import option
from rayos_net.dhcp.config import BootFile, SubnetConfig
from rayos_net.dhcp.message import BROADCAST_FLAG, Message, MessageType
from rayos_net.dhcp.option import Code, RelayCode

BROADCAST: Final = 0xFFFFFFFF
SIZE_MAX: Final = 1472  # an Ethernet frame's worth of UDP payload: replies are never fragmented
_CACHE_MAX: Final = 256  # parameter lists are chosen by clients

_U32: Final = struct.Struct("!I")


class Route(Enum):
    """How a reply reaches its client (RFC 2131, 4.1)."""

    RELAY = "relay"  # UDP to the relay agent's port 67
    UNICAST = "unicast"  # UDP to the client's port 68: it has the address and answers ARP
    HARDWARE = "hardware"  # a frame to the client's hardware address: it can't answer ARP yet
    BROADCAST = "broadcast"  # a frame to everybody


class Reply(NamedTuple):
    """A datagram for a client: `ip` is the destination (for HARDWARE the client's future address)."""

    data: bytes
    route: Route
    ip: int
    hardware: bytes


class Answers:
    """Builds the replies of one server; the constant part of the options is encoded once.

    `values` are the options that it gives out, without those of the lease itself, the subnet mask among them.
    """

    def __init__(
        self,
        server: int,
        values: Mapping[int, bytes],
        *,
        boot: Mapping[int | str, BootFile] | None = None,
        host_names: Mapping[str, str] | None = None,
    ) -> None:
        self._host_names = {} if host_names is None else host_names
        self._files = boot or {}
        self.server = server
        self._values = values
        self._default_list = bytes(
            code
            for code in (Code.ROUTER, Code.DNS, Code.DOMAIN_NAME, Code.NTP, Code.MTU)
            if code in self._values
        )
        self._cache: dict[bytes, tuple[bytes, ...]] = {}
        self._starts: dict[tuple[MessageType, int, int | None], bytes] = {}

    def lease(
        self, request: Message, kind: MessageType, ip: int, seconds: int | None, *, rapid: bool = False
    ) -> Reply:
        """An OFFER or ACK of `ip` for `seconds`; with `seconds` None the ACK to an INFORM (RFC 2131, 4.3.5)."""
        boot = self._boot(request) if self._files else None
        asked = request.options.get(55, self._default_list)
        options = [self._start(kind, self.server_id(request), seconds)]
        if rapid:
            options.append(option.encode(Code.RAPID_COMMIT, b""))
        client_id = request.options.get(61)
        if client_id is not None:
            options.append(option.encode(Code.CLIENT_ID, client_id))
        options += self._asked(asked)
        name = self._host_names.get(request.chaddr.hex(":")) if self._host_names else None
        if name is not None and Code.HOST_NAME in asked:
            options.append(option.encode(Code.HOST_NAME, name.encode()))
        if boot is not None:
            options += _boot_options(request, boot, asked)
        relay = request.options.get(82) if request.giaddr else None
        limit = self._limit(request)
        if relay is not None:
            limit = max(limit - len(relay) - 2, wire.MINIMUM_SIZE)
        header = Message(
            wire.BOOT_REPLY,
            0,
            request.xid,
            0,
            request.flags,
            request.ciaddr if kind is MessageType.ACK else 0,
            0 if seconds is None else ip,
            # RFC 2131, 2: the server of the next step of a boot; loaders take it for their TFTP server.
            int(boot.next_server) if boot is not None and boot.next_server is not None else self.server,
            request.giaddr,
            request.chaddr,
            boot.server_name.encode()[: wire.SNAME_SIZE - 1] if boot is not None else b"",
            boot.file.encode() if boot is not None and len(boot.file) < wire.FILE_SIZE else b"",
            {},
        )
        data = _with_relay(header, options, relay, limit)
        # Whoever asks for an offer has no address yet, whatever ciaddr says.
        has_address = request.ciaddr if kind is MessageType.ACK else 0
        return self._routed(request, data, ip if seconds is not None else 0, has_address)

    def nak(self, request: Message, reason: str) -> Reply:
        """A NAK: only the options of RFC 2131, table 3, addresses zero, broadcast, also behind a relay."""
        options = [
            option.encode(Code.MESSAGE_TYPE, bytes((MessageType.NAK,))),
            option.encode(Code.SERVER_ID, _U32.pack(self.server_id(request))),
            option.encode(Code.MESSAGE, reason.encode()[: option.LENGTH_MAX]),
        ]
        client_id = request.options.get(61)
        if client_id is not None:
            options.append(option.encode(Code.CLIENT_ID, client_id))
        relayed = request.giaddr != 0
        header = Message(
            wire.BOOT_REPLY,
            0,
            request.xid,
            0,
            request.flags | BROADCAST_FLAG if relayed else request.flags,
            0,
            0,
            0,
            request.giaddr,
            request.chaddr,
            b"",
            b"",
            {},
        )
        relay = request.options.get(82) if relayed else None
        data = _with_relay(header, options, relay, self._limit(request))
        if relayed:
            return Reply(data, Route.RELAY, request.giaddr, request.chaddr)
        return Reply(data, Route.BROADCAST, BROADCAST, b"\xff" * 6)

    def server_id(self, request: Message) -> int:
        """Our server identifier towards this client: the relay's override if it sends one (RFC 5107)."""
        if request.giaddr:
            override = option.u32(relay_value(request, RelayCode.SERVER_ID_OVERRIDE))
            if override:
                return override
        return self.server

    def _start(self, kind: MessageType, server: int, seconds: int | None) -> bytes:
        # What every reply begins with; the lease time, the server and the kind make few combinations.
        key = (kind, server, seconds)
        found = self._starts.get(key)
        if found is None:
            found = option.encode(Code.MESSAGE_TYPE, bytes((kind,)))
            found += option.encode(Code.SERVER_ID, _U32.pack(server))
            if seconds is not None:
                found += option.encode(Code.LEASE_TIME, _U32.pack(seconds))
                if seconds != option.INFINITE:
                    found += option.encode(Code.RENEWAL_TIME, _U32.pack(seconds // 2))
                    found += option.encode(Code.REBINDING_TIME, _U32.pack(seconds * 7 // 8))
            found += option.encode(Code.SUBNET_MASK, self._values[Code.SUBNET_MASK])
            if len(self._starts) >= _CACHE_MAX:
                self._starts.clear()
            self._starts[key] = found
        return found

    def _asked(self, asked: bytes) -> tuple[bytes, ...]:
        found = self._cache.get(asked)
        if found is None:
            values = self._values
            found = tuple(
                option.encode(code, values[code])
                for code in dict.fromkeys(asked)
                if code in values and code != Code.SUBNET_MASK
            )
            if len(self._cache) >= _CACHE_MAX:
                self._cache.clear()
            self._cache[asked] = found
        return found

    def _boot(self, request: Message) -> BootFile | None:
        files = self._files
        if not files:
            return None
        if request.options.get(77, b"").endswith(b"iPXE") and "ipxe" in files:
            return files["ipxe"]
        architecture = request.options.get(93)
        vendor = request.options.get(60, b"")
        if architecture is None and not vendor.startswith((b"PXEClient", b"HTTPClient")):
            asked = request.options.get(55, b"")
            return files.get("default") if 67 in asked or 66 in asked else None
        kinds = architecture or b""
        for at in range(0, len(kinds) - 1, 2):
            boot = files.get(int.from_bytes(kinds[at : at + 2], "big"))
            if boot is not None:
                return boot
        return files.get("default")

    def _limit(self, request: Message) -> int:
        size = option.u16(request.options.get(57))
        if size is None:
            return wire.DEFAULT_MAX_SIZE
        return min(max(size - wire.IP_UDP_SIZE, wire.DEFAULT_MAX_SIZE), SIZE_MAX)

    def _routed(self, request: Message, data: bytes, ip: int, has_address: int) -> Reply:
        if request.giaddr:
            return Reply(data, Route.RELAY, request.giaddr, request.chaddr)
        if has_address:
            return Reply(data, Route.UNICAST, has_address, request.chaddr)
        if request.flags & BROADCAST_FLAG or not ip:
            return Reply(data, Route.BROADCAST, BROADCAST, b"\xff" * 6)
        return Reply(data, Route.HARDWARE, ip, request.chaddr)


def relay_value(request: Message, code: RelayCode) -> bytes | None:
    """A sub-option of the relay agent information, None when absent or cut short."""
    value = request.options.get(82)
    at = 0
    while value is not None and at + 2 <= len(value):
        stop = at + 2 + value[at + 1]
        if stop > len(value):
            return None
        if value[at] == code:
            return value[at + 2 : stop]
        at = stop
    return None


def _with_relay(header: Message, options: list[bytes], relay: bytes | None, limit: int) -> bytes:
    if relay is None:
        return wire.encode(header, options, limit)
    data = wire.encode(header, options, limit).rstrip(b"\0")  # ends with the end option, 255
    tail = option.encode(Code.RELAY_AGENT, relay) + b"\xff"
    return (data[:-1] + tail).ljust(wire.MINIMUM_SIZE, b"\0")


def _boot_options(request: Message, boot: BootFile, asked: bytes) -> list[bytes]:
    options = []
    vendor = request.options.get(60, b"")
    if vendor.startswith(b"HTTPClient"):
        # UEFI 2.10, 24.7.3: else the offer is not for it
        options.append(option.encode(Code.VENDOR_CLASS, b"HTTPClient"))
    if Code.TFTP_SERVER in asked and boot.next_server is not None:
        options.append(option.encode(Code.TFTP_SERVER, (boot.server_name or str(boot.next_server)).encode()))
    if Code.BOOT_FILE in asked or len(boot.file) >= wire.FILE_SIZE:
        options.append(option.encode(Code.BOOT_FILE, boot.file.encode()))
    return options


def subnet_values(config: SubnetConfig) -> dict[int, bytes]:
    """The options that a subnet's clients are given."""
    values: dict[int, bytes] = {
        Code.SUBNET_MASK: config.network.netmask.packed,
        Code.BROADCAST: config.network.broadcast_address.packed,
    }
    if config.router is not None:
        values[Code.ROUTER] = config.router.packed
    if config.dns:
        values[Code.DNS] = option.addresses(config.dns)
    if config.domain:
        values[Code.DOMAIN_NAME] = config.domain.encode()
    if config.search:
        values[Code.DOMAIN_SEARCH] = option.search_list(config.search)
    if config.ntp:
        values[Code.NTP] = option.addresses(config.ntp)
    if config.mtu is not None:
        values[Code.MTU] = config.mtu.to_bytes(2, "big")
    if config.routes:
        routes = list(config.routes)
        if config.router is not None:  # RFC 3442: a client that takes option 121 must ignore option 3
            routes.append((IPv4Network((IPv4Address(0), 0)), config.router))
        values[Code.CLASSLESS_ROUTES] = option.routes(routes)
    if config.ipv6_only_wait_seconds is not None:
        values[Code.IPV6_ONLY] = _U32.pack(config.ipv6_only_wait_seconds)
    return values
