"""Our kernel and initramfs on a QEMU that we found, with QEMU's own devices in place of ours."""

from __future__ import annotations

import os
import re
import secrets
import select
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import IP, UDP
from scapy.layers.l2 import Ether

from rayos_images import Cache, ImageError, accel, initramfs, kernel, qemu, qemu_probe
from rayos_images.arch import DEFAULT
from rayos_images.guest.protocol import AgentProtocol, Done, Exited, Failed, FileData, Hello, Ready, Reply

pytestmark = pytest.mark.guest

READY = re.compile(r"RAYOS-READY boot=(\d+\.\d\d) ip=(\S+)")
BOOT_LIMIT_S = 90.0  # with every core taken by other tests; 2 s on an idle machine
ADDRESS = "192.0.2.77"

CONSOLE = (
    "-device", "virtio-serial-pci,id=vs,max_ports=4",
    "-device", "virtconsole,bus=vs.0,chardev=shell,nr=0",
    "-device", "virtserialport,bus=vs.0,chardev=agent,nr=1,name=org.rayos.agent",
    "-device", "virtserialport,bus=vs.0,chardev=log,nr=2,name=org.rayos.log",
)  # fmt: skip
DEVICES = (
    "-device", "virtio-gpu-pci",
    "-device", "virtio-keyboard-pci",
    "-device", "virtio-tablet-pci",
    "-blockdev", "null-co,node-name=disk,size=1048576,read-zeroes=on",
    "-device", "virtio-blk-pci,drive=disk",
)  # fmt: skip


@pytest.fixture(scope="module")
def cache() -> Cache:
    return Cache(Path(os.environ.get("RAYOS_CACHE_DIR", "/var/cache/rayos")))


