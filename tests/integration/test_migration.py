"""A guest with a disk and a network card of ours is saved to a file by QEMU while it works, and goes on elsewhere.

During the save QEMU copies memory that the devices still write, and asks them which (SET_LOG_BASE; the marks themselves
are judged in tests/unit/devices/test_log.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Self

import pytest

from rayos_devices.net.port import open_tap
from rayos_images import initramfs, kernel, qemu
from rayos_images.cache import Cache
from rayos_vmm.paths import default_paths
from rayos_vmm.shared.spec import Device, device_socket
from tests.framework.kept import Kept

pytestmark = [pytest.mark.guest, pytest.mark.root]

IMAGE_BYTES: Final = 12 << 20
TIMEOUT_S: Final = 60.0
#: Has the device write into the page cache all the time.
BUSY: Final = (
    "while true; do echo 3 >/proc/sys/vm/drop_caches; cat /dev/vda >/dev/null; done & echo st''arted\n"
)


class Machine:
    """A bare QEMU with two devices of a keeper's."""

    def __init__(self, directory: Path, image: Path, tap: str, *, incoming: Path | None = None) -> None:
        directory.mkdir()
        self.directory = directory
        fds = (os.open(image, os.O_RDWR | os.O_CLOEXEC), *open_tap(tap))
        self.kept = Kept(
            directory,
            [Device(kind="blk", name="disk", fd=fds[0]), Device(kind="net", name="net", queue_fds=fds[1:])],
            memory_bytes=128 << 20,
        )
        for fd in fds:
            os.close(fd)
        cache = Cache(default_paths().cache)
        linux = kernel.build(cache)
        disk, net = (directory / device_socket(name) for name in ("disk", "net"))
        arguments = [
            *("-M", "q35,memory-backend=ram", "-accel", "tcg", "-cpu", "qemu64", "-m", "128M", "-S"),
            *("-object", "memory-backend-memfd,id=ram,size=128M,share=on,seal=on"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-nic", "none"),
            *("-kernel", str(linux.vmlinux), "-initrd", str(initramfs.build(cache, linux))),
            *("-append", "console=ttyS0 quiet no_timer_check tsc=reliable random.trust_cpu=on"),
            *("-serial", f"unix:{directory}/serial,server=on,wait=off"),
            *("-qmp", f"unix:{directory}/qmp,server=on,wait=off"),
            *("-chardev", f"socket,id=d,path={disk}", "-device", "vhost-user-blk-pci,chardev=d,num-queues=1"),
            *("-chardev", f"socket,id=n,path={net}", "-netdev", "vhost-user,id=n,chardev=n"),
            *("-device", "virtio-net-pci,netdev=n,romfile="),
            *(("-incoming", "defer") if incoming else ()),
        ]
        self.log = (directory / "qemu.log").open("wb")
        self.process = subprocess.Popen([*qemu.find(cache).argv, *arguments], stderr=self.log)
        self._text = ""
        try:
            self._serial = self._connect("serial")
            self._monitor = self._connect("qmp")
            self._qmp = self._monitor.makefile("rwb")
            self._qmp.readline()
            self.qmp("qmp_capabilities")
        except BaseException:
            self._end()
            raise
        if incoming:
            self.qmp("migrate-incoming", uri=f"file:{incoming}")
            self.wait_migrated()

    def _connect(self, name: str) -> socket.socket:
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(TIMEOUT_S)
            try:
                sock.connect(str(self.directory / name))
                return sock
            except OSError:
                sock.close()
                assert self.process.poll() is None and time.monotonic() < deadline, self.words()
                time.sleep(0.01)

    def words(self) -> str:
        return (self.directory / "qemu.log").read_text()

    def qmp(self, command: str, **arguments: Any) -> Any:
        self._qmp.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._qmp.flush()
        while True:
            answer = json.loads(self._qmp.readline())
            if "event" not in answer:
                assert "return" in answer, (command, answer, self.words())
                return answer["return"]

    def wait_migrated(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while (state := self.qmp("query-migrate").get("status")) != "completed":
            assert state in (None, "setup", "active", "device") and time.monotonic() < deadline, (
                state,
                self.words(),
            )
            time.sleep(0.02)

    def type(self, text: str) -> None:
        self._serial.sendall(text.encode())

    def expect(self, pattern: str) -> re.Match[str]:
        """The next match in what the guest says; what came before is gone."""
        while (found := re.search(pattern, self._text)) is None:
            data = self._serial.recv(4096)
            assert data, (pattern, self._text[-500:], self.words())
            self._text += data.decode(errors="replace")
        self._text = self._text[found.end() :]
        return found

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        self.log.close()
        self.kept.close()

    def close(self) -> None:
        self._qmp.close()
        self._monitor.close()
        self._serial.close()
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def workplace() -> Iterator[tuple[Path, str]]:
    """A directory and the name of a tap, both gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="raym", dir="/tmp"))
    tap = "raymig0"
    try:
        yield directory, tap
    finally:
        shutil.rmtree(directory)


def test_a_working_guest_is_saved_and_goes_on() -> None:
    """To a file while disk and card work and the worker is killed; back on another worker, with all that it had."""
    with workplace() as (directory, tap):
        image, state = directory / "image", directory / "state"
        image.write_bytes(os.urandom(IMAGE_BYTES))
        wanted = hashlib.md5(image.read_bytes()).hexdigest()
        with Machine(directory / "here", image, tap) as here:
            here.qmp("cont")
            here.expect("RAYOS-READY")
            here.type(BUSY)
            here.expect("started")
            here.qmp("migrate-set-parameters", **{"max-bandwidth": 64 << 20})
            here.qmp("migrate", uri=f"file:{state}")
            here.kept.ask("kill_worker")
            # A guest on a quick machine dirties memory faster than that; now its rest may go while it stands still.
            here.qmp("migrate-set-parameters", **{"downtime-limit": 10_000})
            here.wait_migrated()
        with Machine(directory / "there", image, tap, incoming=state) as there:
            there.qmp("cont")
            there.type("kill %1; wait; md5sum </dev/vda\n")
            assert there.expect(r"\b([0-9a-f]{32})  -")[1] == wanted
            there.type(
                "ip link set eth0 up; ping -c 1 -W 1 10.9.9.9; cat /sys/class/net/eth0/statistics/tx_packets\n"
            )
            assert int(there.expect(r"\r\n(\d+)\r\n")[1]) > 0
            there.type("dmesg | grep -c 'I/O error'\n")
            assert there.expect(r"\r\n(\d+)\r\n")[1] == "0"
