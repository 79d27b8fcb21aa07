"""A kernel of somebody else's and the board under it: processors, memory, ports, clock, and how a boot may end."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayos_vmm.config.load import to_spec
from rayos_vmm.hardware.keeper import WorkerHardware
from rayos_vmm.machine.line import LINE_PORTS
from rayos_vmm.machine.view import ExitReason
from tests.framework.kernel import as_64_bit, build_kernel
from tests.integration.service_lab import expect, home, lab

pytestmark = [pytest.mark.guest, pytest.mark.root]

BARE = {"net": {"enabled": False}, "gpu": {"enabled": False}, "tpm": False}
PORTS = {"serial": 2, "debugcon": ["0xe9", "0x402"], "debug_exit": "0xf4", "pvpanic": "isa"}


@pytest.mark.parametrize("machine", ["q35", "pc"])
async def test_a_board_has_what_was_asked_for_and_ends_as_was_asked_for(tmp_path: Path, machine: str) -> None:
    """The processors, memory, clock and ports that a specification names are there for its kernel.

    Each port that says something is a console, also to type at; a reset and a triple fault go on; the exit port's
    value is the machine's. The kernel finds its modules; a 64-bit ELF file with a multiboot header is loaded, too.
    """
    kernel = build_kernel("board", tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_text("first")
    two.write_text("second")
    table = {
        **BARE,
        "kernel": str(as_64_bit(kernel) if machine == "pc" else kernel),
        "initrd": f"{one} with words,{two}",
        "machine": machine,
        "cpus": 64,
        "memory": "4M",
        "rtc": "2038-01-19T03:14:00",
        "ports": PORTS,
        "on_triple_fault": "reset",
        "seed": 1,
        "watchdog_device": "i6300esb",
        "qemu_arguments": ["-device", "edu"],
    }
    spec = to_spec("board", table, prefix="board")
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        await service.machines.define(spec)
        view = await service.machines.start("board")
        assert view.spec.memory == "4MiB" and view.notes[0].startswith("cpus = 64 exceeds the host's")
        await expect(service, "cpus 64 rdrand upper 2944 year 0x00000038", name="board")
        await expect(service, f"module {one} with words: first\r\nmodule {two}: second\r\n", name="board")
        for port, text in ("serial2", "on COM2"), ("debugcon", "on 0xe9"), ("debugcon2", "on 0x402"):
            await expect(service, text, name="board", port=LINE_PORTS[port])
        names = [one.name for one in await service.guests.console_ports("board")]
        assert names[-4:] == ["serial", "serial2", "debugcon", "debugcon2"]
        await service.guests.console_write("board", LINE_PORTS["serial2"], b"q")
        await service.machines.wait("board", "stopped", 60)
        view = await service.machines.get("board")
        assert (view.exit_reason, view.guest_exit_code) == (ExitReason.DEBUG_EXIT, 33), view.reason
        said = (paths.vm_state("board") / "serial.log").read_text()
        assert [f"boot {number}" in said for number in range(3)] == [True] * 3
        assert "on 0x402" in (paths.vm_state("board") / "debugcon2.log").read_text()
