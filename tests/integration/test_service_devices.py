"""A guest with everything: five devices of ours, an address from our DHCP, a TPM, an agent; and its adoption."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from rayos_vmm.config.load import resolve_paths
from rayos_vmm.config.spec import Disk, Input, Net, VmSpec
from rayos_vmm.errors import Busy, GuestGone, Invalid, NotFound, Timeout_
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.hardware.keeper import WorkerHardware
from rayos_vmm.hardware.protocols import Plugged
from rayos_vmm.machine.recording import Step
from rayos_vmm.machine.view import ExitReason, VmState
from rayos_vmm.service.service import Service
from tests.integration.service_lab import expect, home, lab, multiboot, running, traces
from tests.integration.test_service_adopt import killed_service

pytestmark = [pytest.mark.guest, pytest.mark.root]

Event = tuple[int, int, int]

FULL = VmSpec(name="svc", disks=[Disk(size="16MiB", serial="sixteen")])


async def succeed(service: Service, command: str) -> str:
    """Returns the output of a command in the guest; it must end with status 0."""
    result = await service.guests.exec("svc", command, 30)
    assert result.exit_status == 0, result
    return result.stdout.decode()


def pixels_of(png: bytes) -> tuple[int, int, bytes]:
    """Width, height and RGB rows (each behind its filter byte) of one of our PNGs."""
    width, height = struct.unpack_from(">II", png, 16)
    start = png.index(b"IDAT") + 4
    (size,) = struct.unpack_from(">I", png, start - 8)
    return width, height, zlib.decompress(png[start : start + size])


async def test_a_guest_has_all_devices_an_address_and_a_tpm() -> None:
    """Seen from inside by the agent, from outside by the service, and gone without a trace."""
    async with home() as paths, lab(paths, hardware=WorkerHardware(), network=True) as service:
        before = traces(paths)
        await running(service, FULL)
        view = await service.machines.get("svc")
        assert view.address is not None and view.address.startswith("10.86.")
        assert (await succeed(service, "cat /sys/class/net/eth0/address")).strip() == view.mac
        leases = await service.dhcp.leases()
        assert [(one.address, one.mac) for one in leases if one.state == "bound"] == [
            (view.address, view.mac)
        ]
        await trio.run_process(["ping", "-c", "1", "-W", "5", view.address], capture_stdout=True)
        assert f"Address: {view.address}" in await succeed(service, "nslookup svc.guest.rayos")
        assert "name = svc.guest.rayos" in await succeed(service, f"nslookup {view.address}")

        assert (await succeed(service, "blockdev --getsize64 /dev/vda")).strip() == str(16 << 20)
        assert (await succeed(service, "cat /sys/block/vda/serial")).strip() == "sixteen"
        await succeed(service, "echo on disk | dd of=/dev/vda conv=fsync 2>/dev/null")
        image = paths.vm_state("svc") / "disk-0.img"
        assert image.read_bytes().startswith(b"on disk\n")

        assert (await succeed(service, "ls /dev/tpm0")).strip() == "/dev/tpm0"
        devices = await succeed(service, "cat /proc/bus/input/devices")
        assert devices.count("virtio") >= 3

        # VIRTIO 1.3, 6: RING_RESET is bit 40. No reset of one queue reaches a backend, so no device has it.
        resets = await succeed(
            service,
            "cd /sys/bus/virtio/devices; for d in *; do echo $(cat $d/device) $(cut -c41 $d/features); done",
        )
        assert sorted(set(resets.splitlines())) == [f"0x{number:04x} 0" for number in (1, 2, 3, 4, 16, 18)]

        stats = await service.guests.stats("svc")
        assert {"disk0", "net", "gpu", "keyboard", "mouse", "tablet", "console"} <= set(stats)

        await service.guests.write_file("svc", "/tmp/file", bytes(range(256)) * 1000, 0o640)
        assert await service.guests.read_file("svc", "/tmp/file") == bytes(range(256)) * 1000
        assert (await succeed(service, "stat -c %a /tmp/file")).strip() == "640"
        with pytest.raises(NotFound, match="/none: No such file"):
            await service.guests.read_file("svc", "/none")
        failed = await service.guests.exec("svc", ["sh", "-c", "echo out; echo err >&2; exit 7"], 10)
        assert (failed.exit_status, failed.stdout, failed.stderr) == (7, b"out\n", b"err\n")
        with pytest.raises(Timeout_, match=r"did not answer within 0\.5 s"):
            await service.guests.exec("svc", "sleep 100", 0.5)
        with pytest.raises(Invalid, match="NUL"):
            await service.guests.exec("svc", "echo \0", 5)
        assert "sleep 100" not in await succeed(service, "ps")

        ended = await service.machines.stop("svc", 20)
        assert (ended.state, ended.exit_reason) == (VmState.STOPPED, ExitReason.STOPPED)
        assert traces(paths) == before


async def test_a_disk_keeps_its_data_and_the_tpm_its_identity_over_a_restart() -> None:
    """A stopped machine starts with the disk and the TPM that it had, and the same address."""
    async with home() as paths, lab(paths, hardware=WorkerHardware(), network=True) as service:
        await running(service, FULL)
        address = (await service.machines.get("svc")).address
        await succeed(service, "echo kept | dd of=/dev/vda conv=fsync 2>/dev/null")
        await service.machines.stop("svc", 20)
        await service.machines.start("svc")
        await service.machines.wait("svc", "ready", 60)
        assert await succeed(service, "head -c 5 /dev/vda") == "kept\n"
        assert (await service.machines.get("svc")).address == address
        await service.machines.reset("svc")
        await service.machines.wait("svc", "ready", 60)
        assert await succeed(service, "echo after reset") == "after reset\n"


async def test_what_the_guest_draws_is_in_the_picture() -> None:
    """A framebuffer filled with one colour is that colour in our PNG; the damage tells when, also across a kill."""
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        await running(service, VmSpec(name="svc", net=Net(enabled=False), tpm=False))
        await succeed(service, "echo 0 > /sys/class/vtconsole/vtcon1/bind || true")
        # In one write: Linux 6.1 reports no damage for a write that ends with its line.
        blue_green_red = r"\x30\x20\x10\x00"
        fill = f"printf '{blue_green_red}' > /tmp/p; for i in 1 2 3 4 5 6 7 8 9 10; do cat /tmp/p /tmp/p > /tmp/q;"
        fill += " mv /tmp/q /tmp/p; done; for i in $(seq 1000); do cat /tmp/p; done"
        display = service.guests.display("svc")
        serial = (await display.info()).serial
        await succeed(service, f"({fill}) | dd of=/dev/fb0 bs=4096000 iflag=fullblock")
        with trio.fail_after(20):
            while True:
                damage = await display.wait_damage(serial)
                serial = damage.serial
                width, height, rows = pixels_of(await display.screenshot())
                if rows == (b"\0" + b"\x10\x20\x30" * width) * height:
                    break
        assert damage.x + damage.width <= width and damage.y + damage.height <= height
        keeper = KeeperClient(paths.vm_runtime("svc"))
        await keeper.kill_worker()
        keeper.close()
        again = await display.wait_damage(serial)
        assert again.serial > serial and (again.width, again.height) == (width, height)
        with pytest.raises(Timeout_, match="nothing changed on scanout 0"):
            await display.wait_damage(again.serial, timeout_s=0.2)
        with pytest.raises(Invalid, match="scanout 1: 0 to 0 are there"):
            await display.screenshot(1)
        assert (width, height) == (1280, 800)


async def test_a_kernel_without_a_gpu_driver_has_a_vga_screen() -> None:
    """A hobby kernel that writes to text memory is seen, by QEMU's own picture."""
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        kernel = paths.state / "kernel"
        kernel.write_bytes(multiboot(bytes.fromhex("66c705 00800b00 db1f f4 ebfd")))  # a block, white on blue
        await service.machines.define(
            VmSpec(name="svc", kernel=str(kernel), net=Net(enabled=False), tpm=False)
        )
        await service.machines.start("svc")
        with trio.fail_after(20):
            while True:
                width, height, rows = pixels_of(await service.guests.display("svc").screenshot())
                if (width, height) == (720, 400) and rows[1:4] == b"\xff\xff\xff":
                    break
                await trio.sleep(0.1)


