"""Drivers that nobody here wrote, on `rayos device serve net`: each leases an address and loads a MiB, byte for byte.

Firmware, boot loaders and a Linux driver that is told to be a legacy one have a 10-byte header or a 12-byte one
(VIRTIO 1.3, 5.1.6.1). Guest memory is a plain file, so nothing here is sealed either, and the test looks into it: what
was loaded must lie there whole.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import shutil
import subprocess
import threading
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest
import trio

from rayos_images import Cache, accel, initramfs, kernel, qemu
from rayos_net.dhcp.config import BootFile, SubnetConfig
from rayos_net.dhcp.service import DhcpService, serve_dhcp
from tests.framework.target import Served
from tests.integration.tpm import uefi

pytestmark = [pytest.mark.guest, pytest.mark.root]

LIMIT_S = 120.0
TAP = f"strange{os.getpid() % 100000}"
NETWORK, SERVER = IPv4Network("10.87.3.0/24"), IPv4Address("10.87.3.1")
MIB = 1 << 20
RAM_BYTES = 256 * MIB
UBOOT = "/usr/lib/u-boot/qemu-x86_64/u-boot.rom"
IPXE, IPXE_EFI = "/boot/ipxe.lkrn", "/boot/ipxe.efi"
LEGACY, MODERN = "disable-modern=on,disable-legacy=off", "disable-legacy=on,disable-modern=off"


class Lab:
    """The network of one guest: what it finds at `SERVER` by DHCP, TFTP and HTTP, and what its machine says."""

    def __init__(self, directory: Path, network: Served, http: ThreadingHTTPServer) -> None:
        self.directory = directory
        self.network = network
        self.port = http.server_port
        self.blob = os.urandom(MIB)
        (directory / "blob").write_bytes(self.blob)
        self.cache = Cache(Path(os.environ.get("RAYOS_CACHE_DIR", "/var/cache/rayos")))
        self.dhcp: DhcpService
        self.said = b""
        self._memory = Path(f"/dev/shm/{TAP}")
        self._stream: trio.SocketStream

    @property
    def url(self) -> str:
        return f"http://{SERVER}:{self.port}"

    @asynccontextmanager
    async def machine(self, card: str, *arguments: str) -> AsyncIterator[None]:
        """A QEMU with a `virtio-net-pci` of these properties; its serial line is what `expect` reads."""
        found = qemu.find(self.cache)
        memory = f"memory-backend-file,id=m,size={RAM_BYTES},mem-path={self._memory},share=on"
        command = [
            *(*found.argv, "-m", str(RAM_BYTES // MIB), "-object", memory, "-nodefaults", "-display", "none"),
            *("-accel", accel.probe(self.cache, found).name),
            *(
                "-chardev",
                f"socket,id=net,path={self.network.path}",
                "-netdev",
                "vhost-user,id=n,chardev=net",
            ),
            *("-device", f"virtio-net-pci,netdev=n,mac=52:59:00:00:03:05,{card}"),
            *("-chardev", f"socket,id=line,path={self.directory}/line,server=on,wait=off"),
            *arguments,
        ]
        self.said = b""
        with (self.directory / "qemu.log").open("wb") as log:
            process = await trio.lowlevel.open_process(command, stdin=subprocess.DEVNULL, stderr=log)
        try:
            with trio.fail_after(30):
                while not (self.directory / "line").exists():
                    assert process.poll() is None, (self.directory / "qemu.log").read_text()
                    await trio.sleep(0.02)
            async with await trio.open_unix_socket(self.directory / "line") as self._stream:
                yield
        finally:
            process.kill()
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 30):
                await process.wait()
            (self.directory / "line").unlink(missing_ok=True)
            self._memory.unlink(missing_ok=True)

    async def expect(self, pattern: str) -> str:
        """Waits until the machine says what matches; returns it, and takes it away with all before it."""
        with trio.move_on_after(LIMIT_S):
            while (found := re.search(pattern.encode(), self.said)) is None:
                data = await self._stream.receive_some(65536)
                assert data, f"QEMU ended: {self.said[-2000:]!r}"
                self.said += data
            self.said = self.said[found.end() :]
            return found[0].decode(errors="replace")
        raise AssertionError(f"no {pattern!r} in {self.said[-3000:]!r}; {self.network.words}")

    async def type(self, text: str) -> None:
        await self._stream.send_all(text.encode())

    def has_whole(self, data: bytes) -> bool:
        """Whether these bytes lie in guest memory, in a row."""
        with self._memory.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as ram:
            return ram.find(data) >= 0

    def leased(self) -> set[str]:
        """The addresses that the network's only guest has had: some drivers have a hardware address of their own."""
        return {str(IPv4Address(one.ip)) for one in self.dhcp.leases()}


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


