"""A number for each running machine of this host, and the users that its processes become.

Invariant: two machines that run at the same time never have the same number, whichever services started them. The
claim is a bound abstract socket, which the kernel gives back when its last descriptor is closed: the machine's keeper
inherits it. Nothing has to be written, swept or adopted.

The users lie in a range that neither Debian nor systemd hands out (systemd, UIDS-GIDS.md: 1879048192 and up are
unused); nobody logs in as them and no file belongs to them, but the few that are handed over.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, Self

SLOTS: Final = 4096
_FIRST_USER: Final = 1_900_000_000
_USERS: Final = {"worker": _FIRST_USER, "qemu": _FIRST_USER + SLOTS, "tpm": _FIRST_USER + 2 * SLOTS}


@dataclass(frozen=True, slots=True)
class Identity:
    """A claimed slot; close it when the keeper has inherited the descriptor. `slot` -1: nobody's, as without root."""

    slot: int = -1
    socket: socket.socket | None = None

    @property
    def fds(self) -> list[int]:
        """The descriptors that hold the claim, for the process that is to keep it."""
        return [] if self.socket is None else [self.socket.fileno()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.socket is not None:
            self.socket.close()


def claim() -> Identity:
    """The lowest free number; none when this is not root, which cannot become another user.

    Raises:
        OSError: EAGAIN when all of them are taken.
    """
    if os.geteuid() != 0:
        return Identity()
    for slot in range(SLOTS):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        with suppress(OSError):
            sock.bind(f"\0rayos-vmm-slot-{slot}")
            return Identity(slot, sock)
        sock.close()
    raise OSError(errno.EAGAIN, f"{SLOTS} machines run on this host already")


def user(kind: str, slot: int) -> int:
    """The user of a machine's "worker", "qemu" or "tpm" process; 0 (no change) without a slot."""
    return _USERS[kind] + slot if slot >= 0 else 0


#: Where processes stay who they are.
NOBODY: Final = Identity()
