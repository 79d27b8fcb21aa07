"""The ports of a bridge as they come and go, told by the kernel (rtnetlink(7)).

Invariant: `ports` is what the kernel has told up to the last `read`; a lost notification (ENOBUFS) is made up
for by asking for all links again. Nothing is read outside a message.
"""

import errno
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Final, NamedTuple, Self

_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_RTM_NEWLINK: Final = 16
_RTM_DELLINK: Final = 17
_RTM_GETLINK: Final = 18
_NLM_F_REQUEST_DUMP: Final = 0x301
_RTMGRP_LINK: Final = 1
_IFLA_IFNAME: Final = 3
_IFLA_MASTER: Final = 10
_IFLA_LINKINFO: Final = 18
_IFLA_INFO_KIND: Final = 1
_TYPE_MASK: Final = 0x3FFF  # NLA_F_NESTED and NLA_F_NET_BYTEORDER aside
_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr
_LINK: Final = struct.Struct("=BxHiII")  # ifinfomsg
_ATTRIBUTE: Final = struct.Struct("=HH")
_BUFFER_SIZE: Final = 1 << 16  # more than the kernel puts into one datagram (NLMSG_GOODSIZE, 32 KiB)
_DUMP_TIMEOUT_SECONDS: Final = 5.0


class LinkMessage(NamedTuple):
    """The contents of one message about one link."""

    is_gone: bool
    family: int  # AF_UNSPEC the link itself, AF_BRIDGE its being a port
    link: int  # its interface index
    name: str
    master: int  # 0: none
    kind: str


class PortWatch:
    """The ports of `link` by interface index; on a link that is no bridge there are none.

    The socket is non-blocking: wait until it is readable, then call `read`. Raises OSError (ENODEV) when there
    is no such link.
    """

    def __init__(self, link: str) -> None:
        try:
            self._bridge = socket.if_nametoindex(link)
        except OSError as error:  # without a number of its own
            raise OSError(errno.ENODEV, f"there is no link {link}") from error
        self.is_bridge = False
        self.is_gone = False
        self.ports: dict[int, str] = {}
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        try:
            self.socket.bind((0, _RTMGRP_LINK))
            self._ask_all()
        except BaseException:
            self.socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    def read(self) -> None:
        """Take in what the kernel has told since; does not wait."""
        while True:
            try:
                data = self.socket.recv(_BUFFER_SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._ask_all()
                return
            for one in messages(data):
                self._take(one)

    def _ask_all(self) -> None:
        # The kernel makes the answer while it is read, so this waits for nobody else.
        self.ports.clear()
        self.socket.settimeout(_DUMP_TIMEOUT_SECONDS)
        size = _HEADER.size + _LINK.size
        request = _HEADER.pack(size, _RTM_GETLINK, _NLM_F_REQUEST_DUMP, 1, 0) + _LINK.pack(0, 0, 0, 0, 0)
        self.socket.send(request)
        while True:
            try:
                data = self.socket.recv(_BUFFER_SIZE)
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                continue  # a notification was lost: the answer goes on and is newer
            for one in messages(data):
                self._take(one)
            if _is_end(data):
                break
        self.socket.setblocking(False)

    def _take(self, one: LinkMessage) -> None:
        if one.link == self._bridge:
            if one.family == socket.AF_UNSPEC:
                self.is_gone = one.is_gone
                self.is_bridge = self.is_bridge or one.kind == "bridge"
        elif one.master == self._bridge and not one.is_gone:
            self.ports[one.link] = one.name
        elif one.is_gone or one.family == socket.AF_UNSPEC:
            self.ports.pop(one.link, None)


def messages(data: bytes) -> Iterator[LinkMessage]:
    """The link messages in a netlink datagram; others are passed over."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        stop = at + length
        if length < _HEADER.size or stop > len(data):
            return
        start = at + _HEADER.size
        if kind in (_RTM_NEWLINK, _RTM_DELLINK) and start + _LINK.size <= stop:
            family, _, index, _, _ = _LINK.unpack_from(data, start)
            found = dict(_attributes(data[start + _LINK.size : stop]))
            info = dict(_attributes(found.get(_IFLA_LINKINFO, b"")))
            yield LinkMessage(
                kind == _RTM_DELLINK,
                family,
                index,
                _text(found.get(_IFLA_IFNAME, b"")),
                int.from_bytes(found.get(_IFLA_MASTER, b""), "little"),
                _text(info.get(_IFLA_INFO_KIND, b"")),
            )
        at += (length + 3) & ~3


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3


def _is_end(data: bytes) -> bool:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, at)
        if kind in (_NLMSG_DONE, _NLMSG_ERROR):
            return True
        at += max((length + 3) & ~3, _HEADER.size)
    return False


def _text(value: bytes) -> str:
    return value.split(b"\0", 1)[0].decode(errors="replace")
