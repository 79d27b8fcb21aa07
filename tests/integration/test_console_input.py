"""The console and the input devices under the Linux drivers, in a guest on a real QEMU."""

from __future__ import annotations

import hashlib
import os
import queue
import re
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

import pytest

from rayos_devices.backend import Backend
from rayos_devices.console.backend import ConsoleBackend
from rayos_devices.console.chardev import serve_chardevs
from rayos_devices.console.port import PortSpec
from rayos_devices.input.backend import InputBackend
from rayos_devices.input.codes import Button, Key
from rayos_devices.input.wire import Abs, EventType, Led, Rel
from rayos_devices.loop import Loop
from rayos_devices.serve import Listener, listen
from rayos_images import Cache, accel, initramfs, kernel, qemu

pytestmark = pytest.mark.guest

R = TypeVar("R")

BOOT_LIMIT_S: Final = 120.0
#: linux/input.h, struct input_event of a 64-bit guest: seconds, microseconds, type, code, value.
INPUT_EVENT: Final = struct.Struct("<qqHHi")
SHELL, AGENT, LOG = 0, 1, 2
PORTS: Final = (
    PortSpec("console", is_console=True),
    PortSpec("org.rayos.agent"),
    PortSpec("org.rayos.log"),
)
INPUTS: Final = ("keyboard", "mouse", "tablet", "touch")


