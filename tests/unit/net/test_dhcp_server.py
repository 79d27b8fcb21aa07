"""rayos_net.dhcp.server: the rules of RFC 2131, 4.3, and what one port can't do to the others."""

from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from rayos_net.dhcp import message as wire
from rayos_net.dhcp.answer import Route
from rayos_net.dhcp.binding import BindingState
from rayos_net.dhcp.config import BootFile, Limits, SubnetConfig
from rayos_net.dhcp.message import MessageType
from rayos_net.dhcp.server_action import Commit, Source
from tests.unit.net.dhcp_driver import NOW, SERVER, Driver, mac, number, packed, request, subnet

DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = MessageType


def test_an_ack_waits_for_the_disk_and_an_offer_does_not() -> None:
    """A lease that was acknowledged is on stable storage: the ACK is only in the Commit."""
    driver = Driver()
    offer = driver.send(request(DISCOVER))
    assert offer is not None
    assert offer.type == OFFER
    chosen = request(REQUEST, options={50: offer.yiaddr.to_bytes(4, "big"), 54: SERVER.packed})
    actions = driver.server.receive(chosen.encode(), Source(""), NOW)
    assert [type(action) for action in actions] == [Commit]
    assert isinstance(actions[0], Commit)
    assert actions[0].binding.state is BindingState.BOUND
    assert actions[0].reply is not None


def test_the_ack_says_times_and_the_options_that_were_asked_for() -> None:
    """T1 is half and T2 seven eighths of the lease; options 55 are answered in the client's order (RFC 2132,
    9.8).
    """
    ack = Driver().bind(options={55: bytes((15, 6, 3, 1, 42))})
    values = {code: value for code, value in ack.options.items() if code in (51, 58, 59)}
    assert values == {51: (3600).to_bytes(4), 58: (1800).to_bytes(4), 59: (3150).to_bytes(4)}
    assert [code for code in ack.options if code in (15, 6, 3)] == [15, 6, 3]
    assert 42 not in ack.options


def test_the_client_identifier_is_echoed_in_every_reply() -> None:
    """A client with several identifiers knows which one is meant, also in a NAK (RFC 6842, 3)."""
    driver = Driver()
    assert driver.bind(options={61: b"\xff12345"}).options[61] == b"\xff12345"
    nak = driver.send(request(REQUEST, options={61: b"\xff12345", 50: packed("192.168.1.1")}))
    assert nak is not None
    assert (nak.type, nak.options[61]) == (NAK, b"\xff12345")


def test_no_identifier_and_the_default_identifier_are_the_same_client() -> None:
    """Firmware without an identifier and the system it boots share one lease."""
    driver = Driver()
    first = driver.bind()
    assert driver.bind(options={61: b"\x01" + mac(1)}).yiaddr == first.yiaddr
    assert driver.bind(options={61: b"\xff\0\0\0\1duid"}).yiaddr != first.yiaddr


@pytest.mark.parametrize(
    ("header", "route"),
    [
        ({}, Route.HARDWARE),
        ({"flags": 0x8000}, Route.BROADCAST),
        ({"giaddr": number("10.5.0.7")}, Route.RELAY),
    ],
)
def test_a_reply_takes_the_route_of_the_rfc(header: dict[str, Any], route: Route) -> None:
    """Relay agent before broadcast flag before the hardware address (RFC 2131, 4.1)."""
    driver = Driver(subnet(relays=(IPv4Network("10.5.0.0/24"),)))
    driver.send(request(DISCOVER, **header))
    assert driver.reply is not None
    assert driver.reply.route is route


def test_a_relay_is_believed_only_from_a_configured_network() -> None:
    """A guest that forges giaddr makes us send to nobody."""
    driver = Driver()
    assert driver.send(request(DISCOVER, giaddr=number("10.5.0.7"))) is None
    assert driver.server.counters["drop_no_subnet"] == 1