async def test_a_disk_image_boots_by_its_own_boot_sector() -> None:
    """From our block device by BIOS; what it writes on its screen is seen, what it writes to the line is read."""
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        disk = paths.state / "disk.img"
        code = bytes.fromhex("b8550e bb0700 cd10 baf803 b04f ee f4 ebfd")  # BIOS teletype 'U'; out 0x3f8, 'O'
        disk.write_bytes(code.ljust(510, b"\0") + b"\x55\xaa" + bytes(1 << 20))
        spec = VmSpec(name="svc", disks=[Disk(path=str(disk))], net=Net(enabled=False), tpm=False)
        await service.machines.define(resolve_paths(spec, paths.state))
        await service.machines.start("svc")
        await expect(service, "O")
        assert (await service.guests.stats("svc"))["disk0"]["operations"]["disk.read"]["allowed"] > 0
        width, height, rows = pixels_of(await service.guests.display("svc").screenshot())
        assert (width, height) == (720, 400) and any(rows)


async def test_a_qemu_without_the_console_device_has_the_same_ports() -> None:
    """The shell, the agent and the log behind QEMU's own virtconsole, also after the worker was replaced."""

    class Fallback(WorkerHardware):
        async def plug(self, spec: VmSpec, **arguments: Any) -> Plugged:
            return await super().plug(spec, **{**arguments, "has_console": False})

    async with home() as paths, lab(paths, hardware=Fallback()) as service:
        await running(service, VmSpec(name="svc", net=Net(enabled=False), tpm=False))
        assert "org.rayos.agent" in await succeed(service, "ls /dev/virtio-ports")
        await service.guests.write_file("svc", "/tmp/file", bytes(range(256)) * 1000)
        keeper = KeeperClient(paths.vm_runtime("svc"))
        await keeper.kill_worker()
        keeper.close()
        assert await service.guests.read_file("svc", "/tmp/file") == bytes(range(256)) * 1000


