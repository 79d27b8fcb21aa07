"""Which port of a bridge a hardware address is behind: the kernel's forwarding table, one address at a time
(rtnetlink(7)).

Invariant: the answer costs one small netlink exchange whatever the size of the table, and is kept for a few
seconds in bounded memory. A guest that forges its address is found all the same: the bridge learns the
forged one on its port before the datagram reaches us.
"""

import socket
import struct
from types import TracebackType
from typing import Final, Self

_RTM_NEWNEIGH: Final = 28
_RTM_GETNEIGH: Final = 30
_NLM_F_REQUEST: Final = 1
_AF_BRIDGE: Final = 7
_NDA_LLADDR: Final = 2
_NDA_MASTER: Final = 9
_REQUEST: Final = struct.Struct("=IHHII BxxxiHBB HH6sxx HHI")  # nlmsghdr, ndmsg, two attributes
_ANSWER: Final = struct.Struct("=IHHII Bxxxi")
_KEEP_SECONDS: Final = 5.0
_KEEP_MAX: Final = 1024


class Ports:
    """The port names behind `link`; on a link that is no bridge, every hardware address is its own port."""

    def __init__(self, link: str) -> None:
        self._bridge = socket.if_nametoindex(link)
        self._known: dict[bytes, tuple[str, float]] = {}
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._socket.settimeout(1.0)  # the kernel answers within the send call; never hang on a lost answer

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def of(self, hardware: bytes, now: float) -> str:
        """The name of the port behind which `hardware` is, else the address itself in hexadecimal."""
        known = self._known.get(hardware)
        if known is not None and known[1] > now:
            return known[0]
        port = self._ask(hardware) or hardware.hex(":")
        if len(self._known) >= _KEEP_MAX:
            self._known.clear()
        self._known[hardware] = (port, now + _KEEP_SECONDS)
        return port

    def _ask(self, hardware: bytes) -> str:
        request = _REQUEST.pack(
            _REQUEST.size,
            _RTM_GETNEIGH,
            _NLM_F_REQUEST,
            1,
            0,
            _AF_BRIDGE,
            0,
            0,
            0,
            0,
            10,
            _NDA_LLADDR,
            hardware,
            8,
            _NDA_MASTER,
            self._bridge,
        )
        try:
            self._socket.send(request)
            answer = self._socket.recv(4096)
            fields = _ANSWER.unpack_from(answer)
            return socket.if_indextoname(fields[6]) if fields[1] == _RTM_NEWNEIGH else ""
        except (OSError, struct.error):
            return ""  # not known, or no bridge: the address stands for itself