class Hardware:
    """Backends on a loop in a thread, and the QEMU they serve."""

    def __init__(self, directory: Path, *, is_fallback: bool = False) -> None:
        """`is_fallback`: the console is QEMU's own, its ports are chardevs on our sockets."""
        cache = Cache(Path(os.environ.get("RAYOS_CACHE_DIR", "/var/cache/rayos")))
        found = qemu.find(cache)
        built = kernel.build(cache)
        self.loop = Loop()
        self.console = ConsoleBackend("console", self.loop, ports=PORTS)
        self.inputs = {kind: InputBackend(kind, self.loop, kind) for kind in INPUTS}
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self.loop.register(self._wake, self._woken)
        self._news = threading.Event()
        self.console.on_output = self.console.on_room = lambda _port: self._news.set()
        backends: list[Backend] = [*self.inputs.values()]
        devices = []
        self._chardevs: list[socket.socket] = []
        if is_fallback:
            self._chardevs = [listen(directory / f"port{index}.sock") for index in range(len(PORTS))]
            self.ports = serve_chardevs(self.console, self._chardevs, self.loop)
            devices += ["-device", "virtio-serial-pci,max_ports=4"]
            for index, port in enumerate(PORTS):
                path = directory / f"port{index}.sock"
                kind = "virtconsole" if port.is_console else "virtserialport"
                devices += ["-chardev", f"socket,id=port{index},path={path},reconnect-ms=50"]
                devices += ["-device", f"{kind},chardev=port{index},nr={index},name={port.name}"]
        else:
            backends.append(self.console)
        self._listeners = [
            Listener(backend, self.loop, listen(directory / f"{backend.name}.sock")) for backend in backends
        ]
        self._thread = threading.Thread(target=self.loop.run, daemon=True)
        self._thread.start()
        for backend in backends:
            devices += ["-chardev", f"socket,id={backend.name},path={directory / backend.name}.sock"]
            devices += ["-device", _device(backend)]
        self._log = (directory / "qemu.log").open("wb")
        self.process = subprocess.Popen(
            [
                *found.argv,
                *("-M", "q35,memory-backend=m", "-m", "256M", "-nodefaults", "-nic", "none"),
                *("-object", "memory-backend-memfd,id=m,size=256M,share=on"),
                *("-accel", accel.probe(cache, found).name, "-display", "none"),
                *("-serial", f"file:{directory / 'serial.log'}"),
                *("-kernel", str(built.vmlinux), "-initrd", str(initramfs.build(cache, built))),
                *("-append", "console=ttyS0 quiet no_timer_check tsc=reliable random.trust_cpu=on"),
                *devices,
            ],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self.offset = 0

    def _woken(self, _events: int) -> None:
        os.eventfd_read(self._wake)
        while not self._calls.empty():
            self._calls.get()()

    def call(self, function: Callable[[], R]) -> R:
        """Run `function` on the loop's thread."""
        answers: queue.SimpleQueue[R] = queue.SimpleQueue()
        self._calls.put(lambda: answers.put(function()))
        os.eventfd_write(self._wake, 1)
        return answers.get(timeout=30)

    def expect(self, port: int, pattern: str, *, limit_s: float = 60.0) -> re.Match[str]:
        """Wait until the port's output from `offset` on has the pattern; the offset moves behind it."""
        deadline = time.monotonic() + limit_s
        while True:
            self._news.clear()
            start, data = self.call(lambda: self.console.read(port, self.offset, 1 << 20))
            assert start == self.offset, "output was lost"
            found = re.search(pattern.encode(), data)
            if found:
                self.offset += found.end()
                text = re.search(pattern, data.decode(errors="replace"))
                assert text
                return text
            assert self.process.poll() is None, "QEMU ended"
            if not self._news.wait(max(0.0, deadline - time.monotonic())):
                raise TimeoutError(f"no {pattern!r} on port {port} in {data[-2000:]!r}")
            time.sleep(0.01)  # a little more comes with it

    def type(self, data: bytes) -> None:
        while data:
            self._news.clear()
            data = data[self.call(lambda data=data: self.console.write(SHELL, data)) :]  # type: ignore[misc]
            if data:
                assert self._news.wait(30)

    def sh(self, command: str) -> str:
        """Returns the output of a command in the guest's shell on hvc0."""
        # What is typed is echoed, what the shell computes is not.
        self.type(f"echo be$((0))gin; {command}; echo do$((0))ne-$?-\n".encode())
        found = self.expect(SHELL, r"(?s)be0gin\r\n(.*?)do0ne-(\d+)-\r\n")
        assert found[2] == "0", f"{command}: {found[0]}"
        return found[1].replace("\r\n", "\n")

    def event_device(self, name: str) -> str:
        listing = self.sh("cat /proc/bus/input/devices")
        for block in listing.split("\n\n"):
            if f'Name="RayOS {name}"' in block:
                found = re.search(r"event\d+", block)
                assert found
                return found[0]
        raise AssertionError(f"no {name} in {listing}")

    def events(self, name: str, events: Sequence[tuple[int, int, int]]) -> list[tuple[int, ...]]:
        """Returns the events that arrive in the guest when `events` are injected."""
        device = self.event_device(name)
        reader = f'head -c {INPUT_EVENT.size * len(events)} /dev/input/{device} | hexdump -v -e \'24/1 "%02x" "\\n"\''
        self.type(f"{reader} & sleep 1; echo go-$((1+1))\n".encode())
        self.expect(SHELL, "go-2\r\n")
        self.call(lambda: self.inputs[name].inject(events))
        lines = [self.expect(SHELL, r"([0-9a-f]{48})\r\n") for _ in events]
        return [INPUT_EVENT.unpack(bytes.fromhex(line[1]))[2:] for line in lines]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()
        self.call(self.loop.stop)
        self._thread.join()
        for listener in self._listeners:
            listener.close()
        for chardev in self._chardevs:
            chardev.close()
        self.loop.close()
        os.close(self._wake)


def _device(backend: Backend) -> str:
    if isinstance(backend, ConsoleBackend):
        return (
            f"vhost-user-test-device-pci,virtio-id=3,num_vqs={len(backend.queues)},config_size=12,"
            f"chardev={backend.name}"
        )
    return f"vhost-user-input-pci,chardev={backend.name}"


@contextmanager
def booted(directory: Path, *, is_fallback: bool = False) -> Iterator[Hardware]:
    """A guest at its shell's prompt."""
    hardware = Hardware(directory, is_fallback=is_fallback)
    try:
        hardware.expect(LOG, r"RAYOS-READY boot=\S+ ip=\S+", limit_s=BOOT_LIMIT_S)
        hardware.offset = 0
        hardware.type(b"\n")
        hardware.expect(SHELL, "# ")
        hardware.type(b"PS1=; dmesg -n 1; sleep 1; echo quiet-$((1+1))\n")
        hardware.expect(SHELL, "quiet-2\r\n")
        yield hardware
    finally:
        hardware.close()


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hardware]:
    with booted(tmp_path_factory.mktemp("guest")) as hardware:
        yield hardware


def test_shell_both_ways(guest: Hardware) -> None:
    """hvc0 takes a command and gives its output."""
    assert guest.sh("echo $((40+2))") == "42\n"


