"""The display as a Linux guest sees it: monitors, modes from outside, the cursor; and over the worker's death."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import trio

from rayos_vmm.config.spec import Gpu, Net, VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.hardware.keeper import WorkerHardware
from rayos_vmm.qemu.arguments import command_line
from rayos_vmm.qemu.display_events import NoDisplayEvents
from rayos_vmm.service.service import Service
from rayos_vmm.shared.view import Position, Size
from rayos_vmm.testing.picture import decode_png
from tests.integration.service_lab import home, lab, running

pytestmark = [pytest.mark.guest, pytest.mark.root]

SPEC = VmSpec(
    name="svc",
    net=Net(enabled=False),
    tpm=False,
    gpu=Gpu(width=1024, height=768, modes=["800x600"], scanouts=2),
)
COLOUR = 0xFF204080


async def succeed(service: Service, command: str) -> str:
    result = await service.guests.exec("svc", command, 30)
    assert result.exit_status == 0, result
    return result.stdout.decode()


async def modes(service: Service, monitor: int) -> list[str]:
    """Returns the modes that the guest's driver has for a monitor, those that fbcon cannot use among them."""
    connector = f"/sys/class/drm/card0-Virtual-{monitor + 1}"
    return (await succeed(service, f"echo detect > {connector}/status; cat {connector}/modes")).split()


async def until_picture_is(service: Service, width: int, height: int) -> None:
    """Driven by damage, no polling."""
    display, serial = service.guests.display("svc"), 0
    with trio.fail_after(30):
        while True:
            picture = (await display.info()).scanouts[0].picture
            if (picture.width, picture.height) == (width, height):
                return
            serial = (await display.wait_damage(serial)).serial


def built(directory: Path) -> bytes:
    """The tests' helper for the guest, a static program."""
    source = Path(__file__).parent / "guest/peripherals.c"
    subprocess.run(["gcc", "-O1", "-static", "-o", directory / "peripherals", source], check=True)
    return (directory / "peripherals").read_bytes()


async def test_monitors_modes_and_cursor(tmp_path: Path) -> None:
    """Two monitors with the chosen modes; a resize from outside is on the guest's screen; a successor has it too."""
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        await running(service, SPEC)
        display = service.guests.display("svc")
        for monitor in (0, 1):
            assert await modes(service, monitor) == ["1024x768", "800x600"]
        await until_picture_is(service, 1024, 768)

        await display.resize(960, 540)
        await until_picture_is(service, 960, 540)
        assert await modes(service, 0) == ["960x540", "1024x768", "800x600"]
        picture = decode_png(await display.screenshot())
        assert (picture.width, picture.height) == (960, 540)
        await display.resize(1920, 1080, 1)
        assert (await modes(service, 1))[0] == "1920x1080"
        with pytest.raises(Invalid, match="scanout 2: 0 to 1 are there"):
            await display.resize(800, 600, 2)

        keeper = KeeperClient(paths.vm_runtime("svc"))
        await keeper.kill_worker()
        keeper.close()
        modes_now = [one.mode for one in (await display.info()).scanouts]
        assert modes_now == [Size(width=960, height=540), Size(width=1920, height=1080)]
        await display.resize(800, 600)
        await until_picture_is(service, 800, 600)

        await service.guests.write_file("svc", "/tmp/peripherals", built(tmp_path), 0o755)
        await succeed(
            service,
            "mkfifo /tmp/stop; (exec 3<>/tmp/stop; /tmp/peripherals cursor ff204080 790 -8 <&3 >/tmp/shown) &",
        )
        await succeed(service, "until grep -q shown /tmp/shown; do sleep 0.05; done")
        shown = (await display.info()).scanouts[0].cursor
        assert shown == Position(x=790, y=-8 & 0xFFFFFFFF)
        plain = decode_png(await display.screenshot())
        drawn = decode_png(await display.screenshot(with_cursor=True))
        colour = ((COLOUR >> 16) & 255, (COLOUR >> 8) & 255, COLOUR & 255)
        assert drawn.pixel(795, 55) == drawn.pixel(790, 0) == colour
        assert (
            plain.pixel(795, 55) != colour
            and drawn.pixel(789, 0) != colour
            and drawn.pixel(790, 56) != colour
        )


async def test_a_qemu_without_that_display_says_so_and_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A running guest cannot be told then: the error says what to do instead, and the mode stays."""

    def without(*arguments: Any, **options: Any) -> list[str]:
        return command_line(*arguments, **{**options, "has_dbus_display": False})

    monkeypatch.setattr("rayos_vmm.machine.build.command_line", without)
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        await service.machines.define(SPEC)
        await service.machines.start("svc")
        display = service.guests.display("svc")
        with pytest.raises(NoDisplayEvents, match="no D-Bus display"):
            await display.resize(960, 540)
        assert (await display.info()).scanouts[0].mode == Size(width=1024, height=768)
