"""Our devices beside QEMU's own in one Linux guest, end to end: `make bench-guest`.

The guest has a disk and a network card of each kind: ours over vhost-user (`rayos_devices.serve`), QEMU's in its
process. The same fio job and the same TCP transfer take turns on both, so that guest, vCPU and moment are the same.
CPU is that of QEMU with all its vCPUs, and of our worker, per operation: under TCG the guest's own driver is most of
it.

fio comes from the host's Debian package (`apt-get install fio`) with its libraries, in a second archive behind the
guest's initramfs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.report import Series, publish, table
from benchmarks.servers import Server, make_image, ours, serve, workspace
from rayos_images import initramfs, kernel, qemu
from rayos_images.cache import Cache
from rayos_images.cpio import Archive
from rayos_vmm.paths import default_paths

MEMORY: Final = "768M"
IMAGE_BYTES: Final = 128 << 20
BOOT_LIMIT_S: Final = 120.0
COMMAND_LIMIT_S: Final = 120.0
NET_BYTES: Final = 32 << 20
LOADER: Final = "/bench/lib/ld-linux-x86-64.so.2"
FIO: Final = f"{LOADER} --library-path /bench/lib /bench/fio"


@dataclass(frozen=True)
class Job:
    """One row: fio's mode, block size and depth."""

    mode: str
    size: str
    depth: int

    @property
    def name(self) -> str:
        return f"{self.mode} {self.size} QD {self.depth}"

    def command(self, disk: str, seconds: float) -> str:
        return (
            f"{FIO} --name=j --filename=/dev/{disk} --rw={self.mode} --bs={self.size} --iodepth={self.depth} "
            f"--ioengine=libaio --direct=1 --time_based --runtime={seconds:g} --output-format=json --output=/tmp/out"
        )


JOBS: Final = (
    Job("randread", "4k", 1),
    Job("randread", "4k", 32),
    Job("randwrite", "4k", 32),
    Job("read", "128k", 8),
)


def fio_archive() -> bytes:
    """The host's fio with what it is linked to."""
    fio = shutil.which("fio")
    if fio is None:
        raise SystemExit("no fio here: apt-get install fio")
    archive = Archive()
    archive.directory("bench")
    archive.directory("bench/lib")
    archive.file("bench/fio", Path(fio).read_bytes(), 0o755)
    linked = subprocess.run(["ldd", fio], capture_output=True, text=True, check=True).stdout
    for path in sorted(set(re.findall(r"(/\S+) \(0x", linked))):
        archive.file(f"bench/lib/{Path(path).name}", Path(path).read_bytes(), 0o755)
    return archive.finish()


class Shell:
    """The guest's shell on its serial line."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(str(path))
        self._said = b""
        self._count = 0

    def wait(self, text: bytes, limit_s: float) -> bytes:
        """Returns the output up to `text`. Errors: SystemExit."""
        deadline = time.monotonic() + limit_s
        while text not in self._said:
            self._sock.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data = self._sock.recv(65536)
            except TimeoutError:
                data = b""
            if not data:
                raise SystemExit(
                    f"the guest did not say {text!r}: {self._said[-1000:].decode(errors='replace')}"
                )
            self._said += data
        before, _, self._said = self._said.partition(text)
        return before

    def run(self, command: str) -> str:
        """A command's output; it must end with status 0."""
        self._count += 1
        begin, end = f"BEGIN{self._count}=", f"END{self._count}="
        # Split, so that the echo of the line is not taken for its output.
        line = f"echo B''EGIN{self._count}=; {command}; echo E''ND{self._count}=$?.\n"
        self._sock.sendall(line.encode())
        self.wait(begin.encode(), COMMAND_LIMIT_S)
        output = self.wait(end.encode(), COMMAND_LIMIT_S)
        status = self.wait(b".", COMMAND_LIMIT_S)
        if status != b"0":
            raise SystemExit(f"{command}: status {status.decode()}: {output.decode(errors='replace')[-500:]}")
        return output.decode(errors="replace")

    def close(self) -> None:
        self._sock.close()


@contextmanager
def guest(folder: Path, disks: dict[str, Path], taps: dict[str, str]) -> Iterator[tuple[Server, Shell]]:
    """A booted guest; `disks` and `taps` by side, those of `ours` being sockets of our backends."""
    cache = Cache(default_paths().cache)
    boot = kernel.build(cache)
    initrd = folder / "initrd"
    initrd.write_bytes(initramfs.build(cache, boot).read_bytes() + fio_archive())
    serial = folder / "serial.sock"
    command = [
        *qemu.find(cache).argv,
        *("-machine", "q35,accel=tcg,memory-backend=ram,usb=off,sata=off", "-cpu", "qemu64", "-m", MEMORY),
        *("-object", f"memory-backend-memfd,id=ram,size={MEMORY},share=on,seal=on"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-nic", "none"),
        *("-kernel", str(boot.vmlinux), "-initrd", str(initrd), "-append", kernel.command_line()),
        *("-serial", f"unix:{serial},server=on,wait=off"),
        *("-chardev", f"socket,id=c0,path={disks['ours']}", "-device", "vhost-user-blk-pci,chardev=c0"),
        *("-blockdev", f"driver=file,node-name=f,filename={disks['qemu']},locking=off"),
        *("-device", "virtio-blk-pci,drive=f,serial=qemu"),
        *("-chardev", f"socket,id=c1,path={taps['ours']}", "-netdev", "vhost-user,id=n0,chardev=c1"),
        *("-device", "virtio-net-pci,netdev=n0,mac=52:59:00:00:00:01,romfile="),
        *("-netdev", f"tap,id=n1,ifname={taps['qemu']},script=no,downscript=no"),
        *("-device", "virtio-net-pci,netdev=n1,mac=52:59:00:00:00:02,romfile="),
    ]
    with serve("qemu", serial, command) as server:
        shell = Shell(serial)
        try:
            shell.wait(b"RAYOS-READY", BOOT_LIMIT_S)
            shell.run("stty -echo; dmesg -n 1")
            yield server, shell
        finally:
            shell.close()


def set_up_link(name: str, network: int) -> None:
    for words in (f"addr add 10.98.{network}.1/24 dev {name}", f"link set {name} up"):
        subprocess.run(["ip", *words.split()], check=True)


def transfer(shell: Shell, network: int, *, is_out: bool) -> float:
    """Bytes a second of one TCP stream, from the guest or to it."""
    with socket.create_server((f"10.98.{network}.1", 0)) as listener:
        port = listener.getsockname()[1]
        far = f"nc 10.98.{network}.1 {port}"
        command = f"dd if=/dev/zero bs=64k count={NET_BYTES >> 16} 2>/dev/null | {far}"
        shell.run(f"({command if is_out else f'{far} >/dev/null </dev/null'}) & true")
        connection, _ = listener.accept()
        with connection:
            start = time.monotonic()
            if is_out:
                size = 0
                while data := connection.recv(1 << 20):
                    size += len(data)
            else:
                size = NET_BYTES
                connection.sendall(bytes(size))
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)  # its end: the guest has read everything
        elapsed = time.monotonic() - start
    shell.run("wait")
    if size != NET_BYTES:
        raise SystemExit(f"{size} of {NET_BYTES} bytes came")
    return size / elapsed