def test_a_relayed_client_gets_the_relays_subnet_and_its_option_back_last() -> None:
    """Option 82 returns byte for byte as the last option (RFC 3046, 2.2); link selection chooses (RFC 3527)."""
    remote = subnet_of("10.6.0.0/24", "10.6.0.1")
    driver = Driver(subnet(relays=(IPv4Network("10.5.0.0/24"),)), remote=(remote,))
    relay = b"\x01\x03eth" + b"\x05\x04" + packed("10.6.0.0") + b"\x0b\x04" + packed("10.6.0.254")
    offer = driver.send(request(DISCOVER, giaddr=number("10.5.0.7"), options={82: relay}))
    assert offer is not None
    assert IPv4Address(offer.yiaddr) in remote.network
    assert list(offer.options)[-1] == 82
    assert offer.options[82] == relay
    assert offer.options[54] == packed("10.6.0.254")  # the override (RFC 5107)


def subnet_of(network: str, server: str) -> SubnetConfig:
    return SubnetConfig(IPv4Network(network), IPv4Address(server), limits=Limits.none())


def test_a_relay_option_without_a_relay_is_not_echoed() -> None:
    """A guest can't make us believe it is a relay agent."""
    offer = Driver().send(request(DISCOVER, options={82: b"\x01\x03eth"}))
    assert offer is not None
    assert 82 not in offer.options


def test_a_client_keeps_its_address_after_expiry_while_it_is_free() -> None:
    """Former binding before a new address (RFC 2131, 4.3.1); the expiry is told."""
    driver = Driver()
    first = driver.bind()
    driver.wait(3601)
    assert driver.kinds() == ["bound", "expired"]
    driver.bind(2)
    assert driver.bind(1).yiaddr == first.yiaddr


def test_a_requested_free_address_is_given() -> None:
    """Option 50 in a DISCOVER is honoured if that address is free and ours."""
    driver = Driver()
    assert driver.bind(options={50: packed("10.5.0.50")}).yiaddr == number("10.5.0.50")
    other = driver.send(request(DISCOVER, 2, options={50: packed("10.5.0.50")}))
    assert other is not None
    assert other.yiaddr != number("10.5.0.50")


def test_a_choice_for_another_server_is_answered_by_silence() -> None:
    """Our offer lapses; a NAK would kill the other server's client (RFC 2131, 4.3.2)."""
    driver = Driver()
    offer = driver.send(request(DISCOVER))
    assert offer is not None
    assert driver.send(request(REQUEST, options={50: packed("10.5.0.10"), 54: packed("10.5.0.2")})) is None
    assert driver.server.leases()[0].state is BindingState.EXPIRED


def test_init_reboot_on_the_wrong_network_is_refused() -> None:
    """A client that moved learns at once; the NAK is broadcast and has no address in it (RFC 2131, table 3)."""
    driver = Driver()
    nak = driver.send(request(REQUEST, options={50: packed("192.168.7.7")}))
    assert nak is not None
    assert driver.reply is not None
    assert driver.reply.route is Route.BROADCAST
    assert (nak.type, nak.ciaddr, nak.yiaddr, nak.siaddr) == (NAK, 0, 0, 0)
    assert set(nak.options) == {53, 54, 56}


@pytest.mark.parametrize(("authoritative", "answer"), [(True, ACK), (False, None)])
def test_init_reboot_of_an_unknown_client(authoritative: bool, answer: MessageType | None) -> None:
    """Silence where another server might know it; where we alone decide, a free address is confirmed."""
    driver = Driver(subnet(authoritative=authoritative))
    reply = driver.send(request(REQUEST, options={50: packed("10.5.0.30")}))
    assert (reply.type if reply else None) == answer


def test_renewing_extends_and_goes_to_the_client() -> None:
    """ciaddr without option 50 is RENEWING: an ACK by unicast, `since` stays."""
    driver = Driver()
    ack = driver.bind()
    driver.wait(1800)
    renewed = driver.send(request(REQUEST, ciaddr=ack.yiaddr), unicast=True)
    assert renewed is not None
    assert (renewed.type, renewed.yiaddr, renewed.ciaddr) == (ACK, ack.yiaddr, ack.yiaddr)
    assert driver.reply is not None
    assert driver.reply.route is Route.UNICAST
    lease = driver.server.leases()[0]
    assert (lease.since, lease.expires) == (NOW, NOW + 1800 + 3600)
    assert driver.kinds() == ["bound", "renewed"]


def test_renewing_someone_elses_address_is_refused() -> None:
    """A forged ciaddr takes nothing from its owner."""
    driver = Driver()
    ack = driver.bind(1)
    nak = driver.send(request(REQUEST, 2, ciaddr=ack.yiaddr))
    assert nak is not None
    assert nak.type == NAK
    assert driver.server.leases()[0].hardware == mac(1)


