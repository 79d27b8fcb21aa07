"""A lease as a client has it, read from an ACK (RFC 2131, 4.4.1 and 4.4.5; RFC 2132; RFC 3442), and its
stored form.

Invariant: T1 < T2 < expiry, all counted from the time when the REQUEST was *sent*, whatever the server said
about them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from typing import Any, Final

from rayos_net.dhcp import option
from rayos_net.dhcp.message import Message
from rayos_net.dhcp.option import Code

FOREVER: Final = float("inf")
LEASE_MIN: Final = 2  # seconds; a server that says less is not followed


@dataclass(frozen=True, slots=True)
class Lease:
    """An address with everything that came with it. Times are in seconds on the clock of the client's `now`."""

    address: IPv4Interface
    server: IPv4Address
    renew_at: float
    rebind_at: float
    expires: float
    routers: tuple[IPv4Address, ...] = ()
    routes: tuple[tuple[IPv4Network, IPv4Address], ...] = ()
    dns: tuple[IPv4Address, ...] = ()
    domain: str = ""
    ntp: tuple[IPv4Address, ...] = ()
    mtu: int | None = None
    is_static: bool = False  # the configured fallback, not from a server
    options: Mapping[int, bytes] = field(default_factory=dict)  # all that the server said, as it came

    def dumps(self) -> str:
        """The lease as JSON, for `loads` after a restart."""
        return json.dumps(
            {
                "address": str(self.address),
                "server": str(self.server),
                "renew_at": self.renew_at,
                "rebind_at": self.rebind_at,
                "expires": None if self.expires == FOREVER else self.expires,
                "routers": [str(one) for one in self.routers],
                "routes": [[str(network), str(router)] for network, router in self.routes],
                "dns": [str(one) for one in self.dns],
                "domain": self.domain,
                "ntp": [str(one) for one in self.ntp],
                "mtu": self.mtu,
                "options": {str(code): value.hex() for code, value in self.options.items()},
            }
        )

    @classmethod
    def loads(cls, text: str) -> "Lease":
        """The lease in JSON. Raises ValueError when it is none."""
        try:
            data: Mapping[str, Any] = json.loads(text)
            expires = FOREVER if data["expires"] is None else float(data["expires"])
            return cls(
                IPv4Interface(data["address"]),
                IPv4Address(data["server"]),
                float(data["renew_at"]),
                float(data["rebind_at"]),
                expires,
                tuple(IPv4Address(one) for one in data["routers"]),
                tuple((IPv4Network(network), IPv4Address(router)) for network, router in data["routes"]),
                tuple(IPv4Address(one) for one in data["dns"]),
                str(data["domain"]),
                tuple(IPv4Address(one) for one in data["ntp"]),
                None if data["mtu"] is None else int(data["mtu"]),
                options={int(code): bytes.fromhex(value) for code, value in data.get("options", {}).items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"stored lease: {error!r}") from error


def from_ack(ack: Message, sent_at: float) -> Lease | None:
    """The lease that an ACK gives to the REQUEST sent at `sent_at`, None when it lacks address, server or
    lease time.
    """
    options = ack.options
    seconds = option.u32(options.get(Code.LEASE_TIME))
    server = option.u32(options.get(Code.SERVER_ID))
    if not ack.yiaddr or not server or seconds is None or seconds < LEASE_MIN:
        return None
    length = FOREVER if seconds == option.INFINITE else float(seconds)
    t1 = option.u32(options.get(Code.RENEWAL_TIME))
    t2 = option.u32(options.get(Code.REBINDING_TIME))
    if t1 is None or t2 is None or not 0 < t1 < t2 < length:
        t1_seconds, t2_seconds = length * 0.5, length * 0.875  # RFC 2131, 4.4.5
    else:
        t1_seconds, t2_seconds = float(t1), float(t2)
    mask = option.u32(options.get(Code.SUBNET_MASK))
    routes = option.read_routes(options.get(Code.CLASSLESS_ROUTES))
    mtu = option.u16(options.get(Code.MTU))
    return Lease(
        IPv4Interface((ack.yiaddr, _prefix(mask))),
        IPv4Address(server),
        sent_at + t1_seconds,
        sent_at + t2_seconds,
        sent_at + length,
        () if routes else option.read_addresses(options.get(Code.ROUTER)),  # RFC 3442: 121 instead of 3
        routes,
        option.read_addresses(options.get(Code.DNS)),
        _domain(options.get(Code.DOMAIN_NAME)),
        option.read_addresses(options.get(Code.NTP)),
        mtu if mtu is not None and mtu >= 68 else None,
        options=options,
    )


def _prefix(mask: int | None) -> int:
    if mask is None:
        return 32
    inverted = ~mask & 0xFFFFFFFF
    return 32 - inverted.bit_length() if inverted & (inverted + 1) == 0 else 32


def _domain(value: bytes | None) -> str:
    text = (value or b"").rstrip(b"\0").decode("ascii", "replace")
    labels = text.split(".")
    return text.lower() if text and all(option.host_name(label.encode()) for label in labels) else ""
