"""The numbers of Linux's system calls, which each processor architecture of a host has of its own.

What guests are like is in rayos_vmm/qemu/arch; this is about the machine that the service runs on.
"""

from __future__ import annotations

import errno
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class SystemCalls:
    """One architecture's. `audit` is its word in `struct seccomp_data` (linux/audit.h, AUDIT_ARCH_*).

    A number of `foreign_from` and above is of another calling convention, which a filter refuses.
    """

    audit: int
    foreign_from: int
    numbers: Mapping[str, int]


#: asm/unistd_64.h; x32 has bit 30.
X86_64: Final = SystemCalls(
    audit=0xC000003E,
    foreign_from=0x40000000,
    numbers={
        "read": 0,
        "write": 1,
        "open": 2,
        "close": 3,
        "stat": 4,
        "fstat": 5,
        "lstat": 6,
        "poll": 7,
        "lseek": 8,
        "mmap": 9,
        "mprotect": 10,
        "munmap": 11,
        "brk": 12,
        "rt_sigaction": 13,
        "rt_sigprocmask": 14,
        "rt_sigreturn": 15,
        "ioctl": 16,
        "pwrite64": 18,
        "readv": 19,
        "writev": 20,
        "access": 21,
        "sched_yield": 24,
        "mremap": 25,
        "madvise": 28,
        "dup": 32,
        "getpid": 39,
        "sendto": 44,
        "recvfrom": 45,
        "sendmsg": 46,
        "recvmsg": 47,
        "shutdown": 48,
        "getsockname": 51,
        "getpeername": 52,
        "socketpair": 53,
        "setsockopt": 54,
        "getsockopt": 55,
        "exit": 60,
        "wait4": 61,
        "fcntl": 72,
        "fsync": 74,
        "fdatasync": 75,
        "ftruncate": 77,
        "getcwd": 79,
        "rename": 82,
        "unlink": 87,
        "readlink": 89,
        "sigaltstack": 131,
        "pivot_root": 155,
        "gettid": 186,
        "futex": 202,
        "restart_syscall": 219,
        "clock_gettime": 228,
        "clock_nanosleep": 230,
        "exit_group": 231,
        "epoll_wait": 232,
        "epoll_ctl": 233,
        "waitid": 247,
        "openat": 257,
        "newfstatat": 262,
        "fallocate": 285,
        "accept4": 288,
        "eventfd2": 290,
        "epoll_create1": 291,
        "seccomp": 317,
        "getrandom": 318,
        "memfd_create": 319,
        "preadv2": 327,
        "pwritev2": 328,
        "statx": 332,
        "pidfd_send_signal": 424,
        "io_uring_enter": 426,
        "pidfd_open": 434,
    },
)

_TABLES: Final = {"x86_64": X86_64}


def system_calls() -> SystemCalls:
    """This machine's. Errors: OSError (ENOSYS) when there is no table for it."""
    machine = platform.machine()
    if machine not in _TABLES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    return _TABLES[machine]
