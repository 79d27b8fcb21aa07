"""The system calls a device worker may make: a filter in the kernel's BPF, by ctypes alone.

Everything that is not listed kills the process. Opening and looking up names fails with ENOENT instead, so that
Python's late look-ups (a traceback that wants its source line) stay soft. Every listed call is made by the device
suites, or stands with its reason. Source: seccomp(2), linux/filter.h; numbers of x86-64 (asm/unistd_64.h).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal

#: What the filter does with a call that is not listed. "trap" names the call on standard error, then the process ends.
Action = Literal["kill", "trap"]

#: Calls that are allowed with any argument; the hottest first, since the filter tries one after the other.
ALLOWED: Final[dict[str, int]] = {
    "epoll_wait": 232,
    "read": 0,
    "write": 1,
    "preadv2": 327,
    "pwritev2": 328,
    "readv": 19,
    "writev": 20,
    "io_uring_enter": 426,
    "recvmsg": 47,
    "sendmsg": 46,
    "recvfrom": 45,
    "sendto": 44,
    "epoll_ctl": 233,
    "clock_gettime": 228,
    "futex": 202,
    "lseek": 8,
    "fstat": 5,
    "newfstatat": 262,  # fstat of newer C libraries; a path finds an empty root
    "fdatasync": 75,
    "fallocate": 285,
    "brk": 12,
    "munmap": 11,
    "mremap": 25,
    "madvise": 28,
    "close": 3,
    "fcntl": 72,
    "dup": 32,
    "accept4": 288,
    "getsockname": 51,
    "getpeername": 52,
    "getsockopt": 55,
    "setsockopt": 54,
    "shutdown": 48,
    "poll": 7,
    "memfd_create": 319,  # a screenshot's pixels
    "ftruncate": 77,
    "rt_sigaction": 13,
    "rt_sigprocmask": 14,
    "rt_sigreturn": 15,
    "restart_syscall": 219,
    "sigaltstack": 131,
    "getpid": 39,
    "gettid": 186,
    "getrandom": 318,
    "clock_nanosleep": 230,
    "sched_yield": 24,
    "exit": 60,
    "exit_group": 231,
}
#: Names of files: there are none.
NOT_FOUND: Final[dict[str, int]] = {
    "open": 2,
    "openat": 257,
    "stat": 4,
    "lstat": 6,
    "access": 21,
    "readlink": 89,
    "statx": 332,
    "getcwd": 79,
}
#: Memory is never executable.
NO_EXEC: Final[dict[str, int]] = {"mmap": 9, "mprotect": 10}
IOCTL: Final = 16
#: asm-generic/ioctls.h: FIONBIO (setblocking), TCGETS (is a file a terminal?);
#: linux/if_tun.h: TUNSETOFFLOAD, TUNSETQUEUE.
IOCTLS: Final = (0x5421, 0x5401, 0x400454D0, 0x400454D9)

#: How many calls can succeed.
COUNT: Final = len(ALLOWED) + len(NO_EXEC) + 1

_AUDIT_ARCH_X86_64: Final = 0xC000003E
_X32_BIT: Final = 0x40000000
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
_SECCOMP: Final = 317
_PR_SET_NO_NEW_PRIVS: Final = 38

_libc = ctypes.CDLL(None, use_errno=True)


def program(action: Action = "kill", more: Mapping[str, int] = MappingProxyType({})) -> bytes:
    """The filter, as an array of `struct sock_filter`; the calls in `more` are allowed as well."""
    not_found = {name: number for name, number in NOT_FOUND.items() if name not in more}
    refuse = _RET_KILL_PROCESS if action == "kill" else _RET_TRAP
    code: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, _AT_ARCH),
        (_JUMP_EQUAL, 1, 0, _AUDIT_ARCH_X86_64),
        (_RETURN, 0, 0, _RET_KILL_PROCESS),
        (_LOAD, 0, 0, _AT_NUMBER),
        (_JUMP_AT_LEAST, 0, 1, _X32_BIT),
        (_RETURN, 0, 0, _RET_KILL_PROCESS),
    ]
    # Each list is a run of comparisons that jump to the answer behind it.
    for numbers, answer in (
        ([*ALLOWED.values(), *more.values()], _RET_ALLOW),
        (list(not_found.values()), _RET_ERRNO | errno.ENOENT),
    ):
        code += _any_of(numbers, [(_RETURN, 0, 0, answer)])
    test = [(_LOAD, 0, 0, _argument(2)), (_JUMP_BITS, 0, 1, _PROT_EXEC), (_RETURN, 0, 0, refuse)]
    code += _any_of(list(NO_EXEC.values()), [*test, (_RETURN, 0, 0, _RET_ALLOW)])
    test = [(_LOAD, 0, 0, _argument(1)), *_any_of(IOCTLS, [(_RETURN, 0, 0, _RET_ALLOW)])]
    code += _any_of([IOCTL], [*test, (_RETURN, 0, 0, refuse)])
    code.append((_RETURN, 0, 0, refuse))
    return b"".join(_INSTRUCTION.pack(*instruction) for instruction in code)


def _argument(index: int) -> int:
    return _AT_ARGUMENTS + 8 * index


def _any_of(numbers: Sequence[int], then: list[tuple[int, int, int, int]]) -> list[tuple[int, int, int, int]]:
    """`then` if what was loaded is one of the numbers; else what follows."""
    last = len(numbers) - 1
    tests = [(_JUMP_EQUAL, last - at, 0, number) for at, number in enumerate(numbers[:-1])]
    return [*tests, (_JUMP_EQUAL, 0, len(then), numbers[-1]), *then]


def check_machine() -> None:
    """Errors: OSError (ENOSYS) when the numbers above are not this machine's."""
    if platform.machine() != "x86_64":
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()}")


def install(action: Action = "kill", more: Mapping[str, int] = MappingProxyType({})) -> str:
    """Apply the filter to this process, for ever. Sets no_new_privs. Returns what it does, for people.

    Args:
        more: calls that are allowed beside those of a device worker, by name.

    Raises:
        OSError: the kernel refused, or this is another machine than x86-64.
    """
    check_machine()
    filter_ = program(action, more)
    buffer = ctypes.create_string_buffer(filter_, len(filter_))
    # struct sock_fprog: the count, padding, a pointer
    header = struct.pack("=H6xQ", len(filter_) // _INSTRUCTION.size, ctypes.addressof(buffer))
    if action == "trap":
        _name_refused_calls()
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 or (
        _libc.syscall(ctypes.c_long(_SECCOMP), ctypes.c_uint(_SET_MODE_FILTER), ctypes.c_uint(0), header) != 0
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
