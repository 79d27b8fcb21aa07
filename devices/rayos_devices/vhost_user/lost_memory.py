"""Guest memory whose file was cut off under us costs one session, and not the process.

The service's own guests have sealed memory, which cannot shrink. Other VMMs (DPDK, crosvm, Cloud Hypervisor, User Mode
Linux, QEMU's memory-backend-file) share files without seals. Whoever may truncate such a file makes every access behind
its new end a SIGBUS (mmap(2)), which ends a process. Here a page of zeros takes the lost page's place, the access goes
on, and the loop ends the session that had the page.

A system call that meets such a page fails with EFAULT, which is an error of the one request. Pages of hugetlbfs cannot
be replaced one by one: there SIGBUS ends the process as before.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections import deque
from collections.abc import Callable
from typing import Final

from rayos_devices.loop import Loop

#: asm-generic/siginfo.h: nothing is mapped at the address; and where the code and the address are in a siginfo_t.
_BUS_ADRERR: Final = 2
_CODE_OFFSET: Final = 8
_ADDRESS_OFFSET: Final = 16
_SA_SIGINFO: Final = 4
_SIG_DFL: Final = 0
_MAP_FIXED: Final = 0x10
_FAILED: Final = ctypes.c_void_p(-1).value
_HANDLER: Final = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


class _Action(ctypes.Structure):
    """struct sigaction of glibc on every 64-bit Linux."""

    _fields_ = (
        ("handler", _HANDLER),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


class LostMemory:
    """Replaces lost pages from now until `close`, and calls `on_loss(address)` on the loop for each."""

    def __init__(self, loop: Loop, on_loss: Callable[[int], None]) -> None:
        self._loop = loop
        self._on_loss = on_loss
        self._lost: deque[int] = deque()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._libc = ctypes.CDLL(None)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self._libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        self._before = _Action()
        self._action = _Action(handler=_HANDLER(self._fault), flags=_SA_SIGINFO)
        loop.register(self._fd, self._tell)
        self._libc.sigaction(signal.SIGBUS, ctypes.byref(self._action), ctypes.byref(self._before))

    def _fault(self, number: int, info: int, _context: int) -> None:
        """Runs inside the access itself: with the interpreter's lock, and never inside its allocator."""
        code = ctypes.c_int.from_address(info + _CODE_OFFSET).value
        address = ctypes.c_uint64.from_address(info + _ADDRESS_OFFSET).value
        page = address & ~(mmap.PAGESIZE - 1)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        if code != _BUS_ADRERR or self._libc.mmap(page, mmap.PAGESIZE, protection, flags, -1, 0) == _FAILED:
            self._libc.signal(number, _SIG_DFL)  # the access is done again, and ends the process
            return
        self._lost.append(address)
        os.eventfd_write(self._fd, 1)

    def _tell(self, _events: int) -> None:
        os.eventfd_read(self._fd)
        while self._lost:
            self._on_loss(self._lost.popleft())

    def close(self) -> None:
        self._libc.sigaction(signal.SIGBUS, ctypes.byref(self._before), None)
        self._loop.unregister(self._fd)
        os.close(self._fd)
