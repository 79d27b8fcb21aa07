"""How long a guest boots on our devices, beside the same QEMU's own in-process virtio devices.

Same QEMU, kernel, initramfs, memory and devices (disk, network, GPU, three inputs, console of three ports), same
bridge and DHCP server; only who serves the devices differs. Rounds alternate; the time is from QEMU's start to the
guest's ready line. Prints a table and appends it to docs/performance.md.

    python -P -m benchmarks.boot [--rounds 5] [--no-append]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Final

import trio

from benchmarks.report import publish, table
from rayos_images import Cache, initramfs
from rayos_images import kernel as kernels
from rayos_images import qemu as qemus
from rayos_net.link import Links
from rayos_vmm.paths import default_paths
from rayos_vmm.testing.daemon import PrivateDaemon, open_daemon
from rayos_vmm.testing.open import open_guest

READY: Final = b"RAYOS-READY"
LIMIT_S: Final = 60.0
MEMORY: Final = "256M"
PORTS: Final = ("org.rayos.console", "org.rayos.agent", "org.rayos.log")


def in_process_arguments(
    qemu: qemus.Qemu, kernel: kernels.Kernel, initrd: Path, tap_fd: int, disk: Path, serial: Path
) -> list[str]:
    """QEMU with its own devices, otherwise as `rayos_vmm.qemu.arguments` has it."""
    arguments = [
        *qemu.argv,
        "-machine",
        "q35,accel=tcg,memory-backend=ram,usb=off,vmport=off,smbus=off,sata=off",
    ]
    arguments += ["-cpu", "qemu64", "-smp", "1", "-m", MEMORY]
    arguments += ["-object", f"memory-backend-memfd,id=ram,size={MEMORY},share=on"]
    arguments += ["-nodefaults", "-no-user-config", "-display", "none", "-vga", "none", "-nic", "none"]
    arguments += ["-serial", f"file:{serial}", "-device", "pvpanic-pci"]
    arguments += ["-kernel", str(kernel.vmlinux), "-initrd", str(initrd)]
    arguments += ["-append", kernels.command_line()]
    arguments += [
        "-blockdev",
        f"driver=file,node-name=disk,filename={disk}",
        "-device",
        "virtio-blk-pci,drive=disk",
    ]
    arguments += ["-netdev", f"tap,id=nic,fd={tap_fd}", "-device", "virtio-net-pci,netdev=nic,romfile="]
    arguments += ["-device", "virtio-gpu-pci"]
    for kind in ("keyboard", "mouse", "tablet"):
        arguments += ["-device", f"virtio-{kind}-pci"]
    arguments += ["-device", f"virtio-serial-pci,max_ports={len(PORTS)}"]
    for number, name in enumerate(PORTS):
        device = "virtserialport" if number else "virtconsole"
        arguments += ["-chardev", f"null,id=port{number}"]
        arguments += ["-device", f"{device},chardev=port{number},nr={number},name={name}"]
    return arguments


def boot_in_process(qemu: qemus.Qemu, kernel: kernels.Kernel, initrd: Path, bridge: str) -> float:
    """Seconds from QEMU's start to the ready line, with QEMU's own devices."""
    with tempfile.TemporaryDirectory(prefix="rayos-boot-") as name, Links() as links:
        directory = Path(name)
        disk, serial = directory / "disk.img", directory / "serial.log"
        with disk.open("wb") as file:
            file.truncate(64 << 20)
        serial.touch()
        tap_fd = links.open_tap("raybenchboot", bridge=bridge)
        os.set_inheritable(tap_fd, True)
        started = time.monotonic()
        command = in_process_arguments(qemu, kernel, initrd, tap_fd, disk, serial)
        process = subprocess.Popen(command, pass_fds=[tap_fd], stderr=subprocess.DEVNULL)
        try:
            while READY not in serial.read_bytes():
                if time.monotonic() > started + LIMIT_S:
                    raise TimeoutError(
                        f"no ready line in {LIMIT_S:.0f} s: {serial.read_text(errors='replace')[-500:]}"
                    )
                time.sleep(0.005)
            return time.monotonic() - started
        finally:
            process.kill()
            process.wait()
            os.close(tap_fd)


async def boot_ours(daemon: PrivateDaemon) -> float:
    """The same on our devices; the service notes the moments."""
    async with open_guest(daemon, disk="64MiB", memory="256MiB", tpm=False, timeout=LIMIT_S) as guest:
        boot = (await guest.view()).boot
        return (boot["ready_ms"] - boot["qemu_ms"]) / 1000


async def measure(rounds: int) -> dict[str, list[float]]:
    cache = Cache(default_paths().cache)
    qemu = qemus.find(cache)
    kernel = kernels.build(cache)
    initrd = initramfs.build(cache, kernel)
    times: dict[str, list[float]] = {"ours": [], "in-process": []}
    async with open_daemon() as daemon:
        for _ in range(rounds):
            peer = partial(boot_in_process, qemu, kernel, initrd, daemon.bridge)
            times["in-process"].append(await trio.to_thread.run_sync(peer))
            times["ours"].append(await boot_ours(daemon))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description="Boot time beside QEMU's own virtio devices.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-append", action="store_true", help="leave docs/performance.md as it is")
    arguments = parser.parse_args()
    times = trio.run(measure, arguments.rounds)
    peer = statistics.median(times["in-process"])
    rows = [
        [
            name,
            f"{statistics.median(values):.2f} s",
            f"{min(values):.2f}–{max(values):.2f} s",
            f"{statistics.median(values) / peer:.2f}",
        ]
        for name, values in times.items()
    ]
    head = ["devices", "median", "range", "× in-process"]
    title = "Boot: QEMU's start to the ready line, TCG"
    publish(title, table(head, rows), append=not arguments.no_append)


if __name__ == "__main__":
    main()
