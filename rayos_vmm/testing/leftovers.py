"""What a test must not leave on the host: processes that it started, network links, directories.

Processes are told from everybody else's by a mark in their environment, which children inherit.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

VARIABLE: Final = "RAYOS_TEST_SESSION"
LINK_PREFIX: Final = "ray"
GRACE_S: Final = 5.0
RETRY_S: Final = 0.1


def _links() -> frozenset[str]:
    return frozenset(
        link.name for link in Path("/sys/class/net").iterdir() if link.name.startswith(LINK_PREFIX)
    )


def _directories() -> frozenset[str]:
    return frozenset(str(path) for path in Path("/tmp").glob("rayos-*"))


def _processes(mark: bytes) -> Iterator[str]:
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal() or int(directory.name) == os.getpid():
            continue
        try:
            if mark in (directory / "environ").read_bytes().split(b"\0"):
                command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                yield f"process {directory.name}: {command.strip()[:120]}"
        except OSError:
            continue  # it ended meanwhile, or belongs to somebody else


@dataclass(frozen=True, slots=True)
class Leftovers:
    """How the host was. Make one before, ask it after."""

    mark: str
    links: frozenset[str]
    directories: frozenset[str]

    @classmethod
    def now(cls) -> Leftovers:
        """The host as it is; marks this process's later children."""
        mark = os.environ.setdefault(VARIABLE, uuid.uuid4().hex)
        return cls(mark, _links(), _directories())

    def _left(self) -> list[str]:
        return [
            *_processes(f"{VARIABLE}={self.mark}".encode()),
            *(f"link {name}" for name in sorted(_links() - self.links)),
            *(f"directory {name}" for name in sorted(_directories() - self.directories)),
        ]

    def wait_gone(self) -> list[str]:
        """What is there that was not; whatever is still ending has a few seconds. Blocking."""
        deadline = time.monotonic() + GRACE_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(RETRY_S)  # the end of somebody else's child comes without an event
        return left

    async def appeared_since(self) -> list[str]:
        """As `wait_gone`, under trio."""
        return await trio.to_thread.run_sync(self.wait_gone)