def test_decline_quarantines_and_the_client_gets_another_address() -> None:
    """The declined address comes back only after the quarantine."""
    driver = Driver()
    first = driver.bind()
    assert driver.send(request(DECLINE, options={50: first.yiaddr.to_bytes(4), 54: SERVER.packed})) is None
    assert driver.kinds() == ["bound", "declined"]
    assert driver.bind().yiaddr != first.yiaddr
    assert driver.send(request(DISCOVER, 3, options={50: first.yiaddr.to_bytes(4)})).yiaddr != first.yiaddr  # type: ignore[union-attr]
    driver.wait(601)
    assert driver.bind(4, options={50: first.yiaddr.to_bytes(4)}).yiaddr == first.yiaddr


@pytest.mark.parametrize("kind", [DECLINE, RELEASE])
def test_nobody_gives_up_someone_elses_lease(kind: MessageType) -> None:
    """DECLINE and RELEASE count only from the client that has the address."""
    driver = Driver()
    ack = driver.bind(1)
    driver.send(request(kind, 2, ciaddr=ack.yiaddr, options={50: ack.yiaddr.to_bytes(4)}))
    assert driver.server.leases()[0].state is BindingState.BOUND


def test_a_port_speaks_for_itself_alone() -> None:
    """Nobody gives up a lease from another port. Where the frame's sender is known it must be the client; a relay
    speaks for others by its nature.
    """
    driver = Driver()
    lease = driver.bind(1, port="good")
    for kind, more in (
        (MessageType.RELEASE, {}),
        (MessageType.DECLINE, {50: lease.yiaddr.to_bytes(4, "big")}),
    ):
        driver.send(request(kind, 1, ciaddr=lease.yiaddr, options=more), port="evil")
    assert driver.server.leases()[0].state is BindingState.BOUND
    forged = request(MessageType.DISCOVER, 1).encode()
    assert driver.server.receive(forged, Source("evil", hardware=mac(2)), NOW) == []
    assert driver.server.receive(forged, Source("good", hardware=mac(1)), NOW) != []
    counters = driver.server.counters
    assert counters["drop_foreign_hardware"] == 1
    assert (counters["drop_release_of_foreign_address"], counters["drop_decline_of_foreign_address"]) == (
        1,
        1,
    )


def test_release_frees_and_remembers() -> None:
    """The same client gets the same address again (RFC 2131, 4.3.4)."""
    driver = Driver()
    ack = driver.bind()
    assert driver.send(request(RELEASE, ciaddr=ack.yiaddr)) is None
    assert driver.kinds() == ["bound", "released"]
    driver.bind(2)
    assert driver.bind(1).yiaddr == ack.yiaddr


def test_inform_tells_options_and_leases_nothing() -> None:
    """An ACK to ciaddr without address and lease times (RFC 2131, 4.3.5)."""
    driver = Driver()
    ack = driver.send(request(INFORM, ciaddr=number("10.5.0.200"), options={55: b"\x06"}))
    assert ack is not None
    assert (ack.type, ack.yiaddr) == (ACK, 0)
    assert not {51, 58, 59} & set(ack.options)
    assert ack.options[6] == SERVER.packed
    assert driver.server.leases() == []


@pytest.mark.parametrize("kind", [None, 0, 2, 5, 6, 9, 10, 13, 255])
def test_other_types_are_ignored(kind: int | None) -> None:
    """BOOTP, FORCERENEW, LEASEQUERY and nonsense get no answer and do no harm."""
    driver = Driver()
    assert driver.send(request(kind)) is None
    assert driver.server.leases() == []


def test_the_lease_time_asked_for_is_clamped() -> None:
    """Neither a lease of a second nor one for ever."""
    driver = Driver()
    assert driver.bind(1, options={51: (1).to_bytes(4)}).options[51] == (120).to_bytes(4)
    assert driver.bind(2, options={51: b"\xff" * 4}).options[51] == (86400).to_bytes(4)


