"""Landlock, by three system calls: what files a process may still reach, for itself and all it starts.

A ruleset names every right that the running kernel knows; what no rule gives back is gone. Rights can only shrink.
Source: landlock(7), Documentation/userspace-api/landlock.rst (ABI 1 to 7). The numbers are the same on every machine.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Sequence
from typing import Final

_CREATE_RULESET: Final = 444
_ADD_RULE: Final = 445
_RESTRICT_SELF: Final = 446
_CREATE_RULESET_VERSION: Final = 1
_RULE_PATH_BENEATH: Final = 1

#: From here on it covers files, TCP, signals and abstract sockets.
WHOLE_ABI: Final = 6

EXECUTE: Final = 1 << 0
WRITE_FILE: Final = 1 << 1
READ_FILE: Final = 1 << 2
READ_DIR: Final = 1 << 3
REMOVE_FILE: Final = 1 << 5
MAKE_REG: Final = 1 << 8
REFER: Final = 1 << 13
TRUNCATE: Final = 1 << 14
IOCTL_DEV: Final = 1 << 15

#: What a rule on a file, not a directory, may hold.
_OF_FILES: Final = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV

#: ABI -> every file right it knows: 13, then REFER, TRUNCATE and (ABI 5) IOCTL_DEV.
_FILE_RIGHTS: Final = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_ALL_FILE_RIGHTS: Final = (1 << 16) - 1
_TCP_BIND_AND_CONNECT: Final = 0b11  # ABI 4
_SCOPE_ABSTRACT_UNIX: Final = 0b01  # ABI 6
_SCOPE_SIGNAL: Final = 0b10

#: handled_access_fs, handled_access_net, scoped
_RULESET: Final = struct.Struct("=QQQ")
#: allowed_access, parent_fd; packed
_PATH_BENEATH: Final = struct.Struct("=Qi")

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    result = _libc.syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return int(result)


def abi() -> int:
    """The kernel's Landlock version, 0 when it has none."""
    try:
        return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_CREATE_RULESET_VERSION))
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
            return 0
        raise


def restrict(rules: Sequence[tuple[int, int]] = (), *, scopes_signals: bool = True) -> str:
    """Give up every right on files but those of `rules`, all TCP, and signals and abstract sockets to outside.

    Args:
        scopes_signals: false for a process that has to end one which it started before.
        rules: (an O_PATH descriptor, the rights on it and what is beneath it); a right the kernel does not know
            is left out, as it does not restrict it either.

    Returns:
        What was restricted, for people. Needs no_new_privs.

    Raises:
        OSError: ENOSYS when the kernel has no Landlock.
    """
    version = abi()
    if version == 0:
        raise OSError(errno.ENOSYS, "the kernel has no Landlock")
    handled = _FILE_RIGHTS.get(version, _ALL_FILE_RIGHTS)
    net = _TCP_BIND_AND_CONNECT if version >= 4 else 0
    scoped = (_SCOPE_ABSTRACT_UNIX | (_SCOPE_SIGNAL if scopes_signals else 0)) if version >= 6 else 0
    size = _RULESET.size if version >= 6 else 16 if version >= 4 else 8
    attributes = _RULESET.pack(handled, net, scoped)[:size]
    ruleset = _call(_CREATE_RULESET, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    try:
        for fd, rights in rules:
            beneath = _PATH_BENEATH.pack(rights & handled, fd)
            _call(
                _ADD_RULE,
                ctypes.c_int(ruleset),
                ctypes.c_int(_RULE_PATH_BENEATH),
                beneath,
                ctypes.c_uint32(0),
            )
        _call(_RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)
    parts = ["files"] + ["TCP"] * bool(net) + ["abstract sockets"] * bool(scoped)
    parts += ["signals"] * bool(scoped & _SCOPE_SIGNAL)
    return f"ABI {version}: {', '.join(parts)}"


def rights_on(path: str, rights: int) -> tuple[int, int]:
    """A rule for `path`: rights that only directories have are left out for a file. Close the descriptor later."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    is_directory = (os.fstat(fd).st_mode & 0o170000) == 0o040000
    return fd, rights if is_directory else rights & _OF_FILES
