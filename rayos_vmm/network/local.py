"""Every IPv4 address that this host answers to, as its kernel routes it (rtnetlink(7), /proc/net/fib_trie).

A guest that may not use the host's services may use them at none of its addresses: the bridge's, another bridge's, an
uplink's. They change while guests run, and the kernel tells of it.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import trio

_FIB_TRIE: Final = Path("/proc/net/fib_trie")
#: A leaf of the trie, and whether it is a local address.
_LOCAL: Final = re.compile(r"\|-- ([0-9.]+)\n\s+/32 host LOCAL")
_LOOPBACK: Final = "127."
_RTMGRP_IPV4_IFADDR: Final = 0x10  # linux/rtnetlink.h
_MESSAGE_BYTES: Final = 65536


def local_addresses(table: Path = _FIB_TRIE) -> frozenset[str]:
    """The addresses, without loopback: no frame from outside reaches those. Empty where the kernel does not say."""
    try:
        text = table.read_text("ascii", "replace")
    except OSError:
        return frozenset()
    return frozenset(found for found in _LOCAL.findall(text) if not found.startswith(_LOOPBACK))


async def follow_addresses(on_change: Callable[[], None]) -> None:
    """Calls back whenever an address of the host has come or gone. Never returns."""
    netlink = trio.socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    with netlink:
        await netlink.bind((0, _RTMGRP_IPV4_IFADDR))
        known = local_addresses()
        while True:
            with suppress(
                OSError
            ):  # ENOBUFS: there were more than the socket holds, and the table has them all
                await netlink.recv(_MESSAGE_BYTES)
            now = local_addresses()
            if now != known:
                known = now
                on_change()