def test_rapid_commit_only_where_configured_and_asked() -> None:
    """DISCOVER with option 80 gets its ACK at once (RFC 4039), behind a Commit like any other."""
    assert Driver().send(request(DISCOVER, options={80: b""})).type == OFFER  # type: ignore[union-attr]
    driver = Driver(subnet(rapid_commit=True))
    assert driver.send(request(DISCOVER, 2)).type == OFFER  # type: ignore[union-attr]
    ack = driver.send(request(DISCOVER, options={80: b""}))
    assert ack is not None
    assert (ack.type, ack.options[80]) == (ACK, b"")
    assert driver.kinds() == ["bound"]


def test_ipv6_only_is_told_to_those_who_ask() -> None:
    """Option 108 only when it is in the parameter list (RFC 8925, 3.3)."""
    driver = Driver(subnet(ipv6_only_wait_seconds=1800))
    assert 108 not in driver.bind(1, options={55: b"\x01\x03"}).options
    assert driver.bind(2, options={55: b"\x01\x6c"}).options[108] == (1800).to_bytes(4)


def test_classless_routes_include_the_default_route() -> None:
    """A client that takes option 121 ignores option 3 (RFC 3442)."""
    driver = Driver(subnet(routes=((IPv4Network("10.9.0.0/16"), IPv4Address("10.5.0.9")),)))
    ack = driver.bind(options={55: b"\x79\x03"})
    assert ack.options[121] == b"\x10\x0a\x09" + packed("10.5.0.9") + b"\0" + SERVER.packed


@pytest.mark.parametrize(
    ("options", "file"),
    [
        ({93: b"\0\7", 60: b"PXEClient:Arch:00007"}, b"boot.efi"),
        ({93: b"\0\0", 60: b"PXEClient:Arch:00000"}, b"pxelinux.0"),
        ({93: b"\0\7", 60: b"PXEClient", 77: b"iPXE"}, b"script.ipxe"),
        ({93: b"\0\x0b", 60: b"PXEClient"}, b"other"),
        ({}, b""),
    ],
)
def test_a_network_boot_gets_the_file_of_its_architecture(options: dict[int, bytes], file: bytes) -> None:
    """UEFI, BIOS and iPXE each boot their own file from the next server; others are not bothered."""
    server = IPv4Address("10.5.0.2")
    boot = {
        7: BootFile("boot.efi", server),
        0: BootFile("pxelinux.0", server),
        "ipxe": BootFile("script.ipxe", server),
        "default": BootFile("other", server),
    }
    offer = Driver(subnet(boot=boot)).send(request(DISCOVER, options=options))
    assert offer is not None
    assert offer.file == file
    assert offer.siaddr == int(server if file else SERVER)


def test_the_next_server_is_ourselves_unless_said_otherwise() -> None:
    """As dnsmasq has it: U-Boot and other loaders take their TFTP server out of `siaddr`."""
    driver = Driver()
    offer = driver.send(request(DISCOVER))
    assert offer is not None and offer.siaddr == int(SERVER)
    assert driver.bind().siaddr == int(SERVER)


def test_zeros_for_a_server_identifier_are_none() -> None:
    """Option 54 = 0.0.0.0, with and without an offer before: the client means whoever listens."""
    driver = Driver()
    offer = driver.send(request(DISCOVER))
    assert offer is not None
    zeros = {54: bytes(4), 50: offer.yiaddr.to_bytes(4, "big")}
    ack = driver.send(request(REQUEST, options=zeros))
    assert ack is not None and (ack.type, ack.yiaddr) == (ACK, offer.yiaddr)
    fresh = driver.send(request(REQUEST, 2, options={54: bytes(4), 50: packed("10.5.0.50")}))
    assert fresh is not None and fresh.type == ACK


@pytest.mark.parametrize("address", ["10.5.0.44", "192.168.7.7"])
def test_an_address_in_a_discover_is_a_wish_and_no_way_to_the_client(address: str) -> None:
    """RFC 2131, table 5, has zeros there. The OFFER goes to the hardware address: nobody answers ARP for that one."""
    driver = Driver()
    offer = driver.send(request(DISCOVER, ciaddr=number(address)))
    assert offer is not None and driver.reply is not None
    assert offer.ciaddr == 0
    assert driver.reply.route is Route.HARDWARE and driver.reply.ip == offer.yiaddr
    assert (offer.yiaddr == number(address)) == address.startswith("10.5.0.")


