"""The last questions to the server and its answers, for people who look for a fault.

Invariant: the last 16 exchanges of each of the last 256 ports, whatever is sent: a port that floods pushes out its
own entries only.
"""

from collections import OrderedDict, deque
from ipaddress import IPv4Address
from typing import Final, NamedTuple

from rayos_net.dhcp import option
from rayos_net.dhcp.answer import Reply
from rayos_net.dhcp.message import Message, MessageType

ENTRIES_MAX: Final = 16
PORTS_MAX: Final = 256
_TYPE_AT: Final = 242  # of a reply: its first option is the message type (rayos_net.dhcp.answer)
_YIADDR_AT: Final = 16  # RFC 2131, figure 1


class Exchange(NamedTuple):
    """A request (None: it could not be read) and its answer (b"": none, for the reason `why`)."""

    at: float
    port: str
    request: Message | None
    answer: bytes
    why: str

    def describe(self) -> dict[str, object]:
        """Plain values: time in seconds since the epoch, names of types, addresses as text."""
        request, answer = self.request, self.answer
        told = int.from_bytes(answer[_YIADDR_AT : _YIADDR_AT + 4], "big")
        asked = 0
        if request is not None:
            asked = request.ciaddr or option.u32(request.options.get(50)) or 0
        return {
            "at": self.at,
            "port": self.port,
            "mac": request.chaddr.hex(":") if request is not None else None,
            "xid": request.xid if request is not None else None,
            "request": _name(request.type) if request is not None else None,
            "answer": _name(answer[_TYPE_AT]) if answer else None,
            "address": str(IPv4Address(told or asked)) if told or asked else None,
            "why": self.why,
        }


class Exchanges:
    """The last exchanges by port."""

    def __init__(self) -> None:
        self._ports: OrderedDict[str, deque[Exchange]] = OrderedDict()

    def note(self, at: float, port: str, request: Message | None, reply: Reply | None, why: str) -> None:
        """Remember one."""
        kept = self._ports.get(port)
        if kept is None:
            if len(self._ports) >= PORTS_MAX:
                self._ports.popitem(last=False)
            kept = self._ports[port] = deque(maxlen=ENTRIES_MAX)
        else:
            self._ports.move_to_end(port)
        kept.append(Exchange(at, port, request, b"" if reply is None else reply.data, why))

    def list(self) -> list[Exchange]:
        """All that is remembered, the oldest first."""
        return sorted((one for kept in self._ports.values() for one in kept), key=lambda one: one.at)


def _name(kind: int | None) -> str:
    try:
        return "BOOTP" if kind is None else MessageType(kind).name
    except ValueError:
        return f"type {kind}"
