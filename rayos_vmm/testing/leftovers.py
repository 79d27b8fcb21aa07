"""Leftovers of a test on the host: processes that it started, network links, directories.

All are told from everybody else's, who may be at work at the same time, by this session's mark: in the environment
of processes, which children inherit, and in the names of bridges and directories. A tap goes with its process.
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
MARK_CHARACTERS: Final = 4
GRACE_S: Final = 15.0
RETRY_S: Final = 0.1


def session_mark() -> str:
    """This session's mark; made, and inherited by later children, if there is none yet."""
    return os.environ.setdefault(VARIABLE, uuid.uuid4().hex)


def unique_name(mark: str) -> str:
    """A name for a bridge or directory of this session, of 14 characters (an interface's has room for 15)."""
    return f"rayos-{mark[:MARK_CHARACTERS]}{uuid.uuid4().hex[:4]}"


def _links(mark: str) -> frozenset[str]:
    return frozenset(path.name for path in Path("/sys/class/net").glob(f"rayos-{mark[:MARK_CHARACTERS]}*"))


def _directories(mark: str) -> frozenset[str]:
    return frozenset(str(path) for path in Path("/tmp").glob(f"rayos-{mark[:MARK_CHARACTERS]}*"))


def _setting(mark: str) -> bytes:
    return f"{VARIABLE}={mark}".encode()


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
    processes: frozenset[str]
    links: frozenset[str]
    directories: frozenset[str]

    @classmethod
    def now(cls) -> Leftovers:
        """The host as it is; marks this process's later children."""
        mark = session_mark()
        return cls(mark, frozenset(_processes(_setting(mark))), _links(mark), _directories(mark))

    def _left(self) -> list[str]:
        return [
            *(process for process in _processes(_setting(self.mark)) if process not in self.processes),
            *(f"link {name}" for name in sorted(_links(self.mark) - self.links)),
            *(f"directory {name}" for name in sorted(_directories(self.mark) - self.directories)),
        ]

    def wait_gone(self) -> list[str]:
        """Returns the leftovers; whatever is still ending has a few seconds. Blocking."""
        deadline = time.monotonic() + GRACE_S
        while (left := self._left()) and time.monotonic() < deadline:
            time.sleep(RETRY_S)  # the end of somebody else's child comes without an event
        return left

    async def appeared_since(self) -> list[str]:
        """As `wait_gone`, under trio."""
        return await trio.to_thread.run_sync(self.wait_gone)