def test_a_message_may_end_without_its_end_option() -> None:
    """After a whole option, with or without padding; a cut one is malformed."""
    driver = Driver()
    data = request(DISCOVER, options={50: packed("10.5.0.20")}).encode(1400)
    at = data.index(b"\xff", wire.HEADER_SIZE)
    for whole in (data[:at], data[:at] + bytes(60)):
        offer = driver.perform(driver.server.receive(whole, Source("", False), driver.now))
        assert offer is not None and offer.yiaddr == number("10.5.0.20")
    assert driver.perform(driver.server.receive(data[: at - 1], Source("", False), driver.now)) is None
    assert driver.server.counters["drop_malformed"] == 1


def test_http_boot_is_told_that_the_offer_is_for_it() -> None:
    """UEFI HTTP boot wants option 60 back and a URL in option 67."""
    boot = {16: BootFile("http://10.5.0.2/boot.efi")}
    asked = {93: b"\0\x10", 60: b"HTTPClient:Arch:00016", 55: b"\x43"}
    offer = Driver(subnet(boot=boot)).send(request(DISCOVER, options=asked))
    assert offer is not None
    assert (offer.options[60], offer.options[67]) == (b"HTTPClient", b"http://10.5.0.2/boot.efi")


def test_a_reservation_wins_over_a_stale_lease() -> None:
    """A client moves to its reserved address with the next DISCOVER, and its renewal of the old one is
    refused.
    """
    driver = Driver()
    old = driver.bind()
    driver.server.pools[0].reserve(mac(1), number("10.5.0.200"))
    refused = driver.send(request(REQUEST, ciaddr=old.yiaddr))
    assert refused is not None
    assert refused.type == NAK
    assert driver.bind().yiaddr == number("10.5.0.200")
    assert [one.state for one in driver.server.leases()] == [BindingState.EXPIRED, BindingState.BOUND]


def test_where_only_reservations_count_strangers_are_not_served() -> None:
    """A network of known machines: the others get silence, and nothing of theirs is remembered."""
    driver = Driver(subnet(reserved_only=True, reservations={mac(1).hex(":"): IPv4Address("10.5.0.77")}))
    assert driver.bind(1).yiaddr == number("10.5.0.77")
    assert driver.send(request(DISCOVER, 2)) is None
    refused = driver.send(request(REQUEST, 2, options={50: packed("10.5.0.12")}))
    assert refused is not None
    assert refused.type == NAK
    assert len(driver.server.leases()) == 1


def test_an_address_reserved_while_another_client_has_it_is_handed_over() -> None:
    """Its user is refused at renewal; then the owner gets it, also with another identifier."""
    driver = Driver()
    taken = driver.bind(1)
    driver.server.pools[0].reserve(mac(2), taken.yiaddr)
    assert driver.bind(2).yiaddr != taken.yiaddr
    assert driver.send(request(REQUEST, 1, ciaddr=taken.yiaddr)).type == NAK  # type: ignore[union-attr]
    driver.wait(3601)
    assert driver.bind(2).yiaddr == taken.yiaddr
    assert driver.bind(2, options={61: b"\xffduid"}).yiaddr == taken.yiaddr


def test_an_exhausted_pool_is_silence_and_recovers() -> None:
    """The last address given, nobody is answered, until one comes back."""
    driver = Driver(subnet(pool=((IPv4Address("10.5.0.10"), IPv4Address("10.5.0.11")),)))
    first, _ = driver.bind(1), driver.bind(2)
    assert driver.send(request(DISCOVER, 3)) is None
    assert driver.server.counters["drop_pool_exhausted"] == 1
    driver.send(request(RELEASE, 1, ciaddr=first.yiaddr))
    assert driver.bind(3).yiaddr == first.yiaddr


def test_a_probe_delays_one_client_and_nobody_else() -> None:
    """The first offer waits for ARP; a known client is answered meanwhile; silence lets the offer go."""
    driver = Driver(subnet(probe_seconds=0.1))
    assert driver.send(request(DISCOVER, 1)) is None
    assert driver.probes == [number("10.5.0.10")]
    assert driver.server.deadline() == pytest.approx(NOW + 0.1)
    assert driver.send(request(DISCOVER, 1, xid=7)) is None
    offer = driver.wait(0.11)
    assert offer is not None
    assert (offer.type, offer.xid, offer.yiaddr) == (OFFER, 7, number("10.5.0.10"))
    assert driver.send(request(DISCOVER, 1)) is not None
    assert driver.probes == [number("10.5.0.10")]


