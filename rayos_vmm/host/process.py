"""Processes that outlive the daemon: started in their own session, watched by pidfd, known by start time.

Invariant: a process is identified by (pid, start time), so a recycled pid is never taken for ours, and
signals go through the pidfd alone. Source: pidfd_open(2), proc_pid_stat(5).
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import trio

_STATE_FIELD: Final = 3  # proc_pid_stat(5), counted from 1
STARTTIME_FIELD: Final = 22
_CLOSE_RANGE: Final = 436  # close_range(2), linux/close_range.h
_CLOSE_RANGE_CLOEXEC: Final = 1 << 2
_IN_A_PROCESS: Final = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores these; a child must not


_libc = ctypes.CDLL(None, use_errno=True)


class ProcessId(msgspec.Struct, frozen=True):
    """Which process it is, also after we were away."""

    pid: int
    start_time: int


def stat_fields(pid: int) -> dict[int, str]:
    """Fields 3 and on by their number in proc_pid_stat(5). Errors: OSError when there is no such process."""
    stat = Path(f"/proc/{pid}/stat").read_text("ascii", "replace")
    return dict(enumerate(stat[stat.rindex(")") + 2 :].split(), 3))  # the name before may hold anything


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none (or a zombie)."""
    try:
        fields = stat_fields(pid)
    except OSError:
        return None
    return None if fields[_STATE_FIELD] in ("Z", "X") else int(fields[STARTTIME_FIELD])


class Process:
    """A process we started or found again. `close` it when done; closing does not end it."""

    def __init__(self, identity: ProcessId, pidfd: int, *, is_child: bool) -> None:
        self.identity = identity
        self._pidfd = pidfd
        self._is_child = is_child
        self._status: int | None = None
        self._waiting = trio.Lock()

    @property
    def pid(self) -> int:
        return self.identity.pid

    def signal(self, number: int) -> None:
        """Sends a signal; does nothing when the process is gone."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> int | None:
        """Returns when it ended: its exit status, minus the signal's number, or None if it is not our child."""
        async with self._waiting:  # one task at a time may wait for a descriptor
            if self._status is None:
                await trio.lowlevel.wait_readable(self._pidfd)
                if self._is_child and self._status is None:
                    try:
                        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)  # noqa: ASYNC222 (it has ended)
                    except ChildProcessError:  # whoever else waited for it has its status
                        result = None
                    if result is not None:
                        is_exit = result.si_code == os.CLD_EXITED
                        self._status = result.si_status if is_exit else -result.si_status
        return self._status

    async def end(self, *, grace_s: float = 2.0) -> int | None:
        """SIGTERM, and SIGKILL after `grace_s`; returns as `wait`. Cannot be cancelled, and is bounded."""
        with trio.CancelScope(shield=True):
            self.signal(signal.SIGTERM)
            with trio.move_on_after(grace_s):
                return await self.wait()
            self.signal(signal.SIGKILL)
            await self.wait()
        return self._status

    def close(self) -> None:
        """Lets go of the process; it goes on."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def keep_private() -> None:
    """Has every descriptor above 2 closed in the programs that this process starts, whoever opened it."""
    nothing = ctypes.c_uint(3), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(_CLOSE_RANGE_CLOEXEC)
    if _libc.syscall(ctypes.c_long(_CLOSE_RANGE), *nothing) != 0:  # before Linux 5.11
        for fd in _inheritable():
            os.set_inheritable(fd, False)


def close_inherited(*kept: int) -> None:
    """Closes what the program that started this one had open above 2, but `kept`.

    What Python opens itself is not inheritable (PEP 446), so every descriptor that is came from outside.
    """
    for fd in set(_inheritable()) - set(kept):
        os.close(fd)


def _inheritable() -> list[int]:
    found = []
    for fd in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        with suppress(OSError):  # the directory's own
            if fd > 2 and os.get_inheritable(fd):
                found.append(fd)
    return found


def spawn(
    argv: Sequence[str],
    *,
    output_fd: int,
    error_fd: int | None = None,
    input_fd: int | None = None,
    pass_fds: Sequence[int] = (),
    environment: Mapping[str, str] | None = None,
) -> Process:
    """Starts a process in a session of its own, with nothing of ours but what is passed.

    Args:
        argv: absolute path and arguments.
        output_fd: becomes its standard output, and error unless there is an `error_fd`.
        input_fd: becomes its standard input, else that is empty.
        pass_fds: kept under the same numbers (above 2).

    Raises:
        OSError: it cannot be executed.
    """
    keep_private()
    actions: list[tuple[int, int, str, int, int] | tuple[int, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)
        if input_fd is None
        else (os.POSIX_SPAWN_DUP2, input_fd, 0),
        (os.POSIX_SPAWN_DUP2, output_fd, 1),
        (os.POSIX_SPAWN_DUP2, output_fd if error_fd is None else error_fd, 2),
    ]
    # `keep_private` closes the rest. A duplicate onto itself clears close-on-exec (glibc 2.29 and later).
    actions += [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in pass_fds]
    pid = os.posix_spawn(
        argv[0],
        list(argv),
        dict(os.environ if environment is None else environment),
        file_actions=actions,
        setsid=True,
        setsigdef=_IN_A_PROCESS,
        setsigmask=(),
    )
    # Our child stays a zombie until we wait for it, so neither of these can meet another process.
    pidfd = os.pidfd_open(pid)
    return Process(ProcessId(pid, start_time(pid) or 0), pidfd, is_child=True)


def adopt(identity: ProcessId) -> Process | None:
    """The process of that identity, of ours or of a former daemon; None if it is gone."""
    try:
        pidfd = os.pidfd_open(identity.pid)
    except OSError:
        return None
    if start_time(identity.pid) != identity.start_time:
        os.close(pidfd)
        return None
    return Process(identity, pidfd, is_child=_is_child(pidfd))


def _is_child(pidfd: int) -> bool:
    try:
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def ending(status: int | None) -> str:
    """How a process ended, as the end of a sentence; `status` as `Process.wait` gives it."""
    if status is None:
        return "ended, and nobody saw how"
    return f"died of {signal_name(-status)}" if status < 0 else f"ended with status {status}"


def signal_name(number: int) -> str:
    """SIGKILL, or "signal 99" for one that has no name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def find_by_output(paths: Sequence[Path]) -> list[ProcessId]:
    """The processes whose standard output or error is one of these files, also when that was removed.

    So are found those that were started and not yet recorded when their service was killed.
    """
    wanted = {str(path) for path in paths}
    found = []
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal():
            continue
        for fd in ("1", "2"):
            try:
                target = str((directory / "fd" / fd).readlink())
            except OSError:
                break
            if target.removesuffix(" (deleted)") in wanted:
                pid = int(directory.name)
                started = start_time(pid)
                if started is not None:
                    found.append(ProcessId(pid, started))
                break
    return found
