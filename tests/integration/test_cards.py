"""Cards of every model on our network: a boot ROM's own drivers get their addresses by it."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import trio

from rayos_vmm.config.load import to_spec
from rayos_vmm.config.spec import NetModel
from rayos_vmm.service.service import Service
from tests.integration.service_lab import home, lab

pytestmark = [pytest.mark.guest, pytest.mark.root]

#: iPXE as a Linux kernel, with drivers for everything (Debian: ipxe).
IPXE = Path("/usr/lib/ipxe/ipxe.lkrn")


async def lease(service: Service, mac: str) -> str:
    """The address that the machine with this card has bound, as soon as it has."""
    while True:
        for one in await service.dhcp.leases():
            if one.mac == mac and one.state == "bound":
                return str(one.address)
        await trio.sleep(0.2)


async def test_every_card_is_on_our_network_behind_our_firewall(tmp_path: Path) -> None:
    """Each gets its lease by its own driver, through the worker that judges, shapes and counts every frame.

    A virtio card without offloads, merged buffers and control queue is one of them. The cable can be pulled.
    """
    script = tmp_path / "dhcp.ipxe"
    script.write_text("#!ipxe\n:again\ndhcp net0 && shell || goto again\n")
    models = get_args(NetModel)
    async with home() as paths, lab(paths, real=True, network=True) as service:
        for model in models:
            net = {"model": model}
            if model == "virtio":
                net |= {"offloads": False, "mrg_rxbuf": False, "ctrl_vq": False}
            table = {
                "kernel": str(IPXE),
                "initrd": str(script),
                "memory": "128MiB",
                "net": net,
                "gpu": {"enabled": False},
                "tpm": False,
            }
            await service.machines.define(to_spec(f"net-{model.replace('_', '-')}", table, prefix="net"))
            await service.machines.start(f"net-{model.replace('_', '-')}")
        for model in models:
            name = f"net-{model.replace('_', '-')}"
            view = await service.machines.get(name)
            with trio.fail_after(90):
                address = await lease(service, view.mac or "")
            stats = (await service.guests.stats(name))["net"]
            assert stats["operations"]["net.tx"]["allowed"] >= 2, model
            assert stats["firewall"]["cache"], model
            shown = await service.guests.net(name)
            assert (shown.mac, shown.model, shown.is_up) == (view.mac, model, True), address
        await service.guests.set_link("net-e1000", is_up=False)
        assert not (await service.guests.net("net-e1000")).is_up
