"""The vhost-user codec: sizes, descriptors and flags are what their request may have."""

from __future__ import annotations

import struct

import pytest

from rayos_devices.errors import ProtocolError
from rayos_devices.vhost_user.message import (
    FLAG_NEED_REPLY,
    FLAG_REPLY,
    HEADER,
    MAX_CONFIG_BYTES,
    MAX_PAYLOAD_BYTES,
    MEMORY_HEADER,
    ConfigAccess,
    FrontendRequest,
    Header,
    Message,
    VringAddress,
    pack_region,
    pack_reply,
    pack_request,
    unpack_memory_region,
    unpack_memory_table,
)
from rayos_devices.virtio.memory import MAX_REGIONS, RegionSpec

REGION = RegionSpec(0x1000, 0x2000, 0x7F0000001000, 0x3000)


@pytest.mark.parametrize("request_", FrontendRequest, ids=lambda request: request.name)
def test_a_size_that_a_request_cannot_have_is_refused(request_: FrontendRequest) -> None:
    """At the header, before a byte of payload is waited for."""
    allowed = []
    for size in [*range(MAX_PAYLOAD_BYTES + 2), 1 << 16, 0xFFFFFFFF]:
        try:
            header = Header.unpack(HEADER.pack(request_, 1, size))
        except ProtocolError:
            continue
        assert (header.request, header.size) == (request_, size)
        allowed.append(size)
    assert allowed == list(range(allowed[0], allowed[-1] + 1))
    assert allowed[-1] <= MAX_PAYLOAD_BYTES


@pytest.mark.parametrize("number", [0, 7, 19, 22, 31, 32, 44, 255, 1 << 16, 0xFFFFFFFF])
def test_an_unknown_request_is_refused(number: int) -> None:
    """Only what is handled is known."""
    with pytest.raises(ProtocolError, match=f"unknown request {number}"):
        Header.unpack(HEADER.pack(number, 1, 0))


@pytest.mark.parametrize("version", [0, 2, 3])
def test_a_wrong_version_is_refused(version: int) -> None:
    """The two low bits of the flags say 1."""
    with pytest.raises(ProtocolError, match="version"):
        Header.unpack(HEADER.pack(FrontendRequest.GET_FEATURES, version, 0))


def test_a_reply_is_no_request() -> None:
    """A frontend has nothing to answer on this socket."""
    with pytest.raises(ProtocolError, match="reply"):
        Header.unpack(HEADER.pack(FrontendRequest.GET_FEATURES, 1 | FLAG_REPLY, 0))


@pytest.mark.parametrize("request_", FrontendRequest, ids=lambda request: request.name)
def test_a_request_brings_the_descriptors_it_may(request_: FrontendRequest) -> None:
    """Every other count is refused; only memory tables bring more than one."""
    header = Header(request_, 1, 0)
    allowed = []
    for count in range(MAX_REGIONS + 2):
        try:
            header.check_fds(count)
        except ProtocolError:
            continue
        allowed.append(count)
    assert allowed == list(range(allowed[0], allowed[-1] + 1))
    if request_ is FrontendRequest.SET_MEM_TABLE:
        assert allowed[-1] == MAX_REGIONS
    else:
        assert allowed[-1] <= 1


def test_messages_are_packed_as_the_specification_lays_them_out() -> None:
    """Header: request, flags with version 1, payload size; replies have bit 2, NEED_REPLY is bit 3."""
    assert pack_request(FrontendRequest.GET_FEATURES) == struct.pack("<III", 1, 1, 0)
    assert pack_request(FrontendRequest.SET_OWNER, need_reply=True) == struct.pack("<III", 3, 9, 0)
    assert pack_reply(FrontendRequest.GET_FEATURES, b"12345678") == struct.pack("<III", 1, 5, 8) + b"12345678"
    message = Message(FrontendRequest.SET_OWNER, 1 | FLAG_NEED_REPLY, b"")
    assert message.needs_reply
    assert message.pack() == pack_request(FrontendRequest.SET_OWNER, need_reply=True)


def test_a_vring_address_keeps_its_fields() -> None:
    """index, flags, descriptor, used, avail, log (the order of vhost_vring_addr)."""
    payload = struct.pack("<IIQQQQ", 1, 0, 0x1000, 0x2000, 0x3000, 0x4000)
    address = VringAddress.unpack(payload)
    assert (address.index, address.descriptors, address.used, address.avail) == (1, 0x1000, 0x2000, 0x3000)
    assert address.pack() == payload


def test_memory_tables_keep_their_regions() -> None:
    """Up to MAX_REGIONS of them."""
    payload = MEMORY_HEADER.pack(2, 0) + pack_region(REGION) * 2
    assert unpack_memory_table(payload) == [REGION, REGION]
    assert unpack_memory_table(MEMORY_HEADER.pack(0, 0)) == []
    assert unpack_memory_region(bytes(8) + pack_region(REGION)) == REGION


@pytest.mark.parametrize("count", [2, MAX_REGIONS + 1, 0xFFFFFFFF])
def test_a_table_may_not_promise_more_than_it_holds(count: int) -> None:
    """The count is checked against the bytes that came."""
    with pytest.raises(ProtocolError):
        unpack_memory_table(MEMORY_HEADER.pack(count, 0) + pack_region(REGION))


@pytest.mark.parametrize(
    ("offset", "size", "held"),
    [
        (0, 8, 7),
        (0, 8, 9),
        (0, MAX_CONFIG_BYTES + 1, MAX_CONFIG_BYTES),
        (MAX_CONFIG_BYTES, 1, 1),
        (0xFFFFFFFF, 1, 1),
        (1, 0xFFFFFFFF, 0),
    ],
)
def test_a_config_access_stays_in_the_config_space(offset: int, size: int, held: int) -> None:
    """Offset and size are bounded, and the size is that of the data."""
    with pytest.raises(ProtocolError):
        ConfigAccess.unpack(struct.pack("<III", offset, size, 0) + bytes(held))


def test_a_config_access_keeps_its_fields() -> None:
    """The last byte of the space is reachable, and nothing at all is."""
    access = ConfigAccess(MAX_CONFIG_BYTES - 1, 1, 1, b"x")
    assert ConfigAccess.unpack(access.pack()) == access
    assert ConfigAccess.unpack(bytes(12)) == ConfigAccess(0, 0, 0, b"")
