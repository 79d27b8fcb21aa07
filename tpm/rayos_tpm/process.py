"""Processes that outlive the service which started them.

Each runs in a session of its own, and a new service finds it again by process id and start time (a
reused id has another start time). Waiting works by pidfd for children and strangers alike.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

_STAT_STATE = 0  # fields of /proc/<pid>/stat after the command's closing parenthesis
_STAT_START_TIME = 19


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()


def _is_child(pid: int) -> bool:
    """Whether a process is an unreaped child of ours: its id cannot be another's, and it needs no /proc."""
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None when there is no such process."""
    fields = _stat(pid)
    return None if fields is None else int(fields[_STAT_START_TIME])


@dataclass(frozen=True, slots=True)
class Process:
    """A process, named so that a reused process id is not mistaken for it.

    pid: its process id.
    started: its start time in clock ticks since boot, as /proc/<pid>/stat has it.
    """

    pid: int
    started: int

    def is_alive(self) -> bool:
        """Whether it still runs (a zombie does not)."""
        fields = _stat(self.pid)
        return (
            fields is not None
            and int(fields[_STAT_START_TIME]) == self.started
            and fields[_STAT_STATE] not in "ZX"
        )

    def _is_it(self) -> bool:
        return _is_child(self.pid) or start_time(self.pid) == self.started

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing happens when the process is gone."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self._is_it():
                signal.pidfd_send_signal(pidfd, number)
        except ProcessLookupError:
            pass
        finally:
            os.close(pidfd)

    async def wait(self) -> str:
        """Wait for its end and say how it ended.

        A child is reaped, and the answer is "exit status 1" or "signal 9"; of another's child only "gone"
        is known. Cancellation leaves the process alone.
        """
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return "gone"
        try:
            if not self._is_it():
                return "gone"
            await trio.lowlevel.wait_readable(pidfd)
            return self.reap() or "gone"
        finally:
            os.close(pidfd)

    def reap(self) -> str | None:
        """Collect a child that has ended and say how; None when it runs or is not our child."""
        try:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
        except ChildProcessError:
            return None
        if pid == 0:
            return None
        return _as_noun(status)

    async def stop(self, *, grace_s: float = 2.0) -> None:
        """SIGTERM, and SIGKILL after grace_s; returns when it is gone and reaped. Safe to call again."""
        self.send_signal(signal.SIGTERM)
        with trio.move_on_after(grace_s):
            await self.wait()
            return
        self.send_signal(signal.SIGKILL)
        await self.wait()


def _inheritable() -> list[int]:
    found = []
    for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        with suppress(OSError):  # the directory's own
            if os.get_inheritable(fd):
                found.append(fd)
    return found


def _as_noun(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit status {code}"


def describe(status: int) -> str:
    """How a process ended, as the end of a sentence; status as waitpid gives it."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"ended with status {code}"
    try:
        return f"died of {signal.Signals(-code).name}"
    except ValueError:
        return f"died of signal {-code}"


def spawn(argv: Sequence[str], *, descriptors: Mapping[int, int], environ: Mapping[str, str]) -> Process:
    """Start a program in a new session with exactly these descriptors.

    argv: the program's absolute path and its arguments.
    descriptors: descriptor in the program -> descriptor of ours; 0, 1 and 2 must be among them.
    OSError: the program cannot be executed.
    """
    # Two steps, so that no target overwrites a source that is still to come.
    base = max([*descriptors, *descriptors.values()]) + 1
    parked = {target: base + index for index, target in enumerate(descriptors)}
    actions: list[tuple[int, ...]] = []
    actions += [(os.POSIX_SPAWN_DUP2, descriptors[target], spare) for target, spare in parked.items()]
    actions += [(os.POSIX_SPAWN_DUP2, spare, target) for target, spare in parked.items()]
    actions += [(os.POSIX_SPAWN_CLOSE, spare) for spare in parked.values()]
    # Whatever somebody else left inheritable in this process is not the program's.
    actions += [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable() if fd not in descriptors]
    pid = os.posix_spawn(
        argv[0],
        list(argv),
        dict(environ),
        file_actions=actions,
        setsid=True,
        setsigmask=(),
        setsigdef=(signal.SIGPIPE, signal.SIGINT, signal.SIGTERM),
    )
    started = start_time(pid)
    if started is None:
        raise ProcessLookupError(f"process {pid} ({argv[0]}) was reaped by somebody else")
    return Process(pid, started)