def test_a_long_paste_arrives_whole(guest: Hardware) -> None:
    """More than the guest has buffers for, with back-pressure and no byte lost."""
    guest.sh("stty -echo")
    try:
        lines = [f"{number:04d} " + "x" * 58 for number in range(200)]
        guest.type(b"cat > /tmp/paste <<E\n" + "\n".join(lines).encode() + b"\nE\necho pasted-$((1+1))\n")
        guest.expect(SHELL, "pasted-2\r\n")
        guest.type(b"md5sum < /tmp/paste; wc -c < /tmp/paste; echo sum-$((1+1))\n")
        found = guest.expect(SHELL, r"(?s)(\w{32})  -\r\n(\d+)\r\nsum-2")
        assert int(found[2]) == 64 * 200
    finally:
        guest.type(b"stty echo; echo echo-$((1+1))\n")
        guest.expect(SHELL, "echo-2\r\n")


def test_a_flood_of_output_is_complete(guest: Hardware) -> None:
    found = guest.sh("seq 20000 | md5sum; seq 20000")
    digest, _, body = found.partition("  -\n")
    assert hashlib.md5(body.encode()).hexdigest() == digest


def test_size_reaches_the_terminal(guest: Hardware) -> None:
    """A resize is what `stty size` says: rows, columns."""
    guest.call(lambda: guest.console.resize(SHELL, 132, 43))
    for _ in range(20):
        if guest.sh("stty size") == "43 132\n":
            break
        time.sleep(0.1)
    assert guest.sh("stty size") == "43 132\n"


def test_ports_have_their_names(guest: Hardware) -> None:
    assert guest.sh("cat /sys/class/virtio-ports/vport*/name").split() == [port.name for port in PORTS]
    ports = guest.call(guest.console.ports)
    assert [(port["port"], port["name"]) for port in ports] == [(i, p.name) for i, p in enumerate(PORTS)]
    assert ports[SHELL]["guest_open"]
    assert ports[AGENT]["guest_open"]


def test_a_key_arrives(guest: Hardware) -> None:
    press: list[tuple[int, int, int]] = [(1, Key.KEY_Q, 1), (0, 0, 0), (1, Key.KEY_Q, 0), (0, 0, 0)]
    assert guest.events("keyboard", press) == press


def test_the_pointer_devices_deliver(guest: Hardware) -> None:
    moved: list[tuple[int, int, int]] = [(EventType.REL, Rel.X, 5), (EventType.REL, Rel.Y, -7), (0, 0, 0)]
    assert guest.events("mouse", moved) == moved
    placed = [(EventType.ABS, Abs.X, 12345), (EventType.ABS, Abs.Y, 23456), (0, 0, 0)]
    assert guest.events("tablet", placed) == placed
    touched = [
        (EventType.ABS, Abs.MT_SLOT, 1),
        (EventType.ABS, Abs.MT_TRACKING_ID, 9),
        (EventType.ABS, Abs.MT_POSITION_X, 100),
        (EventType.ABS, Abs.MT_POSITION_Y, 200),
        (EventType.KEY, Button.BTN_TOUCH, 1),
        (0, 0, 0),
    ]
    assert guest.events("touch", touched) == touched


def test_the_guest_lights_the_keyboard(guest: Hardware) -> None:
    """Caps Lock goes to the kernel, which tells the keyboard to light up."""
    news = threading.Event()
    seen: list[Any] = []

    def status(*event: int) -> None:
        seen.append(event)
        news.set()

    keyboard = guest.inputs["keyboard"]
    keyboard.on_status = status
    guest.call(lambda: keyboard.inject([(1, Key.KEY_CAPSLOCK, 1), (0, 0, 0), (1, Key.KEY_CAPSLOCK, 0)]))
    assert news.wait(30), "the guest said nothing"
    assert (EventType.LED, Led.CAPS, 1) in seen
    assert guest.call(lambda: keyboard.leds) == 1 << Led.CAPS


def test_the_fallback_console_works_the_same(tmp_path: Path) -> None:
    """QEMU's own virtconsole on our sockets: shell both ways, ports open, and again after QEMU had to reconnect."""
    with booted(tmp_path, is_fallback=True) as guest:
        assert guest.sh("echo $((40+2))") == "42\n"
        assert all(port["guest_open"] for port in guest.call(guest.console.ports))
        assert guest.sh("cat /sys/class/virtio-ports/vport*/name").split() == [port.name for port in PORTS]
        guest.call(guest.ports[SHELL].disconnect)
        assert not guest.call(guest.console.ports)[SHELL]["guest_open"]
        assert guest.sh("echo $((6*7))") == "42\n"
