"""NBD as the protocol says it: the handshake, requests, replies, and what a client may not do."""

from __future__ import annotations

import struct

import pytest

from rayos_devices.blk.nbd_session import Export, NbdSession, Request
from rayos_devices.blk.nbd_wire import Command, CommandFlag, Error
from rayos_devices.errors import ProtocolError

MIB = 1 << 20
# Written down a second time: a judge does not ask the judged.
GREETING = b"NBDMAGICIHAVEOPT\0\3"
OPTION = struct.Struct(">8sII")
REQUEST = struct.Struct(">IHHQQI")


def option(number: int, content: bytes = b"") -> bytes:
    return OPTION.pack(b"IHAVEOPT", number, len(content)) + content


def go(name: bytes = b"", *asked: int, number: int = 7) -> bytes:
    count = struct.pack(f">H{len(asked)}H", len(asked), *asked)
    return option(number, struct.pack(">I", len(name)) + name + count)


def request(kind: int, offset: int = 0, length: int = 512, flags: int = 0, cookie: int = 7) -> bytes:
    return REQUEST.pack(0x25609513, flags, kind, cookie, offset, length)


def connected(*, is_read_only: bool = False) -> NbdSession:
    session = NbdSession(Export(MIB, is_read_only))
    assert session.receive(b"\0\0\0\3" + go()) == []
    assert session.take_output().startswith(GREETING)
    return session


def test_a_client_learns_size_flags_and_block_sizes() -> None:
    """By GO with the information that it asks for, and by the older EXPORT_NAME, with its zeros or without."""
    session = NbdSession(Export(MIB))
    session.receive(b"\0\0\0\1" + go(b"any name", 3))
    said = bytes(session.take_output())
    replies = said[len(GREETING) :]
    head = struct.Struct(">QIII")
    assert head.unpack_from(replies) == (0x3E889045565A9, 7, 3, 12)
    assert struct.unpack_from(">HQH", replies, 20) == (0, MIB, 0b1101101)
    assert struct.unpack_from(">HIII", replies, 52) == (3, 512, 4096, 32 * MIB)
    assert head.unpack_from(replies, 66) == (0x3E889045565A9, 7, 1, 0)

    for flags, size in (1, 134), (3, 10):
        session = NbdSession(Export(MIB, is_read_only=True))
        session.receive(struct.pack(">I", flags) + option(1, b"old"))
        export = bytes(session.take_output())[len(GREETING) :]
        assert len(export) == size and struct.unpack_from(">QH", export) == (MIB, 0b111)


def test_options_that_are_none_are_refused_and_the_client_goes_on() -> None:
    """STARTTLS, structured replies and rubbish are unsupported; LIST names one export without a name."""
    session = NbdSession(Export(MIB))
    session.receive(
        b"\0\0\0\3"
        + option(5)
        + option(8)
        + option(99, b"x" * 10)
        + option(3)
        + go(b"\xff", 1, number=6)[:-1]
    )
    replies = bytes(session.take_output())[len(GREETING) :]
    found = [struct.unpack_from(">QIII", replies, at)[1:3] for at in (0, 20, 40, 60, 84)]
    assert found == [(5, 2**31 + 1), (8, 2**31 + 1), (99, 2**31 + 1), (3, 2), (3, 1)]
    session.receive(b"\1" + option(7, b"\xff\xff\xff\xff"))
    assert struct.unpack_from(">QIII", session.take_output(), 52)[2] == 2**31 + 3
    session.receive(option(2))
    assert session.is_over


def test_requests_come_in_any_pieces_and_replies_in_any_order() -> None:
    """A write's data belongs to it, also when it comes byte by byte; the cookie says whose a reply is."""
    session = connected()
    wire = request(1, 1024, 512, flags=1) + b"w" * 512 + request(0, 0, 1024, cookie=8) + request(2)
    requests: list[Request] = []
    for at in range(len(wire)):
        requests += session.receive(wire[at : at + 1])
    assert requests == [
        Request(Command.WRITE, CommandFlag.FUA, 7, 1024, 512, b"w" * 512),
        Request(Command.READ, CommandFlag(0), 8, 0, 1024),
    ]
    assert session.is_over and session.receive(b"more") == []
    session.reply(8, Error.OK, b"r" * 1024)
    session.reply(7, Error.EIO)
    assert session.take_output() == struct.pack(">IIQ", 0x67446698, 0, 8) + b"r" * 1024 + struct.pack(
        ">IIQ", 0x67446698, 5, 7
    )


@pytest.mark.parametrize(
    ("wire", "error"),
    [
        (request(0, MIB - 512, 1024), 22),
        (request(0, 2**64 - 512, 512), 22),
        (request(0, 100, 512), 22),
        (request(0, 0, 100), 22),
        (request(0, 0, 0), 22),
        (request(5), 22),
        (request(9), 22),
        (request(3, 512, 0), 22),
        (request(0, flags=1 << 3), 22),
        (request(4, 0, 2**32 - 512), 22),
    ],
)
def test_a_request_that_breaks_a_rule_is_answered_and_the_next_is_done(wire: bytes, error: int) -> None:
    """The device behind never sees it."""
    session = connected()
    assert [one.cookie for one in session.receive(wire + request(0, cookie=9))] == [9]
    assert session.take_output() == struct.pack(">IIQ", 0x67446698, error, 7)


def test_a_read_only_disk_takes_no_write_of_any_kind() -> None:
    """EPERM, whatever the flags said."""
    session = connected(is_read_only=True)
    assert session.receive(request(1) + bytes(512) + request(4) + request(6)) == []
    assert session.take_output() == 3 * struct.pack(">IIQ", 0x67446698, 1, 7)


@pytest.mark.parametrize(
    "wire",
    [
        b"\0\0\0\2",
        b"\0\0\0\7",
        b"\0\0\0\3" + b"x" * 16,
        b"\0\0\0\3" + OPTION.pack(b"IHAVEOPT", 7, 8193),
        b"\0\0\0\3" + go() + bytes(28),
        b"\0\0\0\3" + go() + request(1, 0, 33 * MIB),
        b"\0\0\0\3" + go() + request(0, 0, 2**32 - 512),
    ],
)
def test_a_client_that_breaks_the_protocol_is_told_of_and_dropped(wire: bytes) -> None:
    """No length of its own is believed beyond what is allowed."""
    with pytest.raises(ProtocolError, match="allowed"):
        NbdSession(Export(MIB)).receive(wire)
