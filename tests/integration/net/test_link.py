"""Bridges and taps of the real kernel: made once, told apart from others' links, gone after a crash."""

import os
import select
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from rayos_net import tap
from rayos_net.dhcp.ports import PortWatch
from rayos_net.link import LinkError, Links
from tests.integration.net.lab import Lab

pytestmark = pytest.mark.root
ADDRESS = IPv4Interface("10.91.0.1/24")


@pytest.fixture
def links(lab: Lab) -> Iterator[Links]:
    """Links in the lab's server namespace."""
    with Links() as opened:
        yield opened


def test_a_bridge_is_made_once_and_brought_to_its_address(links: Links) -> None:
    """A daemon that starts again finds its bridge, and a changed subnet replaces the old address."""
    assert links.ensure_bridge("ray0", ADDRESS) is True
    assert links.ensure_bridge("ray0", ADDRESS) is False
    other = IPv4Interface("10.92.0.1/24")
    assert links.ensure_bridge("ray0", other) is False
    assert links.addresses("ray0") == [other]


def test_a_tap_carries_our_header_and_dies_with_its_descriptor(links: Links) -> None:
    """The tap is a port of the bridge while the descriptor is open, and nothing is left afterwards."""
    links.ensure_bridge("ray0", ADDRESS)
    fd = links.open_tap("ray-a-0", bridge="ray0", owner="a", mtu=1400, isolated=True)
    try:
        assert links.ports("ray0") == ["ray-a-0"]
        assert links.remove_bridge("ray0") is False
    finally:
        os.close(fd)
    assert not links.exists("ray-a-0")
    assert links.remove_bridge("ray0") is True


def test_a_locked_tap_takes_frames_from_its_own_address_only(links: Links) -> None:
    """The bridge itself refuses forged hardware addresses, also from a worker that its guest took over."""
    links.ensure_bridge("ray0", ADDRESS)
    guest = links.open_tap("ray-a-0", bridge="ray0", mac="52:59:00:00:00:01")
    try:
        other = links.open_tap("ray-b-0", bridge="ray0")
        try:
            for last in (9, 1):
                sender = b"\x52\x59\0\0\0" + bytes((last,))
                os.write(guest, bytes(tap.VNET_HEADER_SIZE) + b"\xff" * 6 + sender + b"\x08\x06" + bytes(46))
            select.select([other], [], [], 5)
            assert os.read(other, 2048)[tap.VNET_HEADER_SIZE + 11] == 1
            with pytest.raises(BlockingIOError):
                os.read(other, 2048)
        finally:
            os.close(other)
    finally:
        os.close(guest)


def test_the_ports_of_a_bridge_are_followed(links: Links) -> None:
    """The DHCP server learns of a port when it comes and when it leaves, and only of its own bridge's."""
    links.ensure_bridge("ray0", ADDRESS)
    links.ensure_bridge("ray1", IPv4Interface("10.92.0.1/24"))
    first = links.open_tap("ray-a-0", bridge="ray0")
    try:
        with PortWatch("ray0") as watch, PortWatch("ray-a-0") as plain:
            assert list(watch.ports.values()) == ["ray-a-0"]
            assert (watch.is_bridge, plain.is_bridge, plain.ports) == (True, False, {})
            second, other = (
                links.open_tap("ray-b-0", bridge="ray0"),
                links.open_tap("ray-c-0", bridge="ray1"),
            )
            watch.read()
            assert sorted(watch.ports.values()) == ["ray-a-0", "ray-b-0"]
            os.close(other)
            os.close(second)
            watch.read()
            assert list(watch.ports.values()) == ["ray-a-0"]
            links.delete("ray0")
            watch.read()
            assert (watch.is_gone, watch.ports) == (True, {})
    finally:
        os.close(first)


def test_a_busy_tap_names_its_holder(links: Links) -> None:
    """Who starts the same VM twice learns which process has the tap; the tap of the first is not disturbed."""
    links.ensure_bridge("ray0", ADDRESS)
    fd = links.open_tap("ray-a-0", bridge="ray0")
    try:
        with pytest.raises(LinkError, match=rf"ray-a-0 is in use by process {os.getpid()} \(\S+\)"):
            links.open_tap("ray-a-0", bridge="ray0")
        assert links.ports("ray0") == ["ray-a-0"]
    finally:
        os.close(fd)


def test_foreign_links_are_never_touched(links: Links, lab: Lab) -> None:
    """A link without our mark is neither changed nor removed, whatever its name."""
    subprocess.run(["ip", "link", "add", "ray9", "type", "bridge"], check=True)
    assert links.sweep("ray") == []
    assert links.remove_bridge("ray9") is False
    with pytest.raises(LinkError, match="not ours"):
        links.delete("ray9")
    with pytest.raises(LinkError, match="exists and is not ours"):
        links.ensure_bridge("ray9", ADDRESS)
    with pytest.raises(LinkError, match="a bridge has this name"):
        links.open_tap("ray9", bridge="ray9")
    assert links.exists("ray9")


def test_an_administrators_bridge_with_the_address_is_used_and_stays(links: Links) -> None:
    """Someone's own bridge that has the address already may be used; it is not ours to remove."""
    subprocess.run(["ip", "link", "add", "br7", "type", "bridge"], check=True)
    subprocess.run(["ip", "address", "add", str(ADDRESS), "dev", "br7"], check=True)
    assert links.ensure_bridge("br7", ADDRESS) is False
    assert links.remove_bridge("br7") is False


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda links: links.ensure_bridge("ray0", IPv4Interface("10.77.5.1/24")),
            "overlaps 10.77.0.1/16 on s0",
        ),
        (lambda links: links.ensure_bridge("x" * 16, ADDRESS), "16 bytes of 1..15"),
        (lambda links: links.open_tap("ray-a-0", bridge="nowhere"), "no link nowhere"),
    ],
)
def test_a_mistake_is_one_clear_sentence(links: Links, call: object, message: str) -> None:
    """The obstacle is named, and nothing is left behind."""
    assert callable(call)
    with pytest.raises(LinkError, match=message):
        call(links)
    assert not links.exists("ray0")
    assert not links.exists("ray-a-0")


def test_a_sweep_after_a_crash_removes_ours_and_keeps_what_a_guest_uses(links: Links, tmp_path: Path) -> None:
    """kill -9 of the daemon leaves a bridge; the next one removes it, unless a guest still holds a tap in it."""
    program = (
        "import ipaddress, sys; from rayos_net.link import Links\n"
        "links = Links(); links.ensure_bridge('ray0', ipaddress.IPv4Interface('10.91.0.1/24'))\n"
        "links.ensure_bridge('ray1', ipaddress.IPv4Interface('10.92.0.1/24'))\n"
        "fd = links.open_tap('ray-a-0', bridge='ray0'); print('up', flush=True); sys.stdin.read()\n"
    )
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "up\n"
        assert links.sweep("ray") == ["ray1"]
        daemon.kill()
        daemon.wait()
    assert links.sweep("ray") == ["ray0"]
    assert links.sweep("ray") == []
