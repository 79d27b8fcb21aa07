"""rayos_net.dns.zone: what the zone says, whose names it knows, and that no bytes make it raise."""

import os
import random
import time
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest
from dnslib import RCODE, DNSRecord  # type: ignore[import-untyped]

from rayos_net.dns.zone import Zone

SERVER = IPv4Address("10.5.0.1")
PACKETS = int(os.environ.get("RAYOS_FUZZ_PACKETS", "20000"))  # `make soak`: a million


@pytest.fixture
def zone() -> Zone:
    """A zone with one guest, web = 10.5.0.2."""
    zone = Zone("Guest.rayos.", IPv4Network("10.5.0.0/24"), SERVER)
    assert zone.put(int(SERVER) + 1, "web")
    return zone


def ask(zone: Zone, name: str, kind: str = "A") -> Any:
    """The answer, as dnslib reads it."""
    query = zone.read(DNSRecord.question(name, kind).pack())
    assert query is not None
    return DNSRecord.parse(zone.answer(query))


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("web.guest.rayos", "A", ["10.5.0.2"]),
        ("WEB.Guest.Rayos", "ANY", ["10.5.0.2"]),
        ("2.0.5.10.in-addr.arpa", "PTR", ["web.guest.rayos."]),
        ("host.guest.rayos", "A", ["10.5.0.1"]),
        ("1.0.5.10.in-addr.arpa", "PTR", ["host.guest.rayos."]),
        ("guest.rayos", "NS", ["host.guest.rayos."]),
    ],
)
def test_names_and_addresses(zone: Zone, name: str, kind: str, said: list[str]) -> None:
    """Forward and reverse agree, whatever the case of the question, with authority."""
    answer = ask(zone, name, kind)
    assert [str(one.rdata) for one in answer.rr] == said
    assert (answer.header.rcode, answer.header.aa) == (RCODE.NOERROR, 1)


@pytest.mark.parametrize(
    ("name", "kind", "rcode", "has_soa"),
    [
        ("web.guest.rayos", "AAAA", RCODE.NOERROR, True),  # the name exists: RFC 2308, 2.2
        ("mail.guest.rayos", "A", RCODE.NXDOMAIN, True),
        ("a.web.guest.rayos", "A", RCODE.NXDOMAIN, True),
        ("9.0.5.10.in-addr.arpa", "PTR", RCODE.NXDOMAIN, True),
        ("9.0.6.10.in-addr.arpa", "PTR", RCODE.REFUSED, False),
        ("999.0.5.10.in-addr.arpa", "PTR", RCODE.REFUSED, False),
        ("example.org", "A", RCODE.REFUSED, False),
        ("notguest.rayos", "A", RCODE.REFUSED, False),
        (".", "NS", RCODE.REFUSED, False),
    ],
)
def test_what_is_not_there(zone: Zone, name: str, kind: str, rcode: int, has_soa: bool) -> None:
    """A name of ours that is not there may be cached as such for a moment; others' names are refused."""
    answer = ask(zone, name, kind)
    assert (answer.header.rcode, bool(answer.auth), answer.rr) == (rcode, has_soa, [])


def test_a_name_has_one_address_and_an_address_one_name(zone: Zone) -> None:
    """Who comes second does not take the name; when its holder goes, it is free."""
    assert not zone.put(int(SERVER) + 2, "web")
    assert not zone.put(int(SERVER) + 2, "host")
    assert not zone.put(int(SERVER), "other")
    assert not zone.put(int(IPv4Address("10.6.0.2")), "far")
    assert not zone.put(int(SERVER) + 2, "no.dots")
    assert zone.put(int(SERVER) + 1, "db")
    assert zone.put(int(SERVER) + 2, "web")
    assert [str(one.rdata) for one in ask(zone, "web.guest.rayos").rr] == ["10.5.0.3"]
    assert not zone.put(int(SERVER) + 2, None)
    assert ask(zone, "web.guest.rayos").header.rcode == RCODE.NXDOMAIN


@pytest.mark.parametrize(
    ("data", "rcode"),
    [
        (b"", None),
        (bytes(11), None),
        (bytes.fromhex("0001 8180 0001 0000 0000 0000") + b"\3web\0\0\1\0\1", None),  # an answer
        (bytes.fromhex("0001 2000 0001 0000 0000 0000") + b"\3web\0\0\1\0\1", RCODE.NOTIMP),  # NOTIFY
        (bytes.fromhex("0001 0100 0002 0000 0000 0000") + b"\3web\0\0\1\0\1" * 2, RCODE.FORMERR),
        (bytes.fromhex("0001 0100 0001 0000 0000 0000") + b"\3web", RCODE.FORMERR),
        (
            bytes.fromhex("0001 0100 0001 0000 0000 0000") + b"\4webx\xc0\x0c\0\1\0\1",
            RCODE.FORMERR,
        ),  # a circle
        (bytes.fromhex("0001 0100 0001 0000 0000 0000") + b"\x3f" + b"a" * 63 + b"\0\0\1\0\1", RCODE.REFUSED),
        (
            bytes.fromhex("0001 0100 0001 0000 0000 0000") + (b"\x3f" + b"a" * 63) * 4 + b"\0\0\1\0\1",
            RCODE.FORMERR,
        ),
        (
            bytes.fromhex("0001 0100 0001 0000 0000 0000") + b"\5guest\5rayos\0\0\1\0\3",
            RCODE.REFUSED,
        ),  # CHAOS
    ],
)
def test_queries_that_are_none(zone: Zone, data: bytes, rcode: int | None) -> None:
    """An answer is never answered, a fault is named."""
    query = zone.read(data)
    if rcode is None:
        assert query is None
        return
    assert query is not None
    assert DNSRecord.parse(zone.answer(query)).header.rcode == rcode


def test_no_bytes_make_it_raise(zone: Zone) -> None:
    """A bounded random run over mutated queries: every answer is small and readable by dnslib."""
    seed = time.time_ns()
    chance = random.Random(seed)
    kept = [
        DNSRecord.question(name, "ANY").pack() for name in ("web.guest.rayos", "2.0.5.10.in-addr.arpa", "x.y")
    ]
    for _ in range(PACKETS):
        data = bytearray(chance.choice(kept))
        for _ in range(chance.randrange(5)):
            at = chance.randrange(len(data) or 1)
            match chance.randrange(4):
                case 0 if data:
                    data[at] = chance.randrange(256)
                case 1:
                    data[at:at] = chance.randbytes(chance.randrange(1, 70))
                case 2:
                    del data[at : at + chance.randrange(1, 9)]
                case 3:
                    data[at:at] = bytes((0xC0, chance.randrange(256)))
        query = zone.read(bytes(data))
        answer = b"" if query is None else zone.answer(query)
        assert len(answer) <= 512, (seed, data.hex())
