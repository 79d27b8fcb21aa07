"""A minimal vhost-user frontend: negotiates, shares a sealed memfd, starts queues; the load does the rest."""

from __future__ import annotations

import array
import fcntl
import mmap
import os
import socket
import struct
from pathlib import Path
from typing import Final

F_ADD_SEALS: Final = 1033
SEALS: Final = 0x2 | 0x4  # shrink, grow
VERSION_1: Final = 1 << 32
PROTOCOL_FEATURES: Final = 1 << 30
EVENT_IDX: Final = 1 << 29
INDIRECT: Final = 1 << 28
USER_BASE: Final = 0x10_0000_0000


class Session:
    """Connected, features set, memory shared. `ram` is the guest memory, guest address 0 is its first byte."""

    def __init__(self, path: Path, ram_bytes: int, features: int) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(path))
        fd = os.memfd_create("bench-ram", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, ram_bytes)
        fcntl.fcntl(fd, F_ADD_SEALS, SEALS)
        self.ram = memoryview(mmap.mmap(fd, ram_bytes))
        offered = self.ask(1)
        wanted = offered & (features | VERSION_1 | PROTOCOL_FEATURES | EVENT_IDX | INDIRECT)
        protocol = self.ask(15) & (1 << 3)
        self.tell(16, struct.pack("<Q", protocol))
        self.tell(3)
        self.tell(2, struct.pack("<Q", wanted))
        self.features = wanted
        self.tell(5, struct.pack("<IIQQQQ", 1, 0, 0, ram_bytes, USER_BASE, 0), fd)
        os.close(fd)

    def tell(self, request: int, payload: bytes = b"", *fds: int) -> None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([struct.pack("<III", request, 1, len(payload)) + payload], ancillary)

    def ask(self, request: int, payload: bytes = b"") -> int:
        self.tell(request, payload)
        head = self.sock.recv(12, socket.MSG_WAITALL)
        body = self.sock.recv(struct.unpack("<III", head)[2], socket.MSG_WAITALL)
        return int.from_bytes(body[:8], "little")

    def start(self, index: int, size: int, desc: int, avail: int, used: int) -> tuple[int, int]:
        """Start one queue; returns (kick, call) eventfds."""
        kick = os.eventfd(0, os.EFD_NONBLOCK)
        call = os.eventfd(0, os.EFD_NONBLOCK)
        self.tell(13, struct.pack("<Q", index), call)
        self.tell(8, struct.pack("<II", index, size))
        self.tell(10, struct.pack("<II", index, 0))
        addresses = (USER_BASE + desc, USER_BASE + used, USER_BASE + avail)
        self.tell(9, struct.pack("<IIQQQQ", index, 0, *addresses, 0))
        self.tell(12, struct.pack("<Q", index), kick)
        self.tell(18, struct.pack("<II", index, 1))
        self.ask(1)
        return kick, call

    def close(self) -> None:
        self.sock.close()