@dataclass
class Guest:
    """A running QEMU and our ends of its ports."""

    process: subprocess.Popen[bytes]
    ports: dict[str, socket.socket]
    started: float
    protocol: AgentProtocol = field(default_factory=AgentProtocol)

    def read_until(self, port: str, pattern: re.Pattern[str], limit_s: float = BOOT_LIMIT_S) -> re.Match[str]:
        deadline = time.monotonic() + limit_s
        text = ""
        while (found := pattern.search(text)) is None:
            text += self._receive(port, deadline, text).decode(errors="replace")
        return found

    def hello(self, *, flood: bool = False) -> None:
        begin = self.protocol.resync if flood else self.protocol.hello
        for _ in range(20):
            self.ports["agent"].sendall(begin(secrets.token_hex(16)))
            try:
                while isinstance(reply := self.reply(30.0 if flood else 3.0), Exited):
                    pass
            except TimeoutError:
                continue
            if isinstance(reply, Hello):
                return
        raise TimeoutError("the agent did not answer 20 times")

    def reply(self, limit_s: float = 120.0) -> Reply:
        deadline = time.monotonic() + limit_s
        while not (replies := self.protocol.receive(self._receive("agent", deadline, "agent"))):
            pass
        return replies[-1]

    def shell(self, command: str) -> Exited:
        self.ports["agent"].sendall(self.protocol.shell(command)[1])
        reply = self.reply()
        assert isinstance(reply, Exited), reply
        return reply

    def put(self, path: str, data: bytes, mode: int = 0o644) -> Reply:
        for part in self.protocol.put(path, data, mode=mode)[1]:
            self.ports["agent"].sendall(part)
        return self.reply()

    def get(self, path: str, limit_bytes: int = 1 << 26) -> Reply:
        self.ports["agent"].sendall(self.protocol.get(path, limit_bytes=limit_bytes)[1])
        return self.reply()

    def _receive(self, port: str, deadline: float, context: str) -> bytes:
        connection = self.ports[port]
        if not select.select([connection], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise TimeoutError(f"{port}: {context[-2000:]}")
        data = connection.recv(1 << 20)
        if not data:
            raise ConnectionError(f"{port} closed: {context[-2000:]}")
        return data


@contextmanager
def booted(cache: Cache, *options: str, ports: tuple[str, ...] = ("serial",)) -> Iterator[Guest]:
    """A guest with our ends of the chardevs `ports`; the port `nic` is the wire of a network card."""
    image = kernel.build(cache)
    argv = [
        *qemu.find(cache).argv, "-M", "q35", "-m", "256M", "-accel", "tcg", "-nodefaults", "-no-user-config",
        "-display", "none", "-kernel", str(image.vmlinux), "-initrd", str(initramfs.build(cache, image)),
        "-append", kernel.command_line(), "-serial", "chardev:serial", *options,
    ]  # fmt: skip
    pairs = {name: socket.socketpair() for name in ports}
    try:
        for name, (_, theirs) in pairs.items():
            if name == "nic":
                argv += ["-netdev", f"stream,id=n,server=off,addr.type=fd,addr.str={theirs.fileno()}"]
                argv += ["-device", "virtio-net-pci,netdev=n,romfile="]
            elif name == "qmp":
                argv += ["-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-qmp", "chardev:qmp"]
            else:
                argv += ["-chardev", f"socket,id={name},fd={theirs.fileno()}"]
        started = time.monotonic()
        process = subprocess.Popen(argv, pass_fds=[theirs.fileno() for _, theirs in pairs.values()])
        for _, theirs in pairs.values():
            theirs.close()
        try:
            yield Guest(process, {name: ours for name, (ours, _) in pairs.items()}, started)
        finally:
            process.kill()
            process.wait()
    finally:
        for ours, theirs in pairs.values():
            ours.close()
            theirs.close()


def serve_dhcp(wire: socket.socket) -> None:
    """A DHCP server on QEMU's `stream` netdev (frames with a length before each) until the wire ends."""
    data = b""
    while chunk := wire.recv(1 << 16):
        data += chunk
        while len(data) >= 4 and len(data) >= 4 + (size := struct.unpack_from(">I", data)[0]):
            frame, data = Ether(data[4 : 4 + size]), data[4 + size :]
            if DHCP not in frame or frame[BOOTP].op != 1:
                continue
            asked: dict[str, Any] = dict(
                option[:2] for option in frame[DHCP].options if isinstance(option, tuple)
            )
            kind = "offer" if asked["message-type"] == 1 else "ack"
            options = [
                ("message-type", kind), ("server_id", "192.0.2.1"), ("lease_time", 3600),
                ("subnet_mask", "255.255.255.0"), ("router", "192.0.2.1"), ("name_server", "192.0.2.53"), "end",
            ]  # fmt: skip
            reply = bytes(
                Ether(src="02:00:00:00:00:01", dst=frame.src)
                / IP(src="192.0.2.1", dst=ADDRESS)
                / UDP(sport=67, dport=68)
                / BOOTP(op=2, xid=frame[BOOTP].xid, chaddr=frame[BOOTP].chaddr, yiaddr=ADDRESS)
                / DHCP(options=options)
            )
            wire.sendall(struct.pack(">I", len(reply)) + reply)


@pytest.fixture(scope="module")
def guest(cache: Cache) -> Iterator[Guest]:
    """One guest with every device, booted to the ready line."""
    with booted(cache, *CONSOLE, *DEVICES, ports=("serial", "shell", "agent", "log", "nic", "qmp")) as guest:
        server = threading.Thread(target=serve_dhcp, args=(guest.ports["nic"],))
        server.start()
        try:
            ready = guest.read_until("log", READY)
            print(
                f"QEMU start to ready line: {time.monotonic() - guest.started:.2f} s, {ready[1]} in the guest"
            )
            assert ready[2] == ADDRESS
            assert guest.read_until("serial", READY)[0] == ready[0]
            guest.hello()
            yield guest
        finally:
            guest.process.kill()
            guest.process.wait()
            server.join()


def test_every_device_is_there_when_the_ready_line_comes(guest: Guest) -> None:
    seen = guest.shell("ls /dev /dev/input /dev/dri; cat /proc/modules; ip route; cat /etc/resolv.conf")
    assert seen.stderr == b""
    for wanted in (
        b"vda",
        b"fb0",
        b"hvc0",
        b"event0",
        b"card0",
        b"default via 192.0.2.1",
        b"nameserver 192.0.2.53",
    ):
        assert wanted in seen.stdout, wanted


def test_the_shell_has_job_control_and_comes_back(guest: Guest) -> None:
    shell = guest.ports["shell"]
    shell.sendall(b"sleep 100\n")
    guest.read_until("shell", re.compile("sleep 100"), 30)
    time.sleep(0.5)
    shell.sendall(b"\x03")  # ends sleep, not the shell
    shell.sendall(b"echo status=$? tty=$(tty)\n")
    guest.read_until("shell", re.compile("status=130 tty=/dev/hvc0"), 30)
    shell.sendall(b"exit\n")
    time.sleep(0.5)
    shell.sendall(b"\necho again=$((40 + 2))\n")
    guest.read_until("shell", re.compile("again=42"), 30)


def test_a_command_gives_both_outputs_and_its_status(guest: Guest) -> None:
    done = guest.shell("printf 'a\\0b\\377'; echo problem >&2; exit 3")
    assert (done.status, done.stdout, done.stderr) == (3, b"a\0b\xff", b"problem\n")


def test_arguments_arrive_as_they_were_given(guest: Guest) -> None:
    words = ["", " ", "a b", "$HOME", "`id`", "'", '"', "\\", "line\nline", "*", "ä", "-n", "#"]
    guest.ports["agent"].sendall(guest.protocol.exec(["printf", "<%s>", *words])[1])
    reply = guest.reply()
    assert isinstance(reply, Exited)
    assert reply.stdout == "".join(f"<{word}>" for word in words).encode()


def test_a_command_that_is_not_there_fails_with_127(guest: Guest) -> None:
    guest.ports["agent"].sendall(guest.protocol.exec(["/no/such"])[1])
    reply = guest.reply()
    assert isinstance(reply, Exited)
    assert (reply.status, b"/no/such" in reply.stderr) == (127, True)


def test_output_beyond_the_limit_is_counted_but_not_sent(guest: Guest) -> None:
    guest.ports["agent"].sendall(guest.protocol.shell("seq 100000", limit_bytes=10)[1])
    reply = guest.reply()
    assert isinstance(reply, Exited)
    assert (reply.stdout, reply.stdout_total) == (b"1\n2\n3\n4\n5\n", 588895)


def test_a_hung_command_is_killed_with_its_children(guest: Guest) -> None:
    guest.ports["agent"].sendall(guest.protocol.shell("echo before; sleep 1234 & sleep 1235")[1])
    time.sleep(0.5)
    guest.ports["agent"].sendall(guest.protocol.kill())
    reply = guest.reply()
    assert isinstance(reply, Exited)
    assert (reply.status, reply.stdout) == (137, b"before\n")
    assert guest.shell("ps | grep '[s]leep 123[45]'").stdout == b""


def test_a_kill_sent_at_once_is_not_lost(guest: Guest) -> None:
    guest.ports["agent"].sendall(guest.protocol.shell("sleep 1236")[1] + guest.protocol.kill())
    reply = guest.reply(30)
    assert isinstance(reply, Exited)
    assert reply.status == 137


def test_a_background_process_does_not_hold_the_result(guest: Guest) -> None:
    assert guest.shell("sleep 5 & echo done").stdout == b"done\n"


@pytest.mark.parametrize("size", [0, 1, 131072, 131073, 3 << 20])
def test_a_file_comes_back_as_it_was_put(guest: Guest, size: int) -> None:
    data = os.urandom(size)
    assert isinstance(guest.put("/tmp/a file'", data, 0o750), Done)
    assert guest.shell('stat -c %a,%s "/tmp/a file\'"').stdout == b"750,%d\n" % size
    back = guest.get("/tmp/a file'")
    assert isinstance(back, FileData)
    assert back.data == data


def test_proc_and_devices_can_be_read_and_devices_written(guest: Guest) -> None:
    version = guest.get("/proc/version")
    assert isinstance(version, FileData)
    assert version.data.startswith(b"Linux version ")
    assert isinstance(guest.put("/dev/vda", b"x" * 4096), Done)
    assert guest.shell("test -b /dev/vda").status == 0


def test_files_that_cannot_be_moved_say_why(guest: Guest) -> None:
    for reply, reason in (
        (guest.get("/no/such"), "/no/such: No such file or directory"),
        (guest.get("/etc"), "/etc: Is a directory"),
        (guest.get("/dev/zero", 100), "/dev/zero: larger than the 100 bytes that were asked for"),
        (guest.get("/bin/busybox", 100), "/bin/busybox: larger than the 100 bytes that were asked for"),
        (guest.put("/no/such", b"x" * 200000), "/no/such: nonexistent directory"),
    ):
        assert isinstance(reply, Failed)
        assert reply.message == reason


def test_a_full_disk_fails_the_put_and_leaves_nothing(guest: Guest) -> None:
    assert guest.shell("mkdir -p /mnt/s && mount -t tmpfs -o size=256k s /mnt/s").status == 0
    reply = guest.put("/mnt/s/big", bytes(1 << 20))
    assert isinstance(reply, Failed)
    assert reply.message == "/mnt/s/big: No space left on device"
    assert guest.shell("ls -A /mnt/s; umount /mnt/s").stdout == b""


def test_a_new_host_resynchronises_whatever_was_going_on(guest: Guest) -> None:
    """The old host died inside a command line, a piece, a command, and with replies unread."""
    agent = guest.ports["agent"]
    for last_words in (
        b"exec 5 100 $'ec",
        b"exec 6 1000 $'sleep' $'1237'\n",
        b"exec 7 100000 $'seq' $'10000'\nget 8 1000000 $'/bin/busybox'\n",
        b"\n@hello 0123456789abcdef 1\n\xff\0nonsense\n",
    ):
        agent.sendall(last_words)
        guest.protocol = AgentProtocol()
        guest.hello()
        assert guest.shell("echo alive").stdout == b"alive\n"
    assert guest.shell("ps | grep '[s]leep 1237'").stdout == b""
    agent.sendall(b"put 9 644 $'/tmp/half'\npiece 131072\nonly this")
    guest.protocol = AgentProtocol()
    guest.hello(flood=True)
    assert guest.shell("ls -d /tmp/half*").stdout == b""


def test_an_agent_that_dies_comes_back_and_says_so(guest: Guest) -> None:
    guest.ports["agent"].sendall(
        guest.protocol.shell("kill -9 $(ps | awk '/rayos\\/agent/ { print $1 }')")[1]
    )
    while not isinstance(guest.reply(), Ready):
        pass
    guest.hello()
    assert guest.shell("echo back").stdout == b"back\n"


def test_the_power_button_ends_qemu(guest: Guest) -> None:
    """Last: the module's guest is gone afterwards."""
    monitor = guest.ports["qmp"]
    monitor.sendall(b'{"execute":"qmp_capabilities"}{"execute":"system_powerdown"}')
    assert guest.process.wait(60) == 0


def test_boots_with_no_device_at_all_to_a_shell_on_the_serial_line(cache: Cache) -> None:
    with booted(cache) as guest:
        assert guest.read_until("serial", READY)[2] == "-"
        guest.ports["serial"].sendall(b"\necho answer=$((6 * 7))\n")
        guest.read_until("serial", re.compile("answer=42"), 30)


def test_a_network_without_a_server_does_not_keep_the_ready_line_away(cache: Cache) -> None:
    with booted(cache, ports=("serial", "nic")) as guest:
        ready = guest.read_until("serial", READY)
        assert ready[2] == "-"
        assert float(ready[1]) < 60


def test_a_qemu_that_has_all_our_devices_is_found_and_needs_no_environment(cache: Cache) -> None:
    found = qemu.find(cache)
    assert found.missing == ()
    assert found.has_console
    assert not found.has("vhost-user-base")  # in the object model, not for users
    shown = subprocess.run(
        [*found.argv, "-device", "virtio-gpu-pci,help"], env={}, capture_output=True, text=True
    )
    assert "max_outputs" in shown.stdout  # a module: it is found without QEMU_MODULE_DIR


def test_a_broken_system_qemu_is_as_good_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImageError, match="/bin/false did not start"):
        qemu_probe.probe(("/bin/false",), DEFAULT.trial_machine)
    (tmp_path / DEFAULT.qemu).symlink_to("/bin/false")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError, match=r"run `python -m images`"):
        qemu.find(Cache(tmp_path / "cache"), provision=False)


def test_without_apt_the_error_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    cache = Cache(tmp_path / "cache")
    for build in (qemu.find, kernel.build):
        with pytest.raises(ImageError, match="apt-get not found"):
            build(cache)
    assert list(cache.root.iterdir()) == []


def test_the_accelerator_is_found_once_per_boot_of_the_host(cache: Cache) -> None:
    machine = qemu.find(cache)
    first = accel.probe(cache, machine)
    assert first.name in ("kvm", "tcg")
    assert first.reason
    started = time.monotonic()
    assert accel.probe(cache, machine) == first
    assert time.monotonic() - started < 1
