"""Raw sockets on one link: datagrams to one UDP port, and ARP, with a kernel filter in front (packet(7), socket(7)).

Invariant: a socket receives only frames that came in on its link for this host or for all (no VLAN tag, no
fragment), and its filter is set before it is bound, so nothing slips in first. Closing is the caller's.
"""

import ctypes
import errno
import socket
import struct
from typing import Final

SO_ATTACH_FILTER: Final = 26
SO_RCVBUFFORCE: Final = 33
SOL_PACKET: Final = 263
PACKET_ADD_MEMBERSHIP: Final = 1
PACKET_MR_PROMISC: Final = 1
PACKET_IGNORE_OUTGOING: Final = 23
ETH_P_ALL: Final = 0x0003
ETH_P_IP: Final = 0x0800
ETH_P_ARP: Final = 0x0806
RECEIVE_BUFFER_SIZE: Final = 4 << 20  # a burst of 1000 clients exceeds the default

_ANCILLARY: Final = 0xFFFFF000  # SKF_AD_OFF: what the kernel knows beside the bytes
_PACKET_TYPE: Final = _ANCILLARY + 4  # 0 to us, 1 to all, 2 to a group, 3 to another host, 4 outgoing
_INTERFACE_INDEX: Final = _ANCILLARY + 8
_VLAN_PRESENT: Final = _ANCILLARY + 48
_LOAD_WORD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_LOAD_BYTE: Final = 0x30  # BPF_LD | BPF_B | BPF_ABS
_LOAD_HALF: Final = 0x28  # BPF_LD | BPF_H | BPF_ABS
_LOAD_HALF_INDEXED: Final = 0x48  # BPF_LD | BPF_H | BPF_IND
_LOAD_WORD_INDEXED: Final = 0x40  # BPF_LD | BPF_W | BPF_IND
_LOAD_IP_LENGTH: Final = 0xB1  # BPF_LDX | BPF_B | BPF_MSH
_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_GREATER: Final = 0x25  # BPF_JMP | BPF_JGT | BPF_K
_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K

_CHADDR_AT: Final = 14 + 8 + 28  # Ethernet and UDP header, then RFC 2131, figure 1; the IP header is in X
_ARP_SENDER_AT: Final = 28  # Ethernet header, then RFC 826
_ARP_TARGET_AT: Final = 38

_Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, operand


class LinkGone(OSError):
    """The link does not exist (any more)."""


def open_udp(
    link: str, port: int, *, is_for_any_host: bool = False, client: bytes | None = None
) -> socket.socket:
    """A non-blocking socket that receives UDP datagrams to `port` on `link` as whole frames, and sends frames.

    With `is_for_any_host` also those to other hosts' hardware addresses (the link is promiscuous meanwhile);
    with `client` only DHCP messages about that hardware address.
    Raises LinkGone when there is no such link, OSError (EPERM) without CAP_NET_RAW.
    """
    return _open(link, ETH_P_IP, _datagrams(port, is_for_any_host, client), is_for_any_host)


def open_udp_on_port(link: str, port: int, *, buffer_size: int = RECEIVE_BUFFER_SIZE) -> socket.socket:
    """Opens the socket of `open_udp` on a port of a bridge. It sees frames before the bridge takes them away, those
    for the bridge's own address among them.
    """
    # Only a socket for all protocols stands before the bridge; the filter keeps IPv4.
    return _open(link, ETH_P_ALL, _datagrams(port, True), False, buffer_size=buffer_size)


def open_sender(link: str) -> socket.socket:
    """A non-blocking socket that sends whole frames on `link` and receives none. Raises as open_udp."""
    return _open(link, ETH_P_IP, [(_RETURN, 0, 0, 0)], False)


def open_arp(link: str, *, is_for_any_host: bool = False) -> socket.socket:
    """A non-blocking socket that receives ARP on `link` as whole frames, and sends frames. Raises as
    open_udp.
    """
    program: list[_Instruction] = [
        (_LOAD_BYTE, 0, 0, _PACKET_TYPE),
        (_GREATER, 3, 0, 3 if is_for_any_host else 1),
        (_LOAD_BYTE, 0, 0, _VLAN_PRESENT),
        (_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, 0xFFFF),
        (_RETURN, 0, 0, 0),
    ]
    return _open(link, ETH_P_ARP, program, is_for_any_host)


