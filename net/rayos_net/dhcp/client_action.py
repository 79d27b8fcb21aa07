"""A DHCP client's configuration, and the actions that it wants done."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Interface

from rayos_net.dhcp.conflict import Times
from rayos_net.dhcp.frame import Arp
from rayos_net.dhcp.lease import Lease
from rayos_net.dhcp.message import MessageType


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """A client. `hardware` is the MAC that it speaks for; times are in seconds."""

    hardware: bytes
    client_id: bytes | None = None  # None: type 1 and the hardware address (RFC 2132, 9.14)
    host_name: str = ""
    vendor_class: str = "rayos"
    initial_delay: float = 0.0  # RFC 2131, 4.4.1 wants 1 to 10 where many start at once
    collect: float = 0.3  # how long OFFERs are collected after the first
    retransmit: float = 4.0  # first wait, doubled each time (RFC 2131, 4.1)
    renew_minimum: float = 60.0  # least wait between renewals (RFC 2131, 4.4.5)
    attempts: int = 5  # DISCOVERs until ERROR
    error_pause: float = 60.0  # then DISCOVER again
    fallback: IPv4Interface | None = None  # used in ERROR
    times: Times = field(default_factory=Times)
    is_probing: bool = True  # RFC 5227 before an address is used
    parameters: bytes = bytes((1, 121, 3, 6, 15, 26, 28, 42, 51, 54, 58, 59))  # 121 before 3 (RFC 3442)
    is_answering_arp: bool = False  # nobody else does for this address: no guest, no stack of the host


@dataclass(frozen=True, slots=True)
class Transmit:
    """Send this datagram from port 68 to port 67. `hardware` is whom the frame is for."""

    payload: bytes
    source: int
    destination: int
    hardware: bytes


@dataclass(frozen=True, slots=True)
class SendArp:
    """Send ARP for `address`: a probe has sender 0, an announcement sender = address; or answer a request."""

    address: int
    is_probe: bool
    answer_to: Arp | None = None


@dataclass(frozen=True, slots=True)
class Acquired:
    """Use this lease from now on (instead of the one before)."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Lost:
    """Stop using the address at once."""

    lease: Lease
    reason: str


@dataclass(frozen=True, slots=True)
class Informed:
    """The answer to INFORM: parameters for an address that we have otherwise."""

    options: Mapping[int, bytes]


Output = Transmit | SendArp | Acquired | Lost | Informed


@dataclass(slots=True)
class Transaction:
    """One exchange, for the history."""

    xid: int
    kind: MessageType
    started: float
    attempts: int = 0
    outcome: str = "open"
