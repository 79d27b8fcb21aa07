"""A small machine with a TPM: real QEMU, our kernel, and a guest whose shell on the serial line answers tests.

It joins tpm/ with images/ only; no service. The guest is busybox with the TPM driver that is built into the kernel.
"""

from __future__ import annotations

import base64
import datetime
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

import trio

from rayos_images import kernel, qemu
from rayos_images.cache import Cache
from rayos_images.cpio import Archive
from rayos_tpm.authority import Authority
from rayos_tpm.launch import Tpm, start_tpm
from rayos_tpm.measurement import Measurement, in_order, of_bytes, of_command_line, of_descriptor
from rayos_tpm.phase import Phase
from rayos_tpm.qemu import qemu_arguments
from rayos_tpm.spawner import Spawner

CACHE: Final = Cache(Path("/var/cache/rayos"))
APPEND: Final = "console=ttyS0 quiet no_timer_check tsc=reliable random.trust_cpu=on cryptomgr.notests"
UUID: Final = "5b0a2f1e-7c55-4a0e-9d7b-0d4c2c1f0001"
_INITRD_AT: Final = 0x8000000
BOOT_LIMIT_S: Final = 120.0
READY: Final = "TPM-GUEST-READY"
_INIT: Final = f"""#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /bin
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mount -t securityfs sec /sys/kernel/security
stty -F /dev/ttyS0 raw -echo
exec </dev/ttyS0 >/dev/ttyS0 2>&1
echo {READY}
while read -r line; do eval "$line"; echo "=== $?"; done
"""


@cache
def initramfs(directory: Path) -> Path:
    """The guest's root, made in a directory."""
    archive = Archive()
    for path in ("bin", "dev"):
        archive.directory(path)
    archive.file("bin/busybox", Path("/bin/busybox").read_bytes(), 0o755)
    archive.file("init", _INIT.encode(), 0o755)
    archive.character_device("dev/console", 5, 1)
    built = directory / "initramfs.cpio"
    built.write_bytes(archive.finish())
    return built


@dataclass(slots=True)
class Machine:
    """A running QEMU with a TPM."""

    tpm: Tpm
    process: trio.Process
    serial: trio.SocketStream
    qmp: trio.SocketStream
    transcript: bytearray = field(default_factory=bytearray)
    _read: int = 0

    async def wait_for(self, text: str) -> str:
        """Returns the guest's output up to and including text, from where the last wait stopped."""
        wanted = text.encode()
        while (at := self.transcript.find(wanted, self._read)) < 0:
            chunk = await self.serial.receive_some()
            if not chunk:
                raise EOFError(f"no {text!r} in: {bytes(self.transcript[self._read :])!r}")
            self.transcript += chunk
        found = bytes(self.transcript[self._read : at + len(wanted)])
        self._read = at + len(wanted)
        return found.decode(errors="replace")

    async def ready(self) -> None:
        """Wait until the guest's shell listens."""
        with trio.fail_after(BOOT_LIMIT_S):
            await self.wait_for(READY)
            await self.wait_for("\n")

    async def shell(self, line: str) -> str:
        """Run a line in the guest and return what it printed; it must succeed."""
        await self.serial.send_all(line.encode() + b"\n")
        with trio.fail_after(BOOT_LIMIT_S):
            out = await self.wait_for("=== ")
            status = (await self.wait_for("\n")).strip()
        text = out.removesuffix("=== ").replace("\r", "")
        assert status == "0", f"{line!r} exited with {status}: {text}"
        return text

    async def pcrs(self) -> dict[int, bytes]:
        """The registers as the guest's kernel shows them."""
        text = await self.shell(
            'for i in $(seq 0 23); do read v </sys/class/tpm/tpm0/pcr-sha256/$i; echo "$i $v"; done'
        )
        return {
            int(index): bytes.fromhex(value) for index, value in map(str.split, text.strip().splitlines())
        }

    async def firmware_log(self) -> bytes:
        """The firmware's event log as the guest's kernel shows it."""
        return base64.b64decode(await self.shell("base64 /sys/kernel/security/tpm0/binary_bios_measurements"))

    async def command(self, frame: bytes) -> bytes:
        """Send a raw TPM command from inside the guest."""
        octal = "".join(f"\\{byte:03o}" for byte in frame)
        text = await self.shell(
            f"exec 3<>/dev/tpm0; printf '{octal}' >/t; dd if=/t bs=4096 2>/dev/null >&3; "
            "dd bs=4096 count=1 <&3 2>/dev/null | base64; exec 3>&-"
        )
        return base64.b64decode(text)

    async def execute(self, command: str, **arguments: Any) -> Any:
        """A QMP command's return value."""
        request = {"execute": command, "arguments": arguments}
        await self.qmp.send_all(json.dumps(request).encode() + b"\n")
        buffer = b""
        while True:
            buffer += await self.qmp.receive_some()
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                reply = json.loads(line)
                if "error" in reply:
                    raise RuntimeError(reply["error"]["desc"])
                if "return" in reply:
                    return reply["return"]

    async def until(self, query: str, status: str) -> None:
        """Ask by QMP until the answer has this status."""
        while (await self.execute(query)).get("status") != status:  # noqa: ASYNC110 (QMP has no event for it)
            await trio.sleep(0.05)


