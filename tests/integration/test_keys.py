"""Keys for a kernel with a PS/2 driver and no other: they go to the keyboard that somebody listens to, and say so."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from rayos_vmm.config.load import to_spec
from rayos_vmm.config.spec import GpuModel
from rayos_vmm.errors import Conflict, Forbidden, Invalid, NotFound
from rayos_vmm.machine.recording import Step
from rayos_vmm.machine.view import ExitReason
from tests.framework.kernel import build_kernel
from tests.integration.service_lab import expect, home, lab

pytestmark = [pytest.mark.guest, pytest.mark.root]


async def test_keys_reach_the_keyboard_that_the_kernel_reads(tmp_path: Path) -> None:
    """Single keys, text with shifts, longer than the keyboard's own queue, the mouse, and a recording done again.

    A tablet has no driver here, which is an error; without CAP_INPUT nothing is typed.
    """
    table = {
        "kernel": str(build_kernel("keys", tmp_path)),
        "memory": "16MiB",
        "net": {"enabled": False},
        "tpm": False,
        "input": {"usb": ["keyboard"], "devices": ["keyboard", "tablet"]},
    }
    async with home() as paths, lab(paths, real=True) as service:
        await service.machines.define(to_spec("keys", table, prefix="keys"))
        await service.machines.start("keys")
        await expect(service, "keys are read", name="keys")
        keys = service.guests.input("keys")
        assert await keys.listener("keyboard") == "usb"
        await service.machines.kill("keys")

        table["input"] = {"devices": ["keyboard", "tablet"]}
        await service.machines.define(to_spec("ps2", {**table, "input": {}}, prefix="keys"))
        await service.machines.start("ps2")
        await expect(service, "keys are read", name="ps2")
        keys = service.guests.input("ps2")
        assert await keys.press("ctrl-alt-delete") == "ps2"
        codes = ("1d", "38", "e0", "53", "e0", "d3", "b8", "9d")
        await expect(service, "".join(f"key 0x000000{code}\r\n" for code in codes), name="ps2")
        assert await keys.type_text("Hi, kernel: 1234567890") == "ps2"
        await expect(
            service, "key 0x0000002a\r\nkey 0x00000023\r\nkey 0x000000a3\r\nkey 0x000000aa", name="ps2"
        )
        await expect(service, "key 0x0000000b\r\nkey 0x0000008b\r\n", name="ps2")  # the last character: 0
        assert await keys.send("mouse", [(2, 0, 5), (2, 1, 7)]) == "ps2"
        await expect(service, "mouse 0x00000005", name="ps2")
        await keys.replay([Step(t=0.0, device="keyboard", events=[(1, 44, 1), (1, 44, 0)])])
        await expect(service, "key 0x0000002c\r\nkey 0x000000ac\r\n", name="ps2")
        with pytest.raises(Conflict, match="nobody listens to its tablet"):
            await keys.point(0.5, 0.5)
        with pytest.raises(NotFound, match="has no touch"):
            await keys.touch([])
        with pytest.raises(Invalid, match="no such key"):
            await keys.send("keyboard", [(1, 248, 1)])
        await service.policy.revoke_rights("ps2", ["CAP_INPUT"])
        with pytest.raises(Forbidden):
            await keys.press("q")
        await service.policy.grant("ps2", ["CAP_INPUT"], None, "it may again")
        await keys.press("q")
        await service.machines.wait("ps2", "stopped", 30)
        assert (await service.machines.get("ps2")).exit_reason is ExitReason.POWERED_OFF


async def test_displays_of_qemu_are_seen_and_an_old_board_has_none(tmp_path: Path) -> None:
    """A picture of each comes by QEMU's own screendump; ISA has neither PCI nor a display, and boots."""
    kernel = str(build_kernel("keys", tmp_path))
    bare = {"kernel": kernel, "memory": "16MiB", "net": {"enabled": False}, "tpm": False}
    boards = {model: {**bare, "gpu": {"model": model}} for model in get_args(GpuModel) if model != "virtio"}
    boards["isapc"] = {**bare, "machine": "isapc", "cpu": "pentium3", "gpu": {"enabled": False}}
    async with home() as paths, lab(paths, real=True) as service:
        for name, table in boards.items():
            await service.machines.define(to_spec(name, table, prefix=name))
            await service.machines.start(name)
        for name in boards:
            await expect(service, "keys are read", name=name)
            if name != "isapc":
                picture = await service.guests.display(name).screenshot()
                assert picture.startswith(b"\x89PNG") and len(set(picture[33:])) > 16, name
        assert await service.guests.input("isapc").press("a") == "ps2"
        await expect(service, "key 0x0000001e\r\nkey 0x0000009e", name="isapc")
