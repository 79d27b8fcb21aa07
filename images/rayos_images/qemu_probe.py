"""Probes the abilities of a QEMU binary: it is started with the devices and asked over QMP; its version decides
nothing.

A type in the object model may not be creatable by a user (10.0's generic vhost-user device), and a creatable
one may refuse to start (7.2's gpu and input "require kvm"). So QEMU is started once, stopped at its first
instruction, with the vhost-user devices on the command line, each connected to a backend that answers the
questions of `realize` and nothing else. Only when that fails is each device tried alone.
"""

import json
import os
import socket
import struct
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rayos_images.errors import ImageError

TIMEOUT_S: Final = 20.0  # a start takes 0.1-0.5 s
CONSOLE_TYPE: Final = "vhost-user-test-device-pci"

# device type -> the rest of its -device argument; vhost-user-net is a netdev behind virtio-net-pci
VHOST_USER_DEVICES: Final[Mapping[str, str]] = {
    "vhost-user-blk-pci": "num-queues=1",
    "vhost-user-input-pci": "",
    "vhost-user-gpu-pci": "",
    "vhost-user-rng-pci": "",
    CONSOLE_TYPE: "virtio-id=3,num_vqs=8,config_size=12",  # 2 + 2 queues for each of 3 ports
}

# vhost-user message header: request, flags, payload size (QEMU docs/interop/vhost-user, "Header")
_HEADER: Final = struct.Struct("<III")
_VERSION, _REPLY, _NEED_REPLY = 0x1, 0x4, 0x8
_GET_FEATURES, _GET_PROTOCOL_FEATURES, _GET_QUEUE_NUM, _GET_CONFIG = 1, 15, 17, 24
_U64: Final = struct.Struct("<Q")
_ANSWERS: Final[Mapping[int, int]] = {
    _GET_FEATURES: 1 << 32 | 1 << 30,  # VERSION_1, PROTOCOL_FEATURES
    _GET_PROTOCOL_FEATURES: 1 << 9 | 1 << 3 | 1 << 0,  # CONFIG, REPLY_ACK, MQ
    _GET_QUEUE_NUM: 64,
}


def probe(argv: Sequence[str], machine: str) -> tuple[str, frozenset[str]]:
    """Return QEMU's version and the device types that it can start here under TCG, on the board `machine`.

    Raises `ImageError` when it cannot be started at all or does not speak QMP.
    """
    version, creatable = _start(argv, machine, ())
    wanted = [kind for kind in VHOST_USER_DEVICES if kind in creatable]
    if wanted and not _starts(argv, machine, wanted):
        wanted = [kind for kind in wanted if _starts(argv, machine, [kind])]
    return version, creatable - VHOST_USER_DEVICES.keys() | frozenset(wanted)


def has_dbus_display(argv: Sequence[str], machine: str) -> bool:
    """Whether QEMU starts with the display that other processes reach by D-Bus, without a bus."""
    try:
        _start(argv, machine, (), display="dbus,p2p=yes")
    except ImageError:
        return False
    return True


def _starts(argv: Sequence[str], machine: str, kinds: Sequence[str]) -> bool:
    try:
        _start(argv, machine, kinds)
    except ImageError:
        return False
    return True


def _start(
    argv: Sequence[str], machine: str, kinds: Sequence[str], *, display: str = "none"
) -> tuple[str, frozenset[str]]:
    """Start QEMU with `kinds`, return its version and its user-creatable types, and end it."""
    command = [
        *argv, "-M", f"{machine},memory-backend=m", "-m", "32M", "-accel", "tcg", "-S", "-qmp", "stdio",
        "-object", "memory-backend-memfd,id=m,size=32M,share=on",
        "-nodefaults", "-no-user-config", "-nic", "none", "-display", display,
    ]  # fmt: skip
    pairs = [socket.socketpair() for _ in kinds]
    threads = [threading.Thread(target=_answer, args=(ours,)) for _, ours in pairs]
    try:
        for index, (kind, (theirs, _)) in enumerate(zip(kinds, pairs, strict=True)):
            command += ["-chardev", f"socket,id=c{index},fd={theirs.fileno()}"]
            options = (kind, f"chardev=c{index}", VHOST_USER_DEVICES[kind])
            command += ["-device", ",".join(filter(None, options))]
        for thread in threads:
            thread.start()
        return _ask(command, [theirs.fileno() for theirs, _ in pairs])
    finally:
        for thread, (theirs, ours) in zip(threads, pairs, strict=True):
            theirs.close()
            if thread.ident is not None:
                ours.shutdown(socket.SHUT_RDWR)  # ends the thread
                thread.join()
            ours.close()


def _ask(command: Sequence[str], descriptors: Sequence[int]) -> tuple[str, frozenset[str]]:
    commands: list[tuple[str, dict[str, Any]]] = [
        ("qmp_capabilities", {}),
        ("qom-list-types", {"implements": "device", "abstract": False}),
        ("human-monitor-command", {"command-line": "device_add help"}),  # QMP has no user_creatable
        ("quit", {}),
    ]
    lines = "".join(
        json.dumps({"execute": name, "arguments": arguments}) + "\n" for name, arguments in commands
    )
    try:
        done = subprocess.run(
            command, input=lines, capture_output=True, text=True, pass_fds=descriptors, timeout=TIMEOUT_S
        )
    except OSError as error:
        raise ImageError(f"cannot start {command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired:
        raise ImageError(f"{command[0]} did not answer QMP within {TIMEOUT_S:.0f} s") from None
    try:
        messages = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    except ValueError:
        messages = []
    replies = [message["return"] for message in messages if "return" in message]
    if not messages or "QMP" not in messages[0] or len(replies) < len(commands) - 1:
        raise ImageError(f"{command[0]} did not start: {done.stderr.strip()[-300:] or 'no message'}")
    version = messages[0]["QMP"]["version"]["qemu"]
    known = {item["name"] for item in replies[1]}
    creatable = {line.split('"')[1] for line in replies[2].splitlines() if line.startswith('name "')}
    return "{major}.{minor}.{micro}".format(**version), frozenset(known & creatable)


def _answer(connection: socket.socket) -> None:
    """Be the backend of a device that is realized and never started; close every descriptor that is sent."""
    while (header := _receive(connection, _HEADER.size)) is not None:
        request, flags, size = _HEADER.unpack(header)
        payload = _receive(connection, size) if size else b""
        if payload is None:
            return
        if request in _ANSWERS:
            reply = _U64.pack(_ANSWERS[request])
        elif request == _GET_CONFIG:
            reply = payload[:12] + bytes(size - 12)  # offset, size, flags, then the configuration: zeroes
        elif flags & _NEED_REPLY:
            reply = _U64.pack(0)
        else:
            continue
        try:
            connection.sendall(_HEADER.pack(request, _VERSION | _REPLY, len(reply)) + reply)
        except OSError:
            return


def _receive(connection: socket.socket, size_bytes: int) -> bytes | None:
    data = b""
    while len(data) < size_bytes:
        try:
            chunk, descriptors, _, _ = socket.recv_fds(connection, size_bytes - len(data), 8)
        except OSError:
            return None
        for descriptor in descriptors:
            os.close(descriptor)
        if not chunk:
            return None
        data += chunk
    return data
