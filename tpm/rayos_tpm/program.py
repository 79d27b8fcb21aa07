"""The swtpm program: how it is started on a state directory, and what its refusals mean.

It gets one connected control socket and ends when that closes. Its state is opened once (TPM_Init) before
QEMU meets it, so that damaged, locked or foreign state refuses the start of the VM instead of failing in it.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rayos_tpm import control
from rayos_tpm.emulator import Emulator
from rayos_tpm.errors import CommandFailed, MissingSwtpm, StateError, Unavailable
from rayos_tpm.process import Process, spawn

KEY_SIZE: Final = 32  # AES-256
_LOG_TAIL: Final = 4096
LOG_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
_PROGRAM_PATH: Final = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def find_swtpm() -> str:
    """The swtpm program's path; MissingSwtpm with the package's name when there is none."""
    program = shutil.which("swtpm", path=_PROGRAM_PATH)
    if program is None:
        raise MissingSwtpm(
            "swtpm is not installed; install it (Debian: apt install swtpm) or start the VM without TPM"
        )
    return program


def spawn_swtpm(
    directory: Path, *, sock: socket.socket, key: bytes, log: Path, launcher: Sequence[str] = ()
) -> Process:
    """Start the program on a prepared state directory.

    sock: swtpm's end of the control connection; it ends when the other end closes.
    key: 32 bytes that encrypt the state; they travel through a pipe, never in arguments.
    log: swtpm's messages are appended here.
    launcher: an absolute path and arguments that the command line is appended to; it executes that in the end.
    MissingSwtpm: no program. StateError: a directory that swtpm's option syntax cannot name.
    """
    if "," in str(directory):
        raise StateError(
            f"the TPM state directory {directory} has a comma in its name, which swtpm cannot take"
        )
    if len(key) != KEY_SIZE:
        raise ValueError(f"a state key of {len(key)} bytes; AES-256 needs {KEY_SIZE}")
    program = find_swtpm()
    opened: list[int] = []
    try:
        opened.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
        opened.append(os.open(log, LOG_FLAGS, 0o600))
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        opened.append(read_end)
        with os.fdopen(write_end, "wb") as pipe:
            pipe.write(key)
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TPM_")}
        return spawn(
            [*launcher, program, "socket", "--tpm2", "--terminate", "--tpmstate", f"dir={directory},mode=0600",
             "--ctrl", "type=unixio,clientfd=3", "--key", "fd=4,mode=aes-256-cbc,format=binary",
             "--seccomp", "action=kill"],
            descriptors={0: opened[0], 1: opened[1], 2: opened[1], 3: sock.fileno(), 4: read_end},
            environ=environ | {"LC_ALL": "C"},
        )  # fmt: skip
    finally:
        for descriptor in opened:
            os.close(descriptor)


def log_tail(log: Path) -> str:
    """The last two lines that swtpm logged, as ": text", or nothing."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return ": " + "; ".join(line.strip() for line in lines[-2:]) if lines else ""


async def initialize(emulator: Emulator, directory: Path, log: Path) -> None:
    """The first TPM_Init of this process, with the reasons for which state is refused spelled out."""
    try:
        await emulator.order(control.init())
    except (CommandFailed, Unavailable):
        raise StateError(
            f"the TPM state in {directory} cannot be read: it is damaged, truncated or has another key"
            f"{log_tail(log)}"
        ) from None
