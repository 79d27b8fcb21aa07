"""Is every device of a guest there and at work? Each check looks from inside the guest and from outside, and
compares. Used by `rayos smoke`.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import struct
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Final

import trio

from rayos_vmm.machine.machine import PICTURE
from rayos_vmm.testing.daemon import PrivateDaemon
from rayos_vmm.testing.guest import SHELL_PORT, Guest
from rayos_vmm.testing.picture import Picture, decode_png, decode_ppm
from rayos_vmm.testing.ping import ping

WAIT_S: Final = 10.0
RETRY_S: Final = 0.1
DISK_BYTES: Final = 8 << 20
INPUT_EVENT: Final = struct.Struct("<qqHHi")  # struct input_event (linux/input.h) of a 64-bit guest
EV_KEY, EV_ABS, KEY_A, ABS_X, ABS_MAXIMUM = 1, 3, 30, 0, 32767
BAND, BAND_ROWS = (
    5,
    64,
)  # the fifth band of 64 rows: one write, for Linux 6.1 loses the damage of a single row
COLOUR: Final = (0x30, 0xC0, 0x60)  # red, green, blue

#: What a check has seen.
Facts = dict[str, str | int | float | bool | list[str]]


class Wrong(AssertionError):
    """One side saw something else than the other side did."""


def need(claim: bool, otherwise: str) -> None:
    """Raises Wrong with `otherwise` unless `claim` holds."""
    if not claim:
        raise Wrong(otherwise)


async def check_disk(guest: Guest, daemon: PrivateDaemon) -> Facts:
    """Checks that data the guest writes and syncs is in the image, and is read back past the guest's cache."""
    blocks = DISK_BYTES >> 20
    await guest.succeed(f"dd if=/dev/urandom of=/dev/vda bs=1M count={blocks} conv=fsync 2>/dev/null")
    inside = await guest.succeed(
        f"echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M count={blocks} 2>/dev/null | sha256sum"
    )
    image = trio.Path(daemon.paths.vm_state(guest.name) / "disk-0.img")
    async with await image.open("rb") as file:
        outside = hashlib.sha256(await file.read(DISK_BYTES)).hexdigest()
    need(inside.split()[0] == outside, f"the guest reads {inside.split()[0]}, the host {outside}")
    return {"bytes": DISK_BYTES, "sha256": outside}


async def check_lease(guest: Guest, daemon: PrivateDaemon) -> Facts:
    """The guest has the address that our DHCP server says it gave to its card."""
    inside = await guest.succeed("ip -4 -o address show dev eth0; cat /sys/class/net/eth0/address")
    address, card = re.search(r"inet ([0-9.]+)/", inside), inside.split()[-1]
    leases = {lease.mac: lease.address for lease in await daemon.client.leases()}
    need(address is not None, f"eth0 has no address: {inside}")
    seen = address[1] if address else ""
    need(leases.get(card) == seen, f"the guest's {card} has {seen}, the lease says {leases.get(card)}")
    return {"address": seen, "mac": card}


async def check_network(guest: Guest, daemon: PrivateDaemon) -> Facts:
    """The host reaches the guest, and the guest the host."""
    address = (await guest.view()).address or ""
    outside = await ping(address, timeout=WAIT_S)
    subnet = ipaddress.ip_network((await daemon.client.info()).subnet or "")
    host = str(subnet[1])  # the bridge's own
    await guest.succeed(f"ping -c 1 -W {WAIT_S:.0f} {host}")
    return {"host_to_guest_ms": round(outside * 1000, 2), "host": host}


