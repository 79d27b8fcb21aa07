"""Many DHCP clients in one process, on raw frames: run in the client's namespace, prints a line for each ACK.

    python -m tests.integration.net.load LINK CLIENTS SECONDS

Replies are asked for as broadcasts, since the link has only one of the hardware addresses. Each client sends
DISCOVER, takes the first OFFER, sends REQUEST, and repeats what is unanswered after half a second.
"""

import select
import socket
import sys
import time

from rayos_net.dhcp import frame, packet_socket
from rayos_net.dhcp import message as wire
from rayos_net.dhcp.message import Message, MessageType


def main(link: str, clients: int, seconds: float) -> int:
    """Run until every client has its address (status 0) or the time is over (status 1)."""
    sock = packet_socket.open_udp(link, frame.CLIENT_PORT)
    waiting: dict[int, tuple[MessageType, dict[int, bytes]]] = {
        client: (MessageType.DISCOVER, {}) for client in range(clients)
    }
    end = time.monotonic() + seconds
    again = 0.0
    while waiting and time.monotonic() < end:
        if time.monotonic() >= again:
            for client, (kind, options) in list(waiting.items()):
                _send(sock, client, kind, options)
            again = time.monotonic() + 0.5
        select.select([sock], [], [], 0.05)
        try:
            while True:
                _receive(sock, waiting)
        except BlockingIOError:
            pass
    return 1 if waiting else 0


def _receive(sock: socket.socket, waiting: dict[int, tuple[MessageType, dict[int, bytes]]]) -> None:
    seen = frame.datagram(sock.recv(2048), frame.CLIENT_PORT)
    if seen is None:
        return
    reply = wire.decode(seen.payload)
    client = reply.xid
    if client not in waiting:
        return
    kind = waiting[client][0]
    if reply.type == MessageType.OFFER and kind is MessageType.DISCOVER:
        options = {50: reply.yiaddr.to_bytes(4, "big"), 54: reply.options[54]}
        waiting[client] = (MessageType.REQUEST, options)
        _send(sock, client, MessageType.REQUEST, options)
    elif reply.type == MessageType.NAK:
        waiting[client] = (MessageType.DISCOVER, {})
    elif reply.type == MessageType.ACK:
        del waiting[client]
        print("ack", reply.chaddr.hex(":"), reply.yiaddr, flush=True)


def _send(sock: socket.socket, client: int, kind: MessageType, options: dict[int, bytes]) -> None:
    mac = b"\x02\x4c" + (client & 0xFFFFFFFF).to_bytes(4, "big")
    request = Message(
        1, 0, client & 0xFFFFFFFF, 0, 0x8000, 0, 0, 0, 0, mac, b"", b"", {53: bytes((kind,)), **options}
    )
    data = frame.udp_frame(mac, frame.BROADCAST_MAC, 0, 0xFFFFFFFF, 68, 67, request.encode())
    try:
        sock.send(data)
    except OSError:
        return  # the queue is full: repeated in half a second


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
