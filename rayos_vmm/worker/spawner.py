"""Starts keepers in a few milliseconds each, by forking a parent that has the whole worker's code loaded.

A fresh Python costs 150 ms and 20 MiB for each VM, a fork of this one a few milliseconds and the pages it writes. The
parent runs no loop and no thread, holds no secret and no descriptor of a VM, and ends when the service's end of
its socket closes; keepers are in sessions of their own and live on.

One packet starts one keeper: it brings the descriptors that the spec names, behind three more: the spec, what becomes
standard error, and the keeper's end of a socket on which it says one line: that it is ready, or why not. It then waits
for a byte: when the service has closed its end by then, nobody wants the keeper any more and it ends.

When a keeper ends, the parent says how: one packet with its pid and its status (minus the signal's number).

All keepers of a service, and their workers, have the same layout of addresses: see docs/threat-model.md.
"""

from __future__ import annotations

import array
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import msgspec

from rayos_vmm.shared import packet
from rayos_vmm.shared.spec import WorkerSpec
from rayos_vmm.worker import sandbox
from rayos_vmm.worker.keeper import Keeper

log = logging.getLogger(__name__)

#: linux/net/scm.h: descriptors of one message.
MAX_DESCRIPTORS: Final = 253

# Made once, before any fork: working out what the fields may hold writes over a megabyte.
_decode = msgspec.json.Decoder(WorkerSpec).decode


@contextmanager
def open_request(
    spec: WorkerSpec, log_fd: int, word_fd: int, others: Sequence[int] = ()
) -> Iterator[tuple[bytes, Any]]:
    """A packet and its ancillary data, to be sent (sendmsg) while the context lasts.

    Args:
        others: descriptors that the keeper shall hold beside those of the spec.

    Raises:
        ValueError: the spec has more descriptors than one message takes.
    """
    numbers = spec.fds
    with os.fdopen(os.memfd_create("rayos-worker-spec", os.MFD_CLOEXEC), "wb", buffering=0) as file:
        sent = [file.fileno(), log_fd, word_fd, *numbers, *others]
        if len(sent) > MAX_DESCRIPTORS:
            raise ValueError(f"{len(sent)} descriptors exceed {MAX_DESCRIPTORS}")
        file.writelines([msgspec.json.encode(spec)])
        yield (
            packet.encode({"fds": numbers}),
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", sent))],
        )


def _serve(sock: socket.socket) -> None:
    """Fork a keeper for each packet and tell how each ends, until the other end closes."""
    children: dict[int, int] = {}  # pid by pidfd
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd in children:
                poll.unregister(fd)
                _bury(sock, children.pop(fd))
                os.close(fd)
                continue
            pid = _fork_keeper(sock, list(children))
            if pid is None:
                return
            if pid:
                pidfd = os.pidfd_open(pid)
                children[pidfd] = pid
                poll.register(pidfd, select.POLLIN)


def _bury(sock: socket.socket, pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    word = {"pid": pid, "status": os.waitstatus_to_exitcode(status)}
    with suppress(OSError):  # a service that does not listen learns less
        sock.send(msgspec.json.encode(word), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _fork_keeper(sock: socket.socket, others: list[int]) -> int | None:
    """The pid of the keeper that a packet asked for, 0 if there could be none, None at the end.

    `others` are descriptors that it must not have.
    """
    space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
    data, ancillary, _, _ = sock.recvmsg(packet.MAX_PACKET_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    if not data:
        return None
    fds = array.array("i")
    for _, _, content in ancillary:
        fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    try:
        pid = os.fork()
    except OSError as error:
        os.write(fds[2], msgspec.json.encode({"error": f"fork: {error.strerror}"}) + b"\n")
        return 0
    else:
        if pid == 0:
            sock.close()
            for fd in others:
                os.close(fd)
            _run_keeper(data, list(fds))
        return pid
    finally:
        for fd in fds:
            os.close(fd)


def _run_keeper(data: bytes, fds: list[int]) -> None:
    """Become the keeper of one VM. Does not return."""
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        spec_fd, log_fd, word_fd, *rest = fds
        os.dup2(log_fd, 2)
        os.close(log_fd)
        head, _ = packet.decode(data)
        with os.fdopen(spec_fd, "rb") as file:
            file.seek(0)
            spec = _decode(file.read())
        spec = spec.with_fds(dict(zip(head["fds"], rest, strict=False)))
        Keeper(spec).run(_word(word_fd))
        code = 0
    except BrokenPipeError:
        log.warning("the service did not wait for this keeper")
    except BaseException:  # the supervisor's boundary: a child must never fall back into the parent's loop
        log.exception("keeper died of an error of ours")
    finally:
        os._exit(code)


def _word(fd: int) -> Callable[[], None]:
    """Says on the socket `fd` that the keeper serves."""
    kept = []

    def ready() -> None:
        sock = socket.socket(fileno=fd)
        sock.sendall(msgspec.json.encode({"pid": os.getpid()}) + b"\n")
        if not sock.recv(1):
            kept.append(sock)  # its end tells that nothing is left of us, so it comes with our own
            raise BrokenPipeError
        sock.close()

    return ready


def main() -> int:
    """The parent's whole life; its argument is the number of its socket."""
    sandbox.prepare()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(message)s", stream=sys.stderr)
    logging.Formatter.converter = time.gmtime
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the service's to answer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    gc.collect()
    gc.freeze()  # no collection writes into pages that are shared with every child
    with socket.socket(fileno=int(sys.argv[1])) as sock:
        _serve(sock)
    return 0
