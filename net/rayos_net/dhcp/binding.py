"""A binding: one address and the client it was given to (RFC 2131, 2.2 and 4.3.1).

Invariant: bindings are values; every change makes a new one, so one that waits for the disk is not changed
meanwhile. They are NamedTuples as the messages are: a frozen dataclass takes several times as long to make.
"""

from enum import Enum
from ipaddress import IPv4Address
from typing import Final, NamedTuple

FOREVER: Final = float("inf")


class BindingState(Enum):
    """The state of an address."""

    OFFERED = "offered"  # held for a client that was sent an OFFER; not on disk
    BOUND = "bound"  # leased: the ACK was sent, or waits for the disk
    RELEASED = "released"  # given back; remembered, so that the client gets the same again
    EXPIRED = "expired"  # ran out; remembered likewise
    DECLINED = "declined"  # somebody else uses it: not handed out until it expires


ACTIVE: Final = (
    BindingState.OFFERED,
    BindingState.BOUND,
)  # tuples: to hash a member costs more than to compare two
FREE: Final = (BindingState.RELEASED, BindingState.EXPIRED)


class Binding(NamedTuple):
    """One address and its client. `expires` and `since` are in seconds since the epoch; `port` is where it
    lives.
    """

    ip: int
    client: bytes  # the key: see client_key
    hardware: bytes  # 6 bytes
    client_id: bytes | None
    host_name: str | None
    state: BindingState
    expires: float
    since: float
    port: str = ""

    @property
    def address(self) -> IPv4Address:
        """The address."""
        return IPv4Address(self.ip)

    @property
    def mac(self) -> str:
        """The client's hardware address, like ``52:59:00:00:00:01``."""
        return self.hardware.hex(":")

    def changed(self, state: BindingState, expires: float) -> "Binding":
        """The same binding in another state."""
        return Binding(
            self.ip,
            self.client,
            self.hardware,
            self.client_id,
            self.host_name,
            state,
            expires,
            self.since,
            self.port,
        )


def client_key(client_id: bytes | None, hardware: bytes) -> bytes:
    """Returns the key of a client: its client identifier, else htype and hardware address (RFC 2131, 4.2).

    The identifier made of type 1 and the hardware address is the same client as one that sends none, so iPXE
    or firmware without an identifier and the system it boots share a lease. An RFC 4361 identifier is
    another client.
    """
    return client_id if client_id else b"\x01" + hardware


class EventKind(Enum):
    """The kind of an event of a lease."""

    BOUND = "bound"
    RENEWED = "renewed"
    RELEASED = "released"
    DECLINED = "declined"
    EXPIRED = "expired"


class LeaseEvent(NamedTuple):
    """A change of a lease, told after it is on stable storage."""

    kind: EventKind
    binding: Binding
