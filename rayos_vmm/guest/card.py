"""A machine's network card as QEMU shows it to the guest: its link, and what the driver asked of it.

The frames are our worker's; configuration space and control queue of the card are QEMU's own with `-netdev vhost-user`
(devices/rayos_devices/net/wire.py), so they are asked and changed by QMP.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Final

from rayos_vmm.errors import GuestGone, NotFound
from rayos_vmm.guest import pcapng
from rayos_vmm.machine.machine import Machine, worker_errors
from rayos_vmm.machine.view import NetView
from rayos_vmm.qemu.cards import NETDEV

#: One announcement at once; the guest's own stack repeats it (net.ipv4.conf.*.arp_notify has no part in it).
_ANNOUNCE: Final[dict[str, Any]] = {"initial": 50, "max": 50, "rounds": 1, "step": 0}


def need_card(machine: Machine) -> None:
    """Raises NotFound for a machine without a network card, Conflict or GuestGone when it does not run."""
    machine.need_qmp()
    if not machine.record.spec.net.enabled:
        raise NotFound(f"{machine.name} has no network card (net.enabled = false)", code="no_such_device")


async def view(machine: Machine) -> NetView:
    """The card now.

    Raises:
        NotFound: there is none.
    """
    need_card(machine)
    spec = machine.record.spec.net
    if spec.model != "virtio":  # it has no control queue; the filters of its registers are not told
        return NetView(
            is_up=machine.record.live.link_is_up,
            mac=machine.record.mac or "",
            mtu=spec.mtu,
            queues=1,
            promiscuous=False,
            unicast=[],
            multicast=[],
            vlan="all",
            vlans=[],
            model=spec.model,
        )
    (asked,) = await machine.need_qmp().execute("query-rx-filter")
    return NetView(
        is_up=machine.record.live.link_is_up,
        mac=asked["main-mac"],
        mtu=spec.mtu,
        queues=spec.queues,
        promiscuous=asked["promiscuous"],
        unicast=asked["unicast-table"],
        multicast=asked["multicast-table"],
        vlan=asked["vlan"],
        vlans=sorted(asked["vlan-table"]),
    )


async def set_link(machine: Machine, *, is_up: bool) -> None:
    """Plugs the cable in, or pulls it: the guest sees its carrier come or go, and no frame passes without it.

    A guest that is back announces its addresses, so that the network finds it (VIRTIO 1.3, 5.1.6.5.4).
    """
    need_card(machine)
    await machine.need_qmp().execute("set_link", {"name": NETDEV, "up": is_up})
    machine.record.live.link_is_up = is_up
    machine.events.publish("net.link", machine.name, up=is_up)
    if is_up:
        await announce(machine)


async def announce(machine: Machine) -> None:
    """Has the guest's driver tell the network where it is (gratuitous ARP, neighbour advertisements)."""
    need_card(machine)
    await machine.need_qmp().execute("announce-self", _ANNOUNCE)


async def capture(machine: Machine, *, snap: int, count: int | None) -> AsyncGenerator[bytes, None]:
    """Yields a pcapng file of the frames that pass the card, in pieces. Its head comes as soon as the capture is on,
    the end after `count` frames (None: when the machine ends). Close it with `aclosing`.

    Raises:
        NotFound: there is no card.
        Invalid: another capture runs.
    """
    need_card(machine)
    worker = machine.need_worker()
    frames = seen = lost = 0
    is_on = False
    with worker_errors(machine):
        async with aclosing(worker.capture(snap)) as pieces:
            async for piece in pieces:
                if not is_on:
                    is_on = True
                    yield pcapng.header(f"{machine.name}-net", snap)
                # A worker that was replaced counts from the start.
                new = piece.dropped - lost if piece.dropped >= lost else piece.dropped
                seen, lost = piece.seen, piece.dropped
                blocks = []
                for frame in _frames(machine, piece.records, piece.offset_ns):
                    blocks.append(pcapng.packet(frame, new))
                    frames, new = frames + 1, 0
                    if frames == count:
                        yield b"".join([*blocks, pcapng.statistics(time.time_ns(), seen, lost)])
                        return
                if blocks:
                    yield b"".join(blocks)


def _frames(machine: Machine, records: bytes, offset_ns: int) -> list[pcapng.CapturedFrame]:
    try:
        return list(pcapng.unpack_records(records, offset_ns))
    except ValueError as error:
        raise GuestGone(f"{machine.name}: its devices sent {error}") from None