def fio(shell: Shell, job: Job, disk: str, seconds: float) -> float:
    """Operations a second."""
    shell.run(job.command(disk, seconds))
    result: Any = json.loads(shell.run("cat /tmp/out"))["jobs"][0]
    if result["error"]:
        raise SystemExit(f"{job.name} on {disk}: error {result['error']}")
    return float(result["write" if "write" in job.mode else "read"]["iops"])


def measure(
    shell: Shell, servers: list[Server], disks: dict[str, str], seconds: float, rounds: int
) -> list[list[str]]:
    """A row for each work; `disks` are the guest's names by side."""

    def files(job: Job) -> Callable[[str], float]:
        return lambda side: fio(shell, job, disks[side], seconds)

    works = [(job.name, 1e3, "k/s", files(job)) for job in JOBS]
    networks = {"ours": 1, "qemu": 2}

    def stream(is_out: bool) -> Callable[[str], float]:
        return lambda side: transfer(shell, networks[side], is_out=is_out)

    for is_out in (True, False):
        works.append(
            (
                "TCP guest to host" if is_out else "TCP host to guest",
                1e6,
                "MB/s",
                stream(is_out),
            )
        )
    rows = []
    for name, scale, unit, work in works:
        series = {"ours": Series(), "qemu": Series()}
        for _ in range(rounds):
            for side, one in series.items():
                before, start = sum(server.cpu_seconds for server in servers), time.monotonic()
                rate = work(side)
                elapsed = time.monotonic() - start
                used = sum(server.cpu_seconds for server in servers) - before
                one.rates.append(rate)
                done = NET_BYTES / 1e6 if unit == "MB/s" else rate * min(seconds, elapsed)
                one.cpus.append(used / done * 1e6)
        mine, peer = series["ours"], series["qemu"]
        figures = [f"{one.rate / scale:.2f} {unit} {one.spread}" for one in (peer, mine)]
        ratios = [f"{mine.rate / peer.rate:.2f}", f"{mine.cpu / peer.cpu:.2f}"]
        rows.append([name, *ratios, *figures, f"{peer.cpu:.0f}", f"{mine.cpu:.0f}"])
        print(*rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each fio run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-append", action="store_true", help="leave docs/performance.md alone")
    arguments = parser.parse_args()
    with workspace() as (folder, stack):
        rows = run(folder, stack, arguments)
    head = ["work", "× QEMU's", "CPU × QEMU's", "QEMU's", "ours", "QEMU's µs", "ours µs"]
    title = "one guest (TCG), our devices beside QEMU's own: fio and TCP (µs: of all host CPUs, an operation or a MB)"
    publish(title, table(head, rows), append=not arguments.no_append)


def run(folder: Path, stack: ExitStack, arguments: argparse.Namespace) -> list[list[str]]:
    images = {side: make_image(folder / f"{side}.img", IMAGE_BYTES) for side in ("ours", "qemu")}
    blk, net = folder / "blk.sock", folder / "net.sock"
    servers = [
        stack.enter_context(
            serve(
                "blk",
                blk,
                ours("blk", "--socket", str(blk), "--image", str(images["ours"]), "--serial", "ours"),
            )
        ),
        stack.enter_context(serve("net", net, ours("net", "--socket", str(net), "--tap", "raybench0"))),
    ]
    disks = {"ours": blk, "qemu": images["qemu"]}
    server, shell = stack.enter_context(guest(folder, disks, {"ours": str(net), "qemu": "raybench1"}))
    set_up_link("raybench0", 1)
    set_up_link("raybench1", 2)
    for index, network in ((0, 1), (1, 2)):
        shell.run(
            f"ip addr flush dev eth{index}; ip addr add 10.98.{network}.2/24 dev eth{index}; ip link set eth{index} up"
        )
        shell.run(f"ping -c 1 -W 20 10.98.{network}.1")
    names = {shell.run(f"cat /sys/block/{disk}/serial").strip(): disk for disk in ("vda", "vdb")}
    return measure(shell, [*servers, server], names, arguments.seconds, arguments.rounds)


if __name__ == "__main__":
    main()
