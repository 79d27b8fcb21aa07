"""swtpm, one process per VM: started in a session of its own, checked before QEMU meets it, found again.

The control socket is bound here and inherited, so it can be connected to as soon as start_swtpm returns.
Before that the state is opened once (TPM_Init), so that damaged, locked or foreign state refuses the
start of the VM instead of failing inside it; a fresh TPM gets its SHA-256 bank on the way. QEMU's own
TPM_Init then starts from reset. swtpm ends when QEMU ends (SHUTDOWN) or on stop_swtpm.
"""

from __future__ import annotations

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from tpm import command, control, state
from tpm.emulator import Emulator
from tpm.errors import CommandFailed, MissingSwtpm, StateError, TpmError, Unavailable
from tpm.process import Process, spawn
from tpm.qemu import check_socket_path

KEY_SIZE: Final = 32  # AES-256
_LOG_TAIL: Final = 4096
_PROGRAM_PATH: Final = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, slots=True)
class SwtpmProcess:
    """A running swtpm. Store pid and started: SwtpmProcess(...) again attaches a new service to it."""

    pid: int
    started: int
    control: Path

    @property
    def process(self) -> Process:
        """The process, for is_alive(), wait() (until its end) and stop()."""
        return Process(self.pid, self.started)


def find_swtpm() -> str:
    """The swtpm program's path; MissingSwtpm with the package's name when there is none."""
    program = shutil.which("swtpm", path=_PROGRAM_PATH)
    if program is None:
        raise MissingSwtpm(
            "swtpm is not installed; install it (Debian: apt install swtpm) or start the VM without TPM"
        )
    return program


def spawn_swtpm(
    directory: Path, *, channel: str, sock: socket.socket, key: bytes | None, log: Path | None
) -> Process:
    """Start the program on a prepared state directory.

    channel: "fd" when sock listens for control connections, "clientfd" when it is one.
    key: 32 bytes that encrypt the state; they travel through a pipe, never in arguments.
    """
    if "," in str(directory):
        raise StateError(
            f"the TPM state directory {directory} has a comma in its name, which swtpm cannot take"
        )
    if key is not None and len(key) != KEY_SIZE:
        raise ValueError(f"a state key of {len(key)} bytes; AES-256 needs {KEY_SIZE}")
    opened: list[int] = []
    try:
        opened.append(os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC))
        target = opened[0]
        if log is not None:
            target = os.open(
                log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            opened.append(target)
        descriptors = {0: opened[0], 1: target, 2: target, 3: sock.fileno()}
        argv = [find_swtpm(), "socket", "--tpm2", "--tpmstate", f"dir={directory},mode=0600",
                "--ctrl", f"type=unixio,{channel}=3", "--seccomp", "action=kill"]  # fmt: skip
        if channel == "clientfd":
            argv.append("--terminate")
        if key is not None:
            read_end, write_end = os.pipe2(os.O_CLOEXEC)
            opened.append(read_end)
            with os.fdopen(write_end, "wb") as pipe:
                pipe.write(key)
            descriptors[4] = read_end
            argv += ["--key", "fd=4,mode=aes-256-cbc,format=binary"]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TPM_")}
        return spawn(argv, descriptors=descriptors, environ=environ | {"LC_ALL": "C"})
    finally:
        for descriptor in opened:
            os.close(descriptor)


def log_tail(log: Path | None) -> str:
    """The last two lines that swtpm logged, as ": text", or nothing."""
    if log is None:
        return ""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return ""
    return ": " + "; ".join(line.strip() for line in lines[-2:]) if lines else ""


async def initialize(emulator: Emulator, directory: Path, log: Path | None) -> None:
    """The first TPM_Init of this process, with the reasons for which state is refused spelled out."""
    try:
        await emulator.order(control.init())
    except (CommandFailed, Unavailable):
        raise StateError(
            f"the TPM state in {directory} cannot be read: it is damaged, truncated or has another key"
            f"{log_tail(log)}"
        ) from None


async def provision(emulator: Emulator) -> None:
    """Give a fresh TPM its SHA-256 bank and no other; leaves it stopped."""
    await emulator.run(command.Code.Startup, command.startup())
    await emulator.run(command.Code.PCR_Allocate, command.pcr_allocate_sha256())
    await emulator.run(command.Code.Shutdown, command.shutdown())


async def start_swtpm(
    state_dir: Path,
    control_path: Path,
    log: Path | None,
    *,
    vm_uuid: str,
    key: bytes | None = None,
) -> SwtpmProcess:
    """Start the TPM of one VM and return it, ready for QEMU.

    state_dir: made when missing, mode 0700; the TPM's identity, worth a backup.
    control_path: where the control socket appears (replaced when it is a leftover).
    log: swtpm's messages are appended here; None drops them.
    key: 32 bytes, encrypts the state at rest; the same key must come each time.
    The caller stops it with stop_swtpm. After an error or cancellation nothing is left running.
    MissingSwtpm: no program. StateError: a symlink, another VM's, damaged, locked by another swtpm.
    """
    fresh = state.prepare(state_dir)
    record = state.Record(vm_uuid) if fresh else state.read_record(state_dir, vm_uuid)
    if fresh:
        state.begin(state_dir)
    swtpm = _listen(state_dir, control_path, log, key)
    try:
        await _prove(swtpm, state_dir, log, is_fresh=fresh)
    except BaseException:
        with trio.CancelScope(shield=True):
            await stop_swtpm(swtpm)
        raise
    if fresh:
        state.finish(state_dir, record)
    return swtpm


def _listen(directory: Path, path: Path, log: Path | None, key: bytes | None) -> SwtpmProcess:
    check_socket_path(path).unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        try:
            path.chmod(0o600)
            listener.listen(1)
            process = spawn_swtpm(directory, channel="fd", sock=listener, key=key, log=log)
        except BaseException:
            path.unlink()
            raise
    return SwtpmProcess(process.pid, process.started, path)


async def _prove(swtpm: SwtpmProcess, directory: Path, log: Path | None, *, is_fresh: bool) -> None:
    connection = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    emulator = Emulator(connection)
    try:
        await connection.connect(str(swtpm.control))
        await emulator.open_data()
        await initialize(emulator, directory, log)
        if is_fresh:
            await provision(emulator)
        await emulator.order(control.Request(control.Control.STOP))
    except (OSError, Unavailable) as error:
        ended = swtpm.process.reap()
        raise TpmError(f"swtpm did not start ({ended or error}){log_tail(log)}") from None
    finally:
        emulator.close()


async def stop_swtpm(swtpm: SwtpmProcess) -> None:
    """End a swtpm and remove its socket; its state stays. Safe to call again."""
    await swtpm.process.stop()
    await trio.Path(swtpm.control).unlink(missing_ok=True)


def is_ours(swtpm: SwtpmProcess) -> bool:
    """Whether a recorded swtpm still runs and its socket is there: then a new service may use it."""
    return swtpm.process.is_alive() and swtpm.control.is_socket()
