"""`rayos device serve gpu|input|console` under a real QEMU, each a process of its own: as anybody would use them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from rayos_images import Cache, accel, initramfs, kernel, qemu
from rayos_vmm.testing.picture import decode_ppm

pytestmark = pytest.mark.guest

LIMIT_S: Final = 60.0
WIDTH, HEIGHT = 1024, 600


class Output:
    """The gathered output of a process; `expect` waits for more of it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._said = b""
        self._news = threading.Condition()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while data := os.read(self._stream.fileno(), 65536):
            with self._news:
                self._said += data
                self._news.notify_all()

    def expect(self, pattern: str) -> re.Match[bytes]:
        """The first match, which is taken away with what stands before it."""
        with self._news:
            wanted = re.compile(pattern.encode())
            assert self._news.wait_for(lambda: wanted.search(self._said), LIMIT_S), (
                pattern,
                self._said[-2000:],
            )
            found = wanted.search(self._said)
            assert found is not None
            self._said = self._said[found.end() :]
            return found


class Guest:
    """Three device processes and the QEMU that they serve."""

    def __init__(self, directory: Path) -> None:
        cache = Cache(Path(os.environ.get("RAYOS_CACHE_DIR", "/var/cache/rayos")))
        found, built = qemu.find(cache), kernel.build(cache)
        self._processes: list[subprocess.Popen[bytes]] = []
        self.gpu = self._serve(directory, "gpu", "--mode", f"{WIDTH}x{HEIGHT}")
        self.keyboard = self._serve(directory, "input", "--kind", "keyboard")
        self.console = self._serve(directory, "console")
        self.events, self.shell = Output(self.keyboard.stdout), Output(self.console.stdout)
        devices = {
            "gpu": "vhost-user-gpu-pci",
            "input": "vhost-user-input-pci",
            "console": "vhost-user-test-device-pci,virtio-id=3,num_vqs=4,config_size=12",
        }
        self._directory = directory
        arguments = [
            *found.argv,
            *("-M", "q35,memory-backend=m", "-m", "256M", "-nodefaults", "-nic", "none", "-display", "none"),
            *("-object", "memory-backend-memfd,id=m,size=256M,share=on,seal=on"),
            *("-accel", accel.probe(cache, found).name, "-serial", f"file:{directory / 'serial.log'}"),
            *("-qmp", f"unix:{directory / 'qmp.sock'},server=on,wait=off"),
            *("-kernel", str(built.vmlinux), "-initrd", str(initramfs.build(cache, built))),
            *("-append", "console=tty0 console=ttyS0 quiet no_timer_check tsc=reliable random.trust_cpu=on"),
        ]
        for name, device in devices.items():
            arguments += ["-chardev", f"socket,id={name},path={directory / name}.sock"]
            arguments += ["-device", f"{device},chardev={name}"]
        with (directory / "qemu.log").open("wb") as log:
            self._processes.append(
                subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _serve(self, directory: Path, *words: str) -> subprocess.Popen[bytes]:
        path = directory / f"{words[0]}.sock"
        command = [
            sys.executable,
            "-P",
            "-m",
            "rayos_vmm.cli",
            "device",
            "serve",
            words[0],
            "--socket",
            str(path),
        ]
        process = subprocess.Popen(
            [*command, *words[1:]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._processes.append(process)
        Output(process.stderr).expect("serving ")
        return process

    def type(self, text: str) -> None:
        assert self.console.stdin is not None
        self.console.stdin.write(text.encode())
        self.console.stdin.flush()

    def inject(self, *events: tuple[int, int, int]) -> None:
        assert self.keyboard.stdin is not None
        self.keyboard.stdin.write(json.dumps(events).encode() + b"\n")
        self.keyboard.stdin.flush()

    def screendump(self) -> Path:
        path = self._directory / "screen.ppm"
        with socket.socket(socket.AF_UNIX) as qmp:
            qmp.connect(str(self._directory / "qmp.sock"))
            with qmp.makefile("rwb") as file:
                for command in ("qmp_capabilities", "screendump"):
                    arguments = {"filename": str(path)} if command == "screendump" else {}
                    file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
                    file.flush()
                    while "return" not in (answer := json.loads(file.readline())):
                        assert "error" not in answer, answer
        return path

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            process.wait(30)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    guest = Guest(tmp_path_factory.mktemp("alone"))
    try:
        guest.shell.expect("# ")
        yield guest
    finally:
        guest.close()


def test_a_console_is_standard_input_and_output(guest: Guest) -> None:
    """The guest's shell, and a paste that is longer than the guest has room for."""
    guest.type("stty -echo; echo said-$((6*7))\n")
    guest.shell.expect("said-42\r\n")
    guest.type("md5sum <<E\n" + "x" * 60 + "\n" + f"{'y' * 60}\n" * 2000 + "E\n")
    wanted = hashlib.md5(("x" * 60 + "\n" + f"{'y' * 60}\n" * 2000).encode()).hexdigest()
    guest.shell.expect(wanted)
    # Without ECHO, BusyBox's shell reads by fgets, takes SIGCHLD for the end of input, and ends with any job of its.
    guest.type("stty echo\n")


def test_an_input_device_takes_events_and_tells_lights(guest: Guest) -> None:
    find = "E=/dev/input/$(grep -l 'RayOS keyboard' /sys/class/input/event*/device/name | cut -d/ -f5)"
    guest.type(find + '; head -c 24 $E | hexdump -v -e \'24/1 "%02x" "\\n"\' &\n')
    guest.type("until ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q $E; do :; done; echo go-$((1+1))\n")
    guest.shell.expect("go-2\r\n")
    capslock = 58
    guest.inject((1, capslock, 1), (0, 0, 0), (1, capslock, 0))
    guest.shell.expect(r"01003a0001000000\r\n")
    assert json.loads(guest.events.expect(r"\[\[.*\]\]\n")[0]) == [[17, 1, 1]]


def test_a_display_is_seen_by_qemu(guest: Guest) -> None:
    """In the chosen mode, with the guest's console on it."""
    guest.type("cat /sys/class/graphics/fb0/virtual_size; echo dark > /dev/tty0; echo on-$((1+1))\n")
    guest.shell.expect(f"{WIDTH},{HEIGHT}\r\n")
    guest.shell.expect("on-2")
    picture = decode_ppm(guest.screendump().read_bytes())
    assert (picture.width, picture.height) == (WIDTH, HEIGHT)