def test_an_answered_probe_quarantines_and_the_next_address_is_probed() -> None:
    """The client never sees the occupied address."""
    driver = Driver(subnet(probe_seconds=0.1))
    driver.send(request(DISCOVER, 1))
    driver.perform(driver.server.conflict(number("10.5.0.10"), b"\x02" * 6, driver.now))
    assert driver.kinds() == ["declined"]
    assert driver.probes == [number("10.5.0.10"), number("10.5.0.11")]
    offer = driver.wait(0.11)
    assert offer is not None
    assert offer.yiaddr == number("10.5.0.11")


def test_one_port_cannot_starve_the_others() -> None:
    """Four leases a port; a fifth client there is not served, the next port is (hostile-inputs D5)."""
    driver = Driver(subnet(limits=Limits(leases_per_port=4, requests_per_second=None)))
    for client in range(4):
        driver.bind(client, port="evil")
    assert driver.send(request(DISCOVER, 50), port="evil") is None
    assert driver.server.counters["drop_port_full"] == 1
    driver.bind(60, port="good")


def test_offers_of_a_port_make_room_for_its_newest() -> None:
    """Random hardware addresses replace each other's offers: a port never holds more than its share."""
    driver = Driver(subnet(limits=Limits(leases_per_port=4, requests_per_second=None)))
    for client in range(100, 600):
        driver.send(request(DISCOVER, client), port="evil")
    assert sum(one.state is BindingState.OFFERED for one in driver.server.leases()) == 4
    driver.bind(1, port="good")


def test_declining_everything_blocks_only_a_few_addresses() -> None:
    """The quarantined addresses of a port are bounded (hostile-inputs D5)."""
    driver = Driver(subnet(limits=Limits(requests_per_second=None, quarantined_per_port=3)))
    for _ in range(20):
        ack = driver.bind(1, port="evil")
        driver.send(request(DECLINE, 1, options={50: ack.yiaddr.to_bytes(4)}), port="evil")
    assert sum(one.state is BindingState.DECLINED for one in driver.server.leases()) == 3


def test_a_storm_from_one_port_leaves_the_others_alone() -> None:
    """A token bucket per port: the storm is dropped before it is parsed, the neighbour is served (D6)."""
    driver = Driver(subnet(limits=Limits(requests_per_second=20, burst=40)))
    for client in range(1000):
        driver.send(request(DISCOVER, client), port="evil")
    assert driver.server.counters["drop_rate_limited"] == 960
    driver.bind(7, port="good")
    driver.wait(1.0)
    assert driver.send(request(DISCOVER, 2000), port="evil") is not None


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        (b"web", "web"),
        (b"Web.example.org\0", "web"),
        (b"", None),
        (b"../../etc", None),
        (b"a b", None),
        (b'"quoted"', None),
        (b"-x", None),
        (b"\x00\x01\xff", None),
        (b"x" * 255, None),
    ],
)
def test_a_malformed_host_name_is_left_out_and_the_lease_given(name: bytes, kept: str | None) -> None:
    """No control byte, path or quote of a guest's reaches a file or a DNS zone (hostile-inputs D3)."""
    driver = Driver()
    driver.bind(options={12: name})
    assert driver.server.leases()[0].host_name == kept


def test_a_lease_survives_in_a_new_server() -> None:
    """A stored lease is honoured after a restart, and its address is not given to another client."""
    before = Driver()
    ack = before.bind()
    after = Driver()
    assert after.server.restore(before.server.leases()) == 0
    assert after.bind(2).yiaddr != ack.yiaddr
    renewed = after.send(request(REQUEST, ciaddr=ack.yiaddr))
    assert renewed is not None
    assert renewed.type == ACK


def test_a_stored_lease_of_another_subnet_is_left_out() -> None:
    """After the subnet was changed, old leases neither stop the start nor are handed out."""
    before = Driver()
    before.bind()
    other = Driver(subnet_of("10.6.0.0/24", "10.6.0.1"))
    assert other.server.restore(before.server.leases()) == 1
    assert other.server.leases() == []
