"""What the DHCP server is told about a datagram, and what it wants done (the shell's side of `net.dhcp.server`)."""

from dataclasses import dataclass

from net.dhcp.answer import Reply
from net.dhcp.binding import Binding, LeaseEvent


@dataclass(frozen=True, slots=True)
class Source:
    """Where a datagram came from: the port (a tap's name, "" unknown), whether it was sent to us alone, and the
    frame's sender where that has to be the client itself.
    """

    port: str
    unicast: bool = False
    hardware: bytes | None = None


@dataclass(frozen=True, slots=True)
class Send:
    """Put the reply on the wire now."""

    reply: Reply


@dataclass(frozen=True, slots=True)
class Commit:
    """Store the binding, then send the reply and tell the event, if any."""

    binding: Binding
    reply: Reply | None
    event: LeaseEvent | None


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask by ARP who has the address."""

    ip: int


@dataclass(frozen=True, slots=True)
class Tell:
    """A lease changed; nothing to store that a restart would not find out by itself."""

    event: LeaseEvent


Action = Send | Commit | Probe | Tell
