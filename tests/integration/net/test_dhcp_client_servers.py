"""Our DHCP client against the servers that people run: dnsmasq, Kea, ISC dhcpd."""

import subprocess
from ipaddress import IPv4Address

import pytest

from rayos_net.dhcp.client_action import Acquired, Lost
from rayos_net.dhcp.client_state import ClientState
from rayos_net.dhcp.lease import Lease
from tests.integration.net.lab import Lab
from tests.integration.net.peers import SERVERS, Subnet, dhcp_server
from tests.integration.net.test_dhcp_client import client

pytestmark = pytest.mark.root

#: What each server says when a client gives an address back, and when it declines one.
RELEASED = {"dnsmasq": "DHCPRELEASE(s0) {}", "kea": "DHCP4_RELEASE ", "isc": "DHCPRELEASE of {}"}
DECLINED = {"dnsmasq": "DHCPDECLINE(s0) {}", "kea": "DHCP4_DECLINE_LEASE ", "isc": "DHCPDECLINE of {}"}


@pytest.mark.parametrize("name", SERVERS)
async def test_a_lease_is_given_renewed_and_taken_back(lab: Lab, name: str) -> None:
    """The whole life of a lease, for a hardware address that is not the link's. An offer is chosen by its own
    deadline, not at the next retransmission."""
    async with dhcp_server(lab, name, Subnet()) as server, client(lab, retransmit=60.0) as running:
        lease = (await running.until(Acquired)).lease
        assert lease.address.network == lab.address.network
        assert (lease.routers, lease.server) == ((lab.address.ip,), lab.address.ip)
        assert lease.dns == (lab.address.ip, IPv4Address("10.77.0.99"))
        assert (lease.domain, lease.ntp) == ("up.example", (IPv4Address("10.77.0.5"),))
        running.client.renew()
        renewed = (await running.until(Acquired, count=2)).lease
        assert renewed.address == lease.address
        assert renewed.expires > lease.expires
        running.client.release()
        await running.until(Lost)
        assert running.client.state is ClientState.RELEASED
        await server.said(RELEASED[name].format(lease.address.ip))
        history = [(one["kind"], one["attempts"], one["outcome"]) for one in running.client.history()]
        assert history == [
            ("DISCOVER", 1, "answered"),
            ("REQUEST", 1, "answered"),
            ("REQUEST", 1, "answered"),
            ("RELEASE", 0, "sent"),
        ]


@pytest.mark.parametrize("name", SERVERS)
async def test_a_stored_lease_is_confirmed_refused_or_declined(lab: Lab, name: str) -> None:
    """After a restart the client asks for what it had (INIT-REBOOT). One of another network is refused; one whose
    address another host took meanwhile is declined, and the server hears it."""
    async with dhcp_server(lab, name, Subnet()) as server:
        async with client(lab) as running:
            lease = (await running.until(Acquired)).lease
        async with client(lab, stored=Lease.loads(lease.dumps())) as running:
            assert (await running.until(Acquired)).lease.address == lease.address
            assert [one["kind"] for one in running.client.history()] == ["REQUEST"]
        moved = Lease.loads(lease.dumps().replace(str(lease.address), "192.168.44.4/24"))
        async with client(lab, stored=moved) as running:
            assert (await running.until(Acquired)).lease.address == lease.address
            assert running.client.history()[0]["outcome"] == "refused"
        lab.add_address(f"{lease.address.ip}/32")
        async with client(lab, stored=lease) as running:
            await server.said(DECLINED[name].format(lease.address.ip))
            assert running.client.state is ClientState.DECLINED
            assert not running.told  # it never was in use


@pytest.mark.parametrize("name", ["kea", "isc"])
async def test_when_its_server_dies_a_second_one_extends_the_lease(lab: Lab, name: str) -> None:
    """The server is killed and another one with its leases has another address: the renewal goes on there."""
    times = {"seconds": 60, "t1": 2, "t2": 3}
    async with client(lab, renew_minimum=1.0) as running:
        async with dhcp_server(lab, name, Subnet(**times)):  # type: ignore[arg-type]
            lease = (await running.until(Acquired)).lease
            assert (lease.renew_at, lease.rebind_at) == (lease.expires - 58, lease.expires - 57)
        for words in (["del", "10.77.0.1/16"], ["add", "10.77.0.9/16"]):
            subprocess.run(lab.in_server(["ip", "address", *words, "dev", "s0"]), check=True)  # noqa: ASYNC221
        async with dhcp_server(lab, name, Subnet(address="10.77.0.9", **times)):  # type: ignore[arg-type]
            extended = (await running.until(Acquired, count=2)).lease
    assert extended.address == lease.address
    assert extended.server == IPv4Address("10.77.0.9")
    assert not any(isinstance(one, Lost) for one in running.told)
