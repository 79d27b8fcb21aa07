"""A disk image in a format of QEMU's (qcow2, vmdk, …), seen as a raw file that our own store serves, quotas and all.

    python -I -S raw_view.py --format qcow2 --image a.qcow2 --show disk0.raw   (standard input: a packet socket)

A qemu-storage-daemon reads the image and shows it by FUSE; no format is parsed here, and none is guessed: a raw disk
may hold whatever its guest wrote. The daemon has a root with the image, its program and /dev/fuse, no network and two
capabilities, CAP_SYS_ADMIN (it mounts) and CAP_DAC_OVERRIDE. Its mount is seen in its namespace alone, so the
descriptor of the raw file is sent over the socket. It lives while somebody holds the other end of that socket: the
machine's keeper.
"""

from __future__ import annotations

import argparse
import array
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if __name__ == "__main__":  # isolated: our packages are not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rayos_vmm.host import privilege
from rayos_vmm.host.confine import Reach, build_root, program_directories

if TYPE_CHECKING:
    from rayos_vmm.hardware.protocols import DiskImage
    from rayos_vmm.host.process import Process

PROGRAM: Final = "qemu-storage-daemon"
#: Debian's name for where it is.
PACKAGE: Final = "qemu-system-common"
FUSE: Final = Path("/dev/fuse")
#: Seconds until the image must be shown, on a machine where many start.
START_TIMEOUT: Final = 30.0
#: Seconds that the daemon has to write what it holds of the image, and the process around it.
END_TIMEOUT: Final = 5.0
READER_GRACE_S: Final = END_TIMEOUT + 1.0
_LOOK_SECONDS: Final = 0.01
_PR_SET_PDEATHSIG: Final = 1


class ViewFailed(Exception):
    """The image cannot be shown; the text says why."""


# -- the service's side ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RawView:
    """An image that is shown: the raw file's descriptor, one that keeps it shown, and the process that shows it."""

    fd: int
    life_fd: int
    process: Process


async def open_raw_view(disk: DiskImage, show: Path, log: Path) -> RawView:
    """Show an image at `show` (a file of that name is made). All of what it returns is the caller's.

    Errors: ViewFailed with what the daemon said. Cancellation ends it.
    """
    import trio

    from rayos_vmm.host.process import spawn

    os.close(os.open(show, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    options = ["--format", disk.format, "--image", str(disk.path), "--show", str(show)]
    options += ["--read-only"] if disk.is_read_only else []
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    life = trio.socket.from_stdlib_socket(ours)
    process = None
    try:
        with theirs, log.open("ab") as file:
            start = file.tell()
            process = spawn(
                [sys.executable, "-I", "-S", __file__, *options],
                input_fd=theirs.fileno(),
                output_fd=file.fileno(),
            )
        with trio.move_on_after(START_TIMEOUT + 1.0):
            _, ancillary, _, _ = await life.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
            for _, _, content in ancillary:
                shown = RawView(int(array.array("i", content[:4])[0]), os.dup(life.fileno()), process)
                process = None
                return shown
    finally:
        life.close()
        if process is not None:
            await process.end(grace_s=READER_GRACE_S)
            process.close()
    words = _said(log, start)
    raise ViewFailed(
        f"{disk.path} cannot be read as {disk.format}: {words[-1] if words else 'no reason given'}"
    )


def _said(log: Path, start: int) -> list[str]:
    return log.read_bytes()[start:].decode(errors="replace").strip().splitlines()


# -- the program -----------------------------------------------------------------------------------------------------


def _arguments(program: str, options: argparse.Namespace) -> list[str]:
    file = {"driver": "file", "node-name": "file", "filename": options.image, "discard": "unmap"}
    image = {"driver": options.format, "node-name": "image", "file": "file", "discard": "unmap"}
    for node in (file, image):
        node["read-only"] = options.read_only
    export = {
        "type": "fuse",
        "id": "raw",
        "node-name": "image",
        "mountpoint": options.show,
        "writable": not options.read_only,
        "allow-other": "on",  # the worker is another user
    }
    nodes = [word for node in (file, image) for word in ("--blockdev", json.dumps(node))]
    return [program, *nodes, "--export", json.dumps(export)]


def _confine(program: str, options: argparse.Namespace) -> None:
    image, show = Path(options.image), Path(options.show)
    readable = [*program_directories([program]), *([image] if options.read_only else [])]
    writable = [show, *([] if options.read_only else [image])]
    privilege.unshare(privilege.CLONE_NEWNET | privilege.CLONE_NEWIPC | privilege.CLONE_NEWUTS)
    build_root(Reach(readable, writable, devices=[FUSE]), 0)
    kept = (privilege.CAP_SYS_ADMIN, privilege.CAP_DAC_OVERRIDE)
    privilege.drop_bounding_set(*kept)
    privilege.keep_capabilities(*kept)
    privilege.no_new_privileges()


def _start(argv: Sequence[str]) -> int:
    """The daemon's pid; it ends when we do."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    nothing, _ = os.pipe()  # there is no /dev/null
    os.dup2(nothing, 0)
    if os.getppid() == parent:
        os.execv(argv[0], list(argv))
    os._exit(1)


def _open_shown(options: argparse.Namespace, pidfd: int) -> int:
    """The raw file, when it is there: it takes the place of an empty one."""
    deadline = time.monotonic() + START_TIMEOUT
    shown = Path(options.show)
    empty = shown.stat().st_dev
    while shown.stat().st_dev == empty:
        if select.select([pidfd], [], [], _LOOK_SECONDS)[0] or time.monotonic() > deadline:
            return -1
    return os.open(options.show, os.O_RDONLY if options.read_only else os.O_RDWR)


def _serve(life: socket.socket, argv: Sequence[str], options: argparse.Namespace) -> int:
    """Until the other end of `life` is closed by all, or a SIGTERM; the daemon's status if it ended before that."""
    ended, told = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.signal(signal.SIGTERM, lambda *_: os.write(told, b"\0"))
    pid = _start(argv)
    pidfd = os.pidfd_open(pid)
    fd = _open_shown(options, pidfd)
    if fd >= 0:
        life.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
        os.close(fd)
        select.select([life.fileno(), pidfd, ended], [], [])
    if not select.select([pidfd], [], [], 0)[0]:
        # It writes what it knows of the image's format, and ends.
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        if not select.select([pidfd], [], [], END_TIMEOUT)[0]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        os.waitpid(pid, 0)
        return 0
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(arguments: Sequence[str]) -> int:
    """Ends as its daemon did: also by the same signal, so that whoever waits for this process learns of it."""
    parser = argparse.ArgumentParser(prog="raw_view")
    for name in ("--format", "--image", "--show"):
        parser.add_argument(name, required=True)
    parser.add_argument("--read-only", action="store_true")
    options = parser.parse_args(arguments)
    try:
        with socket.socket(fileno=os.dup(0)) as life:
            program = shutil.which(PROGRAM)
            if program is None:
                raise OSError(f"{PROGRAM} is not installed (apt-get install {PACKAGE})")
            _confine(program, options)
            status = _serve(life, _arguments(program, options), options)
    except OSError as error:
        print(f"raw_view: {error}", file=sys.stderr, flush=True)
        return 1
    if status < 0:
        print(f"raw_view: {PROGRAM} died of signal {-status}", file=sys.stderr, flush=True)
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