def _datagrams(port: int, is_for_any_host: bool, client: bytes | None = None) -> list[_Instruction]:
    about: list[_Instruction] = []
    if client is not None:
        about = [
            (_LOAD_WORD_INDEXED, 0, 0, _CHADDR_AT),
            (_EQUAL, 0, 3, int.from_bytes(client[:4], "big")),
            (_LOAD_HALF_INDEXED, 0, 0, _CHADDR_AT + 4),
            (_EQUAL, 0, 1, int.from_bytes(client[4:6], "big")),
        ]
    more = len(about)
    return [
        (_LOAD_BYTE, 0, 0, _PACKET_TYPE),
        (_GREATER, 12 + more, 0, 3 if is_for_any_host else 1),
        (_LOAD_BYTE, 0, 0, _VLAN_PRESENT),
        (_EQUAL, 0, 10 + more, 0),
        (_LOAD_HALF, 0, 0, 12),
        (_EQUAL, 0, 8 + more, ETH_P_IP),
        (_LOAD_HALF, 0, 0, 20),
        (_ANY_BIT, 6 + more, 0, 0x3FFF),  # more fragments, or not the first
        (_LOAD_BYTE, 0, 0, 23),
        (_EQUAL, 0, 4 + more, 17),
        (_LOAD_IP_LENGTH, 0, 0, 14),
        (_LOAD_HALF_INDEXED, 0, 0, 16),
        (_EQUAL, 0, 1 + more, port),
        *about,
        (_RETURN, 0, 0, 0xFFFF),
        (_RETURN, 0, 0, 0),
    ]


def watch_arp(sock: socket.socket, address: int) -> None:
    """Let an ARP socket receive only what `address` sends or is asked about; 0: nothing."""
    program: list[_Instruction] = [(_RETURN, 0, 0, 0)]
    if address:
        program = [
            (_LOAD_BYTE, 0, 0, _PACKET_TYPE),
            (_GREATER, 7, 0, 3),
            (_LOAD_BYTE, 0, 0, _VLAN_PRESENT),
            (_EQUAL, 0, 5, 0),
            (_LOAD_WORD, 0, 0, _ARP_SENDER_AT),
            (_EQUAL, 2, 0, address),
            (_LOAD_WORD, 0, 0, _ARP_TARGET_AT),
            (_EQUAL, 0, 1, address),
            (_RETURN, 0, 0, 0xFFFF),
            (_RETURN, 0, 0, 0),
        ]
    _attach(sock, program)


def hardware_address(sock: socket.socket) -> bytes:
    """The hardware address of the link that the packet socket is bound to."""
    return bytes(sock.getsockname()[4])


def set_receive_buffer(sock: socket.socket, size: int) -> None:
    """Give the socket a receive buffer of `size` bytes, or as large as we are allowed to."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def refuse_input(sock: socket.socket) -> None:
    """Let the socket receive nothing: it holds a port and sends."""
    _attach(sock, [(_RETURN, 0, 0, 0)])


def accept_from_this_host(sock: socket.socket) -> None:
    """Let the socket receive only what comes over the loopback link: from processes of this host."""
    loopback = socket.if_nametoindex("lo")
    program: list[_Instruction] = [
        (_LOAD_WORD, 0, 0, _INTERFACE_INDEX),
        (_EQUAL, 0, 1, loopback),
        (_RETURN, 0, 0, 0xFFFF),
        (_RETURN, 0, 0, 0),
    ]
    _attach(sock, program)


def _open(
    link: str,
    protocol: int,
    program: list[_Instruction],
    is_for_any_host: bool,
    *,
    buffer_size: int = RECEIVE_BUFFER_SIZE,
) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
    try:
        _attach(sock, program)
        set_receive_buffer(sock, buffer_size)
        sock.setsockopt(
            SOL_PACKET, PACKET_IGNORE_OUTGOING, 1
        )  # Linux 4.20: else each is copied to be refused
        sock.bind((link, protocol))
        if is_for_any_host:
            index = socket.if_nametoindex(link)
            request = struct.pack("iHH8s", index, PACKET_MR_PROMISC, 0, b"")  # struct packet_mreq
            sock.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, request)
    except OSError as error:
        sock.close()
        if error.errno in (errno.ENODEV, errno.ENXIO):
            raise LinkGone(error.errno, f"there is no link {link}") from error
        raise
    except BaseException:
        sock.close()
        raise
    return sock


def _attach(sock: socket.socket, program: list[_Instruction]) -> None:
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)  # struct sock_filter
    keep = ctypes.create_string_buffer(code)
    sock.setsockopt(
        socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(keep))
    )