@asynccontextmanager
async def open_lab(directory: Path, boot: dict[int | str, str] | None = None) -> AsyncIterator[Lab]:
    """`boot` says what is loaded by whom: a file by TFTP, or with a scheme a URL; PORT is the HTTP server's."""
    with Served(directory / "net.sock", ["net", "--tap", TAP]) as network:
        network.connect().close()
        run("ip", "address", "add", f"{SERVER}/24", "dev", TAP)
        run("ip", "link", "set", TAP, "up")
        handler = partial(SimpleHTTPRequestHandler, directory=str(directory))
        with ThreadingHTTPServer((str(SERVER), 0), handler) as http:
            thread = threading.Thread(target=http.serve_forever, daemon=True)
            thread.start()
            lab = Lab(directory, network, http)
            files = {
                who: BootFile(name.replace("PORT", str(http.server_port)), None if "://" in name else SERVER)
                for who, name in (boot or {}).items()
            }
            subnet = SubnetConfig(NETWORK, SERVER, router=SERVER, probe_seconds=0.0, boot=files)
            tftp = await trio.lowlevel.open_process(
                [
                    *("dnsmasq", "-k", "--port=0", "--conf-file=/dev/null", "--user=root", "--enable-tftp"),
                    *(f"--tftp-root={directory}", f"--interface={TAP}", "--bind-interfaces"),
                    *("--except-interface=lo", "--log-facility=-", f"--pid-file={directory}/dnsmasq.pid"),
                ],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                async with trio.open_nursery() as nursery:
                    serve = partial(serve_dhcp, TAP, subnet, store=directory / "leases")
                    lab.dhcp = await nursery.start(serve)
                    yield lab
                    nursery.cancel_scope.cancel()
            finally:
                tftp.terminate()
                with trio.CancelScope(shield=True, deadline=trio.current_time() + 10):
                    await tftp.wait()
                http.shutdown()
                thread.join()


async def test_u_boot(tmp_path: Path) -> None:
    """Its driver knows neither feature. `dhcp`, then a file by TFTP from the server that `siaddr` names."""
    async with open_lab(tmp_path) as lab:
        line = ("-machine", "pc,memory-backend=m", "-bios", UBOOT, "-serial", "chardev:line")
        async with lab.machine("romfile=", *line):
            await lab.expect("Hit any key")
            await lab.type("\n")
            await lab.expect("=> ")
            await lab.type("virtio scan; setenv autoload no; dhcp\n")
            (address,) = re.findall(r"10\.87\.3\.\d+", await lab.expect(r"bound to address 10\.87\.3\.\d+ "))
            assert lab.leased() == {address}
            await lab.expect("=> ")
            await lab.type(f"tftpboot 0x2000000 blob; crc32 0x2000000 {MIB:x}\n")
            await lab.expect(f"Bytes transferred = {MIB} ")
            await lab.expect(f"==> {zlib.crc32(lab.blob):08x}")
            assert lab.has_whole(lab.blob)


@pytest.mark.parametrize("mode", [LEGACY, MODERN], ids=["legacy", "modern"])
async def test_ipxe(tmp_path: Path, mode: str) -> None:
    """iPXE as Debian has it, in both modes: an address by DHCP, a script and a file by HTTP."""
    async with open_lab(tmp_path, {"ipxe": "http://10.87.3.1:PORT/script"}) as lab:
        script = f"#!ipxe\nimgfetch {lab.url}/blob\necho FETCHED ${{net0/ip}}\nsleep 600\n"
        (tmp_path / "script").write_text(script)
        machine = ("-machine", "pc,graphics=off,memory-backend=m", "-kernel", IPXE, "-serial", "chardev:line")
        async with lab.machine(f"{mode},romfile=", *machine):
            said = await lab.expect(r"FETCHED 10\.87\.3\.\d+")
            assert lab.leased() == {said.split()[1]}
            assert lab.has_whole(lab.blob)


@pytest.mark.parametrize("merge", ["on", "off"])
async def test_linux_as_a_legacy_driver(tmp_path: Path, merge: str) -> None:
    """`virtio_pci.force_legacy=1`, with and without MRG_RXBUF: a lease, a MiB, and the features that it has."""
    async with open_lab(tmp_path) as lab:
        built = kernel.build(lab.cache)
        machine = [
            *("-machine", "q35,memory-backend=m", "-kernel", str(built.vmlinux)),
            *("-initrd", str(initramfs.build(lab.cache, built)), "-serial", f"file:{tmp_path}/serial"),
            *("-device", "virtio-serial-pci", "-device", "virtconsole,chardev=line,name=console"),
            *("-append", "console=ttyS0 quiet virtio_pci.force_legacy=1 no_timer_check tsc=reliable"),
        ]
        async with lab.machine(f"disable-legacy=off,mrg_rxbuf={merge},romfile=", *machine):
            await lab.expect("# ")
            await lab.type("stty -echo; until ip addr show eth0 | grep -q 'inet 10.87'; do sleep 0.2; done\n")
            await lab.type("cat /sys/class/net/eth0/device/features; ip -4 -o addr show eth0\n")
            bits = await lab.expect(r"[01]{64}\r\n")
            # VERSION_1, ANY_LAYOUT, MRG_RXBUF
            assert (bits[32], bits[27], bits[15]) == ("0", "1", "1" if merge == "on" else "0")
            address = (await lab.expect(r"inet 10\.87\.3\.\d+")).split()[1]
            assert lab.leased() == {address}
            await lab.type(f"busybox wget -q -O - {lab.url}/blob | busybox sha256sum\n")
            assert hashlib.sha256(lab.blob).hexdigest() == (await lab.expect("[0-9a-f]{64}"))
            await lab.type(
                f"busybox dd if=/dev/zero bs=1400 count=1 | busybox nc -u -w 1 {SERVER} 9; echo gone\n"
            )
            await lab.expect("gone")


async def test_ovmf_boots_by_pxe(tmp_path: Path) -> None:
    """A program of two MiB, loaded by the firmware's own driver and TFTP, runs and loads a MiB.

    Where the firmware had the program is free again when it runs, so what is compared is what the program loads.
    """
    async with open_lab(tmp_path, {7: "boot.efi", "ipxe": f"http://{SERVER}:PORT/script"}) as lab:
        write_program(tmp_path / "boot.efi")
        script = f"#!ipxe\nimgfetch {lab.url}/blob\nprompt LOADED ${{net0/ip}}\n"
        (tmp_path / "script").write_text(script)
        files = uefi.build(lab.cache)
        shutil.copy(files.variables, tmp_path / "vars")
        machine = [
            *("-machine", "q35,memory-backend=m", "-device", "virtio-rng-pci", "-serial", "chardev:line"),
            *("-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={files.code}"),
            *("-drive", f"if=pflash,format=raw,unit=1,file={tmp_path / 'vars'}"),
        ]
        async with lab.machine("romfile=,bootindex=1", *machine):
            await lab.expect(">>Start PXE over IPv4")
            said = await lab.expect(r"LOADED 10\.87\.3\.\d+")
            assert said.split()[1] in lab.leased()
            assert lab.has_whole(lab.blob)


def write_program(path: Path) -> None:
    """iPXE as a UEFI program, and as many bytes behind it as make two MiB."""
    path.write_bytes(Path(IPXE_EFI).read_bytes().ljust(2 * MIB, b"\xa5"))


async def test_dpdk_s_virtio_user(tmp_path: Path) -> None:
    """A user-space driver, unmodified, without huge pages: its memory is an unsealed memfd."""
    socket = tmp_path / "echo.sock"
    with Served(socket, ["net", "--echo"]) as network:
        network.connect().close()
        command = [
            *("dpdk-testpmd", "--no-huge", "--no-pci", "-m", "256", "-l", "0,1", "--no-telemetry"),
            *(f"--vdev=net_virtio_user0,path={socket},queues=1", f"--file-prefix={TAP}"),
            *(
                "--",
                "--forward-mode=io",
                "--auto-start",
                "--tx-first",
                "--total-num-mbufs=2048",
                "--stats-period",
                "1",
            ),
        ]
        async with trio.open_nursery() as nursery:
            start = partial(
                trio.run_process,
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
            process: trio.Process = await nursery.start(start)
            said = b""
            with trio.fail_after(60):
                assert process.stdout is not None
                async for data in process.stdout:
                    said += data
                    counts = [int(one) for one in re.findall(rb"RX-packets: (\d+)", said)]
                    if counts and max(counts) > 10_000:
                        break
                else:
                    raise AssertionError(f"{said.decode(errors='replace')[-2000:]}\n{network.words}")
            process.terminate()
        assert "session ended" not in network.words.replace("session ended: the frontend left", "")
