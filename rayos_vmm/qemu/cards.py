"""The network card as QEMU's arguments: ours over vhost-user, or one that QEMU emulates, whose frames come to ours."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rayos_devices.kinds import KINDS
from rayos_vmm.config.spec import Net

#: The name by which QMP knows the card.
NETDEV: Final = KINDS["net"].qemu.netdev
#: VIRTIO 1.3, 5.1.3: checksums and segments that driver and device leave to each other.
_OFFLOADS: Final = (
    *("csum", "guest_csum", "gso", "guest_tso4", "guest_tso6", "guest_ecn", "guest_ufo"),
    *("host_tso4", "host_tso6", "host_ecn", "host_ufo"),
)
#: What a driver asks over the control queue.
_CONTROLS: Final = ("ctrl_vq", "ctrl_rx", "ctrl_vlan", "ctrl_rx_extra", "ctrl_mac_addr", "guest_announce")


def feature_words(net: Net) -> str:
    """The features that a virtio card is to be without, as properties."""
    off = [
        *(() if net.offloads else _OFFLOADS),
        *(() if net.mrg_rxbuf else ("mrg_rxbuf",)),
        *(() if net.ctrl_vq else _CONTROLS),
    ]
    return ",".join(f"{name}=off" for name in off)


def card_arguments(net: Net, path: Path, mac: str, *, has_reconnect_ms: bool) -> list[str]:
    """The arguments of a card of QEMU's, whose frames go to the socket at `path`.

    QEMU is the client: it comes back when the worker was replaced. A ROM of QEMU's would boot before the disks do.
    """
    address = str(path).replace(",", ",,")
    again = "reconnect-ms=100" if has_reconnect_ms else "reconnect=1"
    stream = f"stream,id={NETDEV},server=off,addr.type=unix,addr.path={address},{again}"
    return ["-netdev", stream, "-device", f"{net.model},netdev={NETDEV},mac={mac},romfile="]
