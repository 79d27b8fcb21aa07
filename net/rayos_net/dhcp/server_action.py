"""The origin of a datagram and the actions that the DHCP server wants done (the shell of `rayos_net.dhcp.server`)."""

from typing import NamedTuple

from rayos_net.dhcp.answer import Reply
from rayos_net.dhcp.binding import Binding, LeaseEvent


class Source(NamedTuple):
    """The origin of a datagram. It has the port (a tap's name, "" unknown), whether it was sent to us alone, and the
    frame's sender where that has to be the client itself.
    """

    port: str
    unicast: bool = False
    hardware: bytes | None = None


class Send(NamedTuple):
    """Put the reply on the wire now."""

    reply: Reply


class Commit(NamedTuple):
    """Store the binding, then send the reply and tell the event, if any."""

    binding: Binding
    reply: Reply | None
    event: LeaseEvent | None


class Probe(NamedTuple):
    """Ask by ARP who has the address."""

    ip: int


class Tell(NamedTuple):
    """A lease changed; nothing to store that a restart would not find out by itself."""

    event: LeaseEvent


Action = Send | Commit | Probe | Tell