async def _events_of(
    guest: Guest, device: str, act: Callable[[], Awaitable[None]], count: int
) -> list[tuple[int, ...]]:
    """(type, code, value) of the first `count` events that the guest's `device` gives once `act` is done."""
    listing = await guest.succeed("cat /proc/bus/input/devices")
    found = re.search(rf'Name="{device}".*?Handlers=[^\n]*\b(event\d+)', listing, re.DOTALL)
    need(found is not None, f"the guest has no {device!r}: {listing}")
    node = found[1] if found else ""
    await guest.succeed(
        f"cat /dev/input/{node} >/tmp/{node} 2>/dev/null & "
        f"until ls -l /proc/$!/fd 2>/dev/null | grep -q {node}; do usleep 10000; done"
    )
    await act()
    size = INPUT_EVENT.size * count
    await guest.wait_until_succeeds(f"[ $(wc -c </tmp/{node}) -ge {size} ]", timeout=WAIT_S)
    await guest.execute("killall cat")
    data = await guest.read_file(f"/tmp/{node}")
    return [
        event[2:]
        for event in INPUT_EVENT.iter_unpack(data[: len(data) // INPUT_EVENT.size * INPUT_EVENT.size])
    ]


async def check_keyboard(guest: Guest, daemon: PrivateDaemon) -> Facts:
    """A key that we press arrives in the guest, down and up."""
    events = await _events_of(guest, "RayOS keyboard", partial(guest.send_key, "a"), 4)
    keys = [event for event in events if event[0] == EV_KEY]
    need(keys[:2] == [(EV_KEY, KEY_A, 1), (EV_KEY, KEY_A, 0)], f"the guest saw {events}")
    return {"events": len(events)}


async def check_pointer(guest: Guest, daemon: PrivateDaemon) -> Facts:
    """The place that we point at is the one that the guest sees."""
    events = await _events_of(guest, "RayOS tablet", partial(guest.move_pointer, 0.25, 0.75), 3)
    places = [value for kind, code, value in events if (kind, code) == (EV_ABS, ABS_X)]
    need(bool(places) and abs(places[0] - ABS_MAXIMUM // 4) <= 1, f"the guest saw {events}")
    return {"x": places[0]}


async def _until_shown(look: Callable[[], Awaitable[Picture]], x: int, y: int) -> tuple[int, int, int]:
    """The pixel, once it has the colour that was drawn, or what it has when the time is up."""
    deadline = trio.current_time() + WAIT_S
    while True:
        pixel = (await look()).pixel(x, y)
        if pixel == COLOUR or trio.current_time() > deadline:
            return pixel
        await trio.sleep(RETRY_S)  # the guest's driver flushes its framebuffer when it likes


async def check_display(guest: Guest, daemon: PrivateDaemon) -> Facts:
    """A colour drawn in the guest's framebuffer is the colour in our picture and in QEMU's."""
    graphics = "/sys/class/graphics/fb0"
    shape = await guest.succeed(f"cat {graphics}/virtual_size {graphics}/bits_per_pixel {graphics}/stride")
    size, depth, stride = shape.split()
    width = int(size.split(",")[0])
    need(depth == "32", f"the framebuffer has {depth} bits a pixel; 32 are expected")
    red, green, blue = COLOUR
    band = (bytes((blue, green, red, 0)) * width).ljust(int(stride), b"\0") * BAND_ROWS
    await guest.write_file("/tmp/band", band)
    await guest.succeed(f"dd if=/tmp/band of=/dev/fb0 bs={len(band)} seek={BAND} 2>/dev/null")
    x, y = width // 2, BAND * BAND_ROWS + BAND_ROWS // 2

    async def ours() -> Picture:
        return decode_png(await guest.screenshot())

    async def qemus() -> Picture:
        path = daemon.paths.vm_runtime(guest.name) / PICTURE
        await guest.qmp("screendump", filename=str(path))
        return decode_ppm(await trio.Path(path).read_bytes())

    for whose, look in (("our picture", ours), ("QEMU's screendump", qemus)):
        pixel = await _until_shown(look, x, y)
        need(pixel == COLOUR, f"{whose} has {pixel} at {x},{y}; {COLOUR} was drawn")
    return {"colour": "#" + bytes(COLOUR).hex(), "size": size}


async def check_console(guest: Guest, daemon: PrivateDaemon) -> Facts:
    """The shell answers, and knows the size of the terminal."""
    await daemon.client.console_resize(guest.name, SHELL_PORT, 132, 43)
    await guest.console.send("echo smoke-$((6*7)); stty size\n")
    await guest.console.expect("smoke-42", timeout=WAIT_S)
    await guest.console.expect(re.compile(r"\b43 132\b"), timeout=WAIT_S)
    return {"size": "132x43"}


async def check_tpm(guest: Guest, daemon: PrivateDaemon) -> Facts:
    """The guest reads PCR 0 of its TPM."""
    value = (await guest.succeed("cat /sys/class/tpm/tpm0/pcr-sha256/0")).strip()
    need(re.fullmatch("[0-9A-Fa-f]{64}", value) is not None, f"PCR 0 reads {value!r}")
    return {"pcr0_sha256": value.lower()}


async def check_qmp(guest: Guest, daemon: PrivateDaemon) -> Facts:
    """QEMU pauses and resumes the guest, and says so."""
    seen = [(await guest.qmp("query-status"))["status"]]
    await guest.pause()
    seen.append((await guest.qmp("query-status"))["status"])
    await guest.resume()
    seen.append((await guest.qmp("query-status"))["status"])
    need(seen == ["running", "paused", "running"], f"QEMU was {seen}")
    return {"status": seen}


async def check_worker(guest: Guest, daemon: PrivateDaemon) -> Facts:
    """The worker that serves all devices is killed, and disk and console go on."""
    killed = await guest.kill_worker()
    await guest.succeed(
        "dd if=/dev/zero of=/dev/vda bs=1M count=1 seek=16 conv=fsync 2>/dev/null", timeout=WAIT_S
    )
    await guest.console.send("echo alive-$((6*7))\n")
    await guest.console.expect("alive-42", timeout=WAIT_S)
    return {"killed": killed}


Check = Callable[[Guest, PrivateDaemon], Awaitable[Facts]]
CHECKS: Final[Mapping[str, Check]] = {
    "disk": check_disk,
    "lease": check_lease,
    "network": check_network,
    "keyboard": check_keyboard,
    "pointer": check_pointer,
    "display": check_display,
    "console": check_console,
    "tpm": check_tpm,
    "qmp": check_qmp,
    "worker": check_worker,
}
