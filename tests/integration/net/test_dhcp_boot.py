"""Network boot: iPXE's ROM in a guest, as firmware, gets its address and its file from our server."""

import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from rayos_images.cache import Cache
from rayos_images.qemu import find
from rayos_net.dhcp.config import BootFile
from rayos_net.link import Links
from rayos_vmm.paths import default_paths
from tests.integration.net.lab import Lab
from tests.integration.net.peers import running
from tests.integration.net.serving import serving, subnet

pytestmark = [pytest.mark.guest, pytest.mark.root]
ROM = "/usr/lib/ipxe/qemu/pxe-virtio.rom"
SERVER = IPv4Address("10.77.0.1")
SCRIPT = "#!ipxe\necho loaded ${filename} for ${net0/mac} from ${next-server}\npoweroff\n"


@pytest.fixture
def guest(lab: Lab) -> Iterator[list[str]]:
    """A bridge br0 with the server's address and a tap in it; the guest's command line."""
    qemu = find(Cache(default_paths().cache))
    with lab.host_with_address("10.77.200.1"), Links() as links:
        argv = ["ip", "tuntap", "add", "ray-pxe-0", "mode", "tap"]
        for words in (argv, ["ip", "link", "set", "ray-pxe-0", "master", "br0", "up"]):
            subprocess.run(words, check=True)
        # The ROM is for the modern device (1af4:1041): a transitional one does not find it.
        card = f"virtio-net-pci,disable-legacy=on,netdev=n,mac=52:59:00:00:00:07,romfile={ROM},bootindex=1"
        command = [*qemu.argv, "-machine", "pc,graphics=off", "-accel", "tcg", "-m", "256", "-nodefaults"]
        command += ["-display", "none", "-serial", "stdio", "-device", card]
        yield [*command, "-netdev", "tap,id=n,ifname=ray-pxe-0,script=no,downscript=no"]
        assert links.exists("ray-pxe-0")


async def test_ipxe_loads_the_file_for_its_architecture(lab: Lab, guest: list[str], tmp_path: Path) -> None:
    """The ROM says "x86 BIOS" (option 93): address, next-server and file are put to use, up to the script's end."""
    (tmp_path / "bios.ipxe").write_text(SCRIPT)
    tftp = ["dnsmasq", "-k", "--conf-file=/dev/null", "--user=root", "--port=0", "--log-facility=-"]
    tftp += ["--enable-tftp", f"--tftp-root={tmp_path}", "--bind-interfaces", "--interface=br0"]
    boot = {0: BootFile("bios.ipxe", SERVER), 7: BootFile("efi.efi", SERVER)}
    async with (
        serving(lab, subnet(lab, boot=boot), link="br0") as server,
        running(lab.in_server(tftp)),
        running(lab.in_server(guest)) as firmware,
    ):
        words = "loaded bios.ipxe for 52:59:00:00:00:07 from 10.77.0.1"
        await firmware.said(words, timeout_s=120)
        (lease,) = server.service.leases()
        assert (lease.mac, lease.port) == ("52:59:00:00:00:07", "ray-pxe-0")
        assert f"net0: {lease.address}/255.255.0.0 gw 10.77.0.1" in firmware.text
