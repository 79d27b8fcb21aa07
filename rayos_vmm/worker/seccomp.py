"""The system calls a device worker may make: a filter in the kernel's BPF, by ctypes alone.

Everything that is not listed kills the process. Opening and looking up names fails with ENOENT instead, so that
Python's late look-ups (a traceback that wants its source line) stay soft. Every listed call is made by the device
suites, or stands with its reason. Source: seccomp(2), linux/filter.h; numbers: host/system_calls.py.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Iterable, Sequence
from typing import Final, Literal

from rayos_vmm.host.system_calls import system_calls

#: What the filter does with a call that is not listed. "trap" names the call on standard error, then the process ends.
Action = Literal["kill", "trap"]

#: Calls that are allowed with any argument; the hottest first, since the filter tries one after the other.
ALLOWED: Final = (
    "epoll_wait",
    "read",
    "write",
    "preadv2",
    "pwritev2",
    "readv",
    "writev",
    "io_uring_enter",
    "recvmsg",
    "sendmsg",
    "recvfrom",
    "sendto",
    "epoll_ctl",
    "clock_gettime",
    "futex",
    "lseek",
    "fstat",
    "newfstatat",  # fstat of newer C libraries; a path finds an empty root
    "fdatasync",
    "fallocate",
    "brk",
    "munmap",
    "mremap",
    "madvise",
    "close",
    "fcntl",
    "dup",
    "accept4",
    "getsockname",
    "getpeername",
    "getsockopt",
    "setsockopt",
    "shutdown",
    "poll",
    "memfd_create",  # a screenshot's pixels
    "ftruncate",
    "rt_sigaction",
    "rt_sigprocmask",
    "rt_sigreturn",
    "restart_syscall",
    "sigaltstack",
    "getpid",
    "gettid",
    "getrandom",
    "clock_nanosleep",
    "sched_yield",
    "exit",
    "exit_group",
)
#: Names of files: there are none.
NOT_FOUND: Final = (
    "open",
    "openat",
    "stat",
    "lstat",
    "access",
    "readlink",
    "statx",
    "getcwd",
)
#: Memory is never executable.
NO_EXEC: Final = ("mmap", "mprotect")
IOCTL: Final = "ioctl"
#: asm-generic/ioctls.h: FIONBIO (setblocking), TCGETS (is a file a terminal?);
#: linux/if_tun.h: TUNSETOFFLOAD, TUNSETQUEUE.
IOCTLS: Final = (0x5421, 0x5401, 0x400454D0, 0x400454D9)

#: How many calls can succeed.
COUNT: Final = len(ALLOWED) + len(NO_EXEC) + 1

_PROT_EXEC: Final = 4

_RET_KILL_PROCESS: Final = 0x80000000
_RET_TRAP: Final = 0x00030000
_RET_ERRNO: Final = 0x00050000
_RET_ALLOW: Final = 0x7FFF0000

# linux/bpf_common.h: BPF_LD|W|ABS, BPF_JMP|JEQ|K, |JGE|K, |JSET|K, BPF_RET|K
_LOAD: Final = 0x20
_JUMP_EQUAL: Final = 0x15
_JUMP_AT_LEAST: Final = 0x35
_JUMP_BITS: Final = 0x45
_RETURN: Final = 0x06
# linux/seccomp.h, struct seccomp_data: nr, arch, instruction_pointer, args[6]; low halves come first.
_AT_NUMBER: Final = 0
_AT_ARCH: Final = 4
_AT_ARGUMENTS: Final = 16

_INSTRUCTION: Final = struct.Struct("=HBBI")
_SET_MODE_FILTER: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38

_libc = ctypes.CDLL(None, use_errno=True)


def program(action: Action = "kill", more: Sequence[str] = ()) -> bytes:
    """The filter, as an array of `struct sock_filter`; the calls in `more` are allowed as well.

    Errors: OSError (ENOSYS) on a machine whose numbers are not known.
    """
    calls = system_calls()

    def numbers(names: Iterable[str]) -> list[int]:
        return [calls.numbers[name] for name in names]

    refuse = _RET_KILL_PROCESS if action == "kill" else _RET_TRAP
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _AT_ARCH),
        (_JUMP_EQUAL, 1, 0, calls.audit),
        (_RETURN, 0, 0, _RET_KILL_PROCESS),
        (_LOAD, 0, 0, _AT_NUMBER),
        (_JUMP_AT_LEAST, 0, 1, calls.foreign_from),
        (_RETURN, 0, 0, _RET_KILL_PROCESS),
    ]
    # Each list is a run of comparisons that jump to the answer behind it.
    not_found = [name for name in NOT_FOUND if name not in more]
    for names, answer in (
        ((*ALLOWED, *more), _RET_ALLOW),
        (not_found, _RET_ERRNO | errno.ENOENT),
    ):
        code += _any_of(numbers(names), [(_RETURN, 0, 0, answer)])
    test = [(_LOAD, 0, 0, _argument(2)), (_JUMP_BITS, 0, 1, _PROT_EXEC), (_RETURN, 0, 0, refuse)]
    code += _any_of(numbers(NO_EXEC), [*test, (_RETURN, 0, 0, _RET_ALLOW)])
    test = [(_LOAD, 0, 0, _argument(1)), *_any_of(IOCTLS, [(_RETURN, 0, 0, _RET_ALLOW)])]
    code += _any_of(numbers([IOCTL]), [*test, (_RETURN, 0, 0, refuse)])
    code.append((_RETURN, 0, 0, refuse))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in code)


def _argument(index: int) -> int:
    return _AT_ARGUMENTS + 8 * index


def _any_of(numbers: Sequence[int], then: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """`then` if what was loaded is one of the numbers; else what follows."""
    last = len(numbers) - 1
    tests = [(_JUMP_EQUAL, last - at, 0, number) for at, number in enumerate(numbers[:-1])]
    return [*tests, (_JUMP_EQUAL, 0, len(then), numbers[-1]), *then]


def install(action: Action = "kill", more: Sequence[str] = ()) -> str:
    """Apply the filter to this process, for ever. Sets no_new_privs. Returns what it does, for people.

    Args:
        more: calls that are allowed beside those of a device worker, by name.

    Raises:
        OSError: the kernel refused, or this machine's numbers are not known.
    """
    filter_, number = program(action, more), system_calls().numbers["seccomp"]
    buffer = ctypes.create_string_buffer(filter_, len(filter_))
    # struct sock_fprog: the count, padding, a pointer
    header = struct.pack("=H6xQ", len(filter_) // _INSTRUCTION.size, ctypes.addressof(buffer))
    if action == "trap":
        _name_refused_calls()
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 or (
        _libc.syscall(ctypes.c_long(number), ctypes.c_uint(_SET_MODE_FILTER), ctypes.c_uint(0), header) != 0
    ):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return f"{COUNT + len(more)} system calls, anything else: {action}"


# -- diagnosis ---------------------------------------------------------------------------------------------------

#: siginfo_t: si_signo, si_errno, si_code, padding, _call_addr, then si_syscall and si_arch (sigaction(2)).
_SIGINFO: Final = struct.Struct("=iii4xQiI")
_SA_SIGINFO: Final = 4


def _report(number: int, info: int, _context: int) -> None:
    call = _SIGINFO.unpack(ctypes.string_at(info, _SIGINFO.size))[4]
    os.write(2, f"seccomp: system call {call} is not allowed here\n".encode())
    import faulthandler

    faulthandler.dump_traceback(2)
    os._exit(128 + number)


class _Sigaction(ctypes.Structure):
    """The C library's struct sigaction (x86-64)."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_byte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


_kept: list[object] = []  # the handler's machine code, for as long as the process lives


def _name_refused_calls() -> None:
    import faulthandler  # noqa: F401  (loaded while files can be opened)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_report)
    _kept.append(handler)
    action = _Sigaction(ctypes.cast(handler, ctypes.c_void_p), flags=_SA_SIGINFO)
    if _libc.sigaction(int(signal.SIGSYS), ctypes.byref(action), None) != 0:
        raise OSError(ctypes.get_errno(), "sigaction")
