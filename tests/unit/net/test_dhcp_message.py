"""rayos_net.dhcp.message and option: bytes to values and back, with scapy as the second implementation."""

import struct

import pytest
from scapy.layers.dhcp import BOOTP, DHCP  # type: ignore[import-untyped,unused-ignore]

from rayos_net.dhcp import message as wire
from rayos_net.dhcp import option
from rayos_net.dhcp.message import BadMessage, Message, MessageType
from tests.unit.net.dhcp_driver import Driver, request


def header(**changes: object) -> bytes:
    """A valid DISCOVER up to the options."""
    data = bytearray(request(MessageType.DISCOVER).encode()[: wire.HEADER_SIZE])
    for at, value in changes.items():
        data[int(at[1:])] = value  # type: ignore[call-overload]
    return bytes(data)


def test_scapy_reads_what_we_write() -> None:
    """Every field and option of our ACK is what scapy finds in it."""
    ack = Driver().bind(options={55: bytes((1, 3, 6, 15)), 61: b"\xff12345"})
    seen = BOOTP(ack.encode())
    options = {one[0]: one[1:] for one in seen[DHCP].options if isinstance(one, tuple)}
    assert (seen.op, seen.htype, seen.hlen, seen.xid) == (2, 1, 6, 0x1234)
    assert seen.yiaddr == "10.5.0.10"
    assert seen.chaddr[:6] == ack.chaddr
    assert options["message-type"] == (5,)
    assert options["server_id"] == options["router"] == options["name_server"] == ("10.5.0.1",)
    assert options["subnet_mask"] == ("255.255.255.0",)
    assert options["domain"] == (b"guest.rayos",)
    assert (options["lease_time"], options["renewal_time"], options["rebinding_time"]) == (
        (3600,),
        (1800,),
        (3150,),
    )
    assert options["client_id"] == (b"\xff12345",)


def test_we_read_what_scapy_writes() -> None:
    """A DISCOVER made by scapy means the same to us."""
    options = [("message-type", "discover"), ("requested_addr", "10.5.0.77"), ("hostname", b"web"), "end"]
    data = bytes(BOOTP(op=1, xid=77, secs=9, flags=0x8000, chaddr=b"\2\0\0\0\0\1") / DHCP(options=options))
    seen = wire.decode(data)
    assert (seen.xid, seen.secs, seen.flags, seen.chaddr) == (77, 9, 0x8000, b"\2\0\0\0\0\1")
    assert seen.options == {53: b"\1", 50: bytes((10, 5, 0, 77)), 12: b"web"}


def test_a_message_survives_the_round_trip() -> None:
    """decode(encode(x)) = x."""
    before = request(MessageType.INFORM, options={12: b"web", 61: b"\1" * 7}, secs=3, flags=0x8000, ciaddr=9)
    assert wire.decode(before.encode()) == before


def test_an_encoded_message_has_at_least_300_bytes() -> None:
    """Some relays and clients drop shorter ones (RFC 1542, 2.1)."""
    assert len(request(MessageType.DISCOVER).encode()) == 300


def test_a_long_option_is_split_and_joined_again() -> None:
    """RFC 3396: more than 255 bytes travel as several options of the same code."""
    routes = bytes(range(256)) * 2
    before = request(MessageType.INFORM, options={121: routes})
    data = before.encode(1400)
    assert data.count(bytes((121, 255))) == 2
    assert wire.decode(data) == before


def test_options_that_do_not_fit_go_to_file_and_sname_and_come_back() -> None:
    """Overload (RFC 2132, 9.3) with the least size that a client may demand; the bound is kept."""
    options = {code: bytes((code,)) * 60 for code in (60, 61, 66, 67, 77, 12, 15)}
    before = request(MessageType.INFORM, options=options)
    data = before.encode(wire.DEFAULT_MAX_SIZE)
    assert len(data) <= wire.DEFAULT_MAX_SIZE
    assert bytes((52, 1)) in data
    after = wire.decode(data)
    assert after.options == before.options


def test_what_fits_nowhere_is_left_out_and_the_end_stays() -> None:
    """A small maximum size never cuts an option in two or loses the end option."""
    options = {code: bytes(100) for code in range(60, 80)}
    after = wire.decode(request(MessageType.INFORM, options=options).encode(wire.DEFAULT_MAX_SIZE))
    assert after.type == MessageType.INFORM
    assert 2 <= len(after.options) < 20
    assert all(len(value) in (1, 100) for value in after.options.values())


def test_overload_is_read_in_the_order_of_the_rfc() -> None:
    """Options, then file, then sname; a code in several of them is joined in that order."""
    data = bytearray(header() + bytes((53, 1, 1, 52, 1, 3, 12, 1)) + b"a\xff")
    data[44 : 44 + 4] = bytes((12, 1)) + b"c\xff"
    data[108 : 108 + 4] = bytes((12, 1)) + b"b\xff"
    assert wire.decode(bytes(data)).options[12] == b"abc"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(239),
        header()[:239],
        header(_0=0) + b"\xff",
        header(_0=3) + b"\xff",
        header(_1=6) + b"\xff",
        header(_2=16) + b"\xff",
        header(_2=0) + b"\xff",
        header(_236=0) + b"\xff",
        header() + b"\x35",
        header() + b"\x35\x01",
        header() + b"\x0c\xff" + bytes(254),
        header() + b"\x34\x01\x04\xff",
        header() + b"\x34\x00\xff",
        header() + bytes(5000) + b"\xff",
    ],
)
def test_a_malformed_message_is_refused(data: bytes) -> None:
    """Short, wrong hardware, wrong cookie, options past the end, bad overload (hostile-inputs D1,
    D2).
    """
    with pytest.raises(BadMessage):
        wire.decode(data)


def test_routes_and_addresses_read_back() -> None:
    """Options 3 and 121 are read as they were written; a torn value gives nothing rather than nonsense."""
    from ipaddress import IPv4Address, IPv4Network

    routes = (
        (IPv4Network("10.0.0.0/8"), IPv4Address("10.0.0.1")),
        (IPv4Network("0.0.0.0/0"), IPv4Address("10.0.0.2")),
    )
    value = option.routes(routes)
    assert option.read_routes(value) == routes
    assert option.read_routes(value[:-1]) == ()
    assert option.read_routes(b"\x21\0\0\0\0\0\0\0\0\0") == ()
    assert option.read_addresses(struct.pack("!IIB", 1, 2, 3)) == (IPv4Address(1), IPv4Address(2))


def test_a_client_fqdn_gives_its_first_label() -> None:
    """Both encodings of RFC 4702; broken ones give nothing."""
    assert option.fqdn_name(b"\x00\0\0web.example") == "web"
    assert option.fqdn_name(b"\x04\0\0\x03web\x07example\0") == "web"
    assert option.fqdn_name(b"\x04\0\0\xc0web") is None
    assert option.fqdn_name(b"\x04\0") is None


def test_a_message_is_immutable() -> None:
    """A request that waits for its probe is the one that came."""
    with pytest.raises(AttributeError):
        request(1).xid = 2  # type: ignore[misc]
    assert isinstance(request(1), Message)