async def seen_by_guest(
    service: Service, device: str, count: int, act: Callable[[], Awaitable[object]]
) -> list[Event]:
    """The first `count` events (type, code, value) of an input device while `act` happens."""
    names = await succeed(service, "grep -H . /sys/class/input/event*/device/name")
    (line,) = [line for line in names.splitlines() if f"rayos {device}" in line.lower()]
    node = "/dev/input/" + line.split("/")[4]
    output: list[str] = []

    async def read() -> None:
        output.append(await succeed(service, f"head -c {24 * count} {node} | base64"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.sleep(1)  # the agent carries one command at a time, so nobody can say when `head` reads
        await act()
    data = base64.b64decode(output[0])
    return [struct.unpack_from("<HHi", data, 24 * index + 16) for index in range(count)]


async def test_keys_and_pointer_arrive_in_the_guest() -> None:
    """Keys typed and pressed and pointer motions are those that evdev reports."""
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        chosen = Input(devices=("keyboard", "mouse", "tablet", "touch"), layout="de")
        await running(service, VmSpec(name="svc", net=Net(enabled=False), tpm=False, input=chosen))
        a, left_shift, ctrl, c = 30, 42, 29, 46
        typed = await seen_by_guest(
            service, "keyboard", 12, lambda: service.guests.input("svc").type_text("aA")
        )
        pressed = [(code, value) for kind, code, value in typed if kind == 1]
        assert pressed == [(a, 1), (a, 0), (left_shift, 1), (a, 1), (a, 0), (left_shift, 0)]
        combo = await seen_by_guest(
            service, "keyboard", 8, lambda: service.guests.input("svc").press("ctrl-c")
        )
        pressed = [(code, value) for kind, code, value in combo if kind == 1]
        assert pressed == [(ctrl, 1), (c, 1), (c, 0), (ctrl, 0)]
        moved = await seen_by_guest(
            service, "tablet", 4, lambda: service.guests.input("svc").point(0.5, 1.0, ["left"])
        )
        assert moved == [(3, 0, 16384), (3, 1, 32767), (1, 0x110, 1), (0, 0, 0)]
        with pytest.raises(Invalid, match="is on no key of layout"):
            await service.guests.input("svc").type_text("\N{SNOWMAN}")
        with pytest.raises(Invalid, match="nokey"):
            await service.guests.input("svc").press("ctrl-nokey")
        with pytest.raises(Invalid, match="a place at 2"):
            await service.guests.input("svc").point(2, 0)

        seat = service.guests.input("svc")
        y = 21
        typed = await seen_by_guest(service, "keyboard", 4, lambda: seat.type_text("z"))
        assert [code for kind, code, value in typed if kind == 1] == [y, y]  # the machine's layout
        typed = await seen_by_guest(service, "keyboard", 4, lambda: seat.type_text("é", "fr"))
        assert [code for kind, code, value in typed if kind == 1] == [3, 3]  # the key of 2
        moved = await seen_by_guest(service, "mouse", 5, lambda: seat.move(5, -7, 1, ["right"]))
        assert moved == [(2, 0, 5), (2, 1, -7), (2, 8, 1), (1, 0x111, 1), (0, 0, 0)]

        async def two_fingers() -> None:
            await seat.touch([(0, 1), (0.5, 0.5)])
            await seat.touch([(0, 1)])

        touched = await seen_by_guest(service, "touch", 10, two_fingers)
        assert touched == [
            *(
                (3, 0x39, 0),
                (3, 0x36, 32767),
                (3, 0x2F, 1),
                (3, 0x39, 1),
                (3, 0x35, 16384),
                (3, 0x36, 16384),
            ),
            *((1, 0x14A, 1), (0, 0, 0), (3, 0x39, -1), (0, 0, 0)),
        ]
        held = {one.device: one.held for one in await seat.devices()}
        assert held == {
            "keyboard": [],
            "mouse": ["btn_right"],
            "tablet": ["btn_left"],
            "touch": ["btn_touch", "finger 0"],
        }


async def test_lights_recording_and_replay() -> None:
    """Caps Lock lights up and is told, also by a successor; what was recorded arrives again, in its order and time."""
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        await running(service, VmSpec(name="svc", net=Net(enabled=False), tpm=False))
        seat = service.guests.input("svc")

        async def lights() -> list[str]:
            (keyboard,) = [one for one in await seat.devices() if one.device == "keyboard"]
            leds: list[str] = keyboard.leds
            return leds

        with seat.record() as recording:
            await seen_by_guest(service, "keyboard", 4, lambda: seat.press("capslock"))
            assert await lights() == ["caps"]  # its kernel does that before any program sees the key
            await seat.type_text("ab")
            await seat.point(0.25, 0.75)
            steps = [await anext(recording) for _ in range(3)]
        assert [step.device for step in steps] == ["keyboard", "keyboard", "tablet"]
        keeper = KeeperClient(paths.vm_runtime("svc"))
        await keeper.kill_worker()
        keeper.close()
        assert await lights() == ["caps"]
        again = await seen_by_guest(service, "keyboard", 12, lambda: seat.replay(steps, 1000))
        capslock, a, b = 58, 30, 48
        keys = [(code, value) for kind, code, value in again if kind == 1]
        assert keys == [(capslock, 1), (capslock, 0), (a, 1), (a, 0), (b, 1), (b, 0)]

        stuck = [
            Step(t=0, device="keyboard", events=[(1, a, 1)]),
            Step(t=60, device="keyboard", events=[(1, a, 0)]),
        ]
        with trio.move_on_after(1):
            await seat.replay(stuck)
        assert all(not one.held for one in await seat.devices())


async def test_the_console_answers_and_survives_its_worker() -> None:
    """The shell on port 0 types back, also after the worker was killed under the guest."""
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        await running(service, VmSpec(name="svc", net=Net(enabled=False), tpm=False))
        keeper = KeeperClient(paths.vm_runtime("svc"))
        for word in ("one", "two"):
            with trio.fail_after(20):
                async with service.guests.console_stream("svc", 0, 0) as chunks:
                    await service.guests.console_write("svc", 0, f"echo {word}$((1+1))\n".encode())
                    seen = b""
                    async for _, data in chunks:
                        seen += data
                        if f"{word}2".encode() in seen:
                            break
            assert await succeed(service, f"echo {word}") == f"{word}\n"
            await keeper.kill_worker()
        keeper.close()
        with pytest.raises(NotFound):
            await service.guests.console_write("svc", 7, b"x")


async def test_a_guest_with_everything_is_adopted() -> None:
    """Devices, TPM, tap and lease go on while nobody serves; the next service has them all at hand."""
    async with home() as paths:
        before = traces(paths)
        spec = FULL
        async with (
            killed_service(paths, spec, after="started", ready=True, full=True),
            lab(paths, hardware=WorkerHardware(), network=True) as service,
        ):
            view = await service.machines.get("svc")
            assert view.is_ready and view.address is not None
            assert await succeed(service, "echo still here") == "still here\n"
            assert (await service.guests.display("svc").screenshot()).startswith(b"\x89PNG")
            await trio.run_process(["ping", "-c", "1", "-W", "5", view.address], capture_stdout=True)
            assert (await service.machines.stop("svc", 20)).exit_reason is ExitReason.STOPPED
        assert traces(paths) == before


@pytest.mark.parametrize("delay_s", [0.02, 0.08, 0.14, 0.2, 0.26, 0.32])
async def test_a_service_killed_at_any_moment_of_a_start_leaves_nothing_lost(delay_s: float) -> None:
    """Whatever had been started is found by the next service: taken over, or ended without a trace."""
    async with home() as paths:
        before = traces(paths)
        async with (
            killed_service(paths, FULL, after="defined", full=True, delay_s=delay_s),
            lab(paths, hardware=WorkerHardware(), network=True) as service,
        ):
            if (await service.machines.get("svc")).state is VmState.RUNNING:
                await service.machines.wait("svc", "ready", 60)
                assert await succeed(service, "echo alive") == "alive\n"
                await service.machines.kill("svc")
            assert traces(paths) == before
            await service.machines.remove("svc")


async def test_failed_starts_leave_nothing_and_say_why() -> None:
    """One sentence each; no process, socket, tap or directory of a run is left."""
    async with home() as paths, lab(paths, hardware=WorkerHardware(), network=True) as service:
        before = traces(paths) | links()
        text = paths.state / "text"
        text.write_text("no kernel")
        cases: list[tuple[VmSpec, type[Exception], str]] = [
            (VmSpec(name="svc", kernel="/none/vmlinuz"), Invalid, "kernel /none/vmlinuz cannot be read"),
            (VmSpec(name="svc", kernel=str(text)), Invalid, "starts with 6e 6f 20 6b"),
            (VmSpec(name="svc", memory="4096GiB"), Invalid, "exceeds the"),
            (VmSpec(name="svc", disks=[Disk(path="/none/disk")]), Invalid, "/none/disk does not exist"),
        ]
        for spec, kind, message in cases:
            with pytest.raises(kind, match=message):
                await service.machines.define(spec)
                await service.machines.start("svc")
            assert traces(paths) | links() == before
            if await service.machines.list():
                view = await service.machines.get("svc")
                assert (view.state, view.exit_reason) == (VmState.FAILED, ExitReason.START_FAILED)
                await service.machines.remove("svc")

        await service.machines.define(VmSpec(name="svc"))
        tpm = paths.vm_state("svc") / "tpm"
        tpm.mkdir(parents=True)
        (tpm / "tpm2-00.permall").write_bytes(b"damaged")
        with pytest.raises(GuestGone, match="TPM"):
            await service.machines.start("svc")
        assert traces(paths) | links() == before
        await service.machines.remove("svc")


async def test_a_busy_tap_is_told_with_its_holder() -> None:
    """Somebody else's machine has the name: who, and nothing is left of ours."""
    async with home() as paths, home() as others:
        async with lab(paths, hardware=WorkerHardware(), network=True) as service:
            await running(service, VmSpec(name="svc", tpm=False))
            async with lab(others, hardware=WorkerHardware(), network=True, bridge="raytest1") as other:
                before = traces(others)
                await other.machines.define(VmSpec(name="svc", tpm=False))
                with pytest.raises(Busy, match=r"tap ray-svc-0 is in use by process \d+"):
                    await other.machines.start("svc")
                assert traces(others) == before


def links() -> set[str]:
    """The names of our taps."""
    return {link.name for link in Path("/sys/class/net").iterdir() if link.name.startswith("ray-")}