@dataclass(slots=True)
class Bench:
    """Where machines are built: directories, the spawner, an authority and the images.

    firmware: "qboot"; "ovmf", which the test describes; or "seabios": then the initrd is put into RAM by a loader
        device, away from the ACPI tables that QEMU's -initrd would overwrite (see rayos_vmm.qemu.arguments).
    """

    directory: Path
    spawner: Spawner
    firmware: str = "qboot"
    authority: Authority = field(init=False)
    kernel: Path = field(init=False)
    initrd: Path = field(init=False)

    def __post_init__(self) -> None:
        self.authority = Authority.open(self.directory / "authority", now=datetime.datetime.now(datetime.UTC))
        self.kernel = kernel.build(CACHE).vmlinux
        self.initrd = initramfs(self.directory)
        (self.directory / "run").mkdir(mode=0o700, exist_ok=True)

    def measurements(self) -> list[Measurement]:
        """Returns the measurements of the default machine."""
        chosen = [
            of_bytes(Phase.FIRMWARE, "firmware of QEMU", b"bios-256k"),
            of_command_line(APPEND if self.firmware == "ovmf" else self.boot_arguments()[-1]),
            of_bytes(Phase.POLICY, "policy: allow all", b"policy"),
            of_bytes(Phase.LAUNCH, f"VM {UUID}", UUID.encode()),
        ]
        for phase, path in ((Phase.KERNEL, self.kernel), (Phase.INITRD, self.initrd)):
            with path.open("rb") as file:
                chosen.append(of_descriptor(phase, f"{phase} {path.name}", file.fileno()))
        return in_order(chosen)

    def boot_arguments(self) -> list[str]:
        """QEMU's arguments for the kernel; the command line is the last."""
        kernel = ["-kernel", str(self.kernel)]
        if self.firmware == "qboot":
            return [*kernel, "-bios", "qboot.rom", "-initrd", str(self.initrd), "-append", APPEND]
        loader = f"loader,file={self.initrd},addr={_INITRD_AT:#x},force-raw=on"
        place = f"initrdmem={_INITRD_AT:#x},{self.initrd.stat().st_size} memmap=16M${_INITRD_AT:#x}"
        return [*kernel, "-device", loader, "-append", f"{APPEND} {place}"]

    async def start_tpm(self, name: str = "a", **options: Any) -> Tpm:
        """A TPM with state directory and sockets of this name's."""
        run_dir = self.directory / f"run-{name}"
        run_dir.mkdir(mode=0o700, exist_ok=True)
        defaults = {
            "vm_uuid": UUID,
            "state_dir": self.directory / f"state-{name}",
            "run_dir": run_dir,
            "measurements": self.measurements(),
            "locks_platform": self.firmware == "qboot",
        }
        return await start_tpm(self.spawner, self.authority, **{**defaults, **options})

    @asynccontextmanager
    async def boot(
        self,
        tpm: Tpm,
        *,
        model: str = "tpm-crb",
        extra: Sequence[str] = (),
        boot: Sequence[str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> AsyncIterator[Machine]:
        """A QEMU on this TPM; leaves neither."""
        sockets = {name: tpm.run_dir / name for name in ("serial", "qmp")}
        for path in sockets.values():
            path.unlink(missing_ok=True)
        boot = self.boot_arguments() if boot is None else boot
        listeners = [f"unix:{path},server=on,wait=off" for path in sockets.values()]
        found = qemu.find(CACHE)
        log = (tpm.run_dir / "qemu.log").open("ab")
        process = await trio.lowlevel.open_process(
            [*found.argv, "-accel", "tcg", "-machine", "q35", "-m", "256M", "-nodefaults", "-display", "none",
             "-no-user-config", "-serial", listeners[0], "-qmp", listeners[1], *qemu_arguments(tpm.qemu_socket, model),
             *boot, *extra],
            stderr=log.fileno(),
            pass_fds=pass_fds,
        )  # fmt: skip
        log.close()
        try:
            serial, qmp = [await _connect(path, process) for path in sockets.values()]
            async with serial, qmp:
                machine = Machine(tpm, process, serial, qmp)
                await machine.execute("qmp_capabilities")
                yield machine
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
                await tpm.stop()


async def _connect(path: Path, process: trio.Process) -> trio.SocketStream:
    with trio.fail_after(20):
        while True:
            try:
                return await trio.open_unix_socket(path)
            except (FileNotFoundError, ConnectionRefusedError):
                if process.poll() is not None:
                    raise EOFError(f"QEMU exited with {process.returncode}") from None
                await trio.sleep(0.02)
