"""virtio-net on the wire (VIRTIO 1.3, 5.1.6): the header before every frame, and the feature bits offered."""

from __future__ import annotations

from enum import IntFlag
from typing import Final

#: 5.1.6, before every frame here: flags u8, gso_type u8, hdr_len, gso_size, csum_start, csum_offset, num_buffers le16.
HEADER_BYTES: Final = 12
#: Offset of le16 num_buffers.
NUM_BUFFERS_OFFSET: Final = 10
#: 5.1.6.1: without num_buffers, between us and a driver that acked neither VERSION_1 nor MRG_RXBUF.
LEGACY_HEADER_BYTES: Final = NUM_BUFFERS_OFFSET
GAP_BYTES: Final = HEADER_BYTES - LEGACY_HEADER_BYTES

ETHERNET_HEADER_BYTES: Final = 14
#: A GSO segment is at most 64 KiB of IP packet behind its Ethernet header and a VLAN tag.
MAX_FRAME_BYTES: Final = ETHERNET_HEADER_BYTES + 4 + 65535

#: Where frames are looked at, one up to this size is copied whole; of a longer one the headers.
WHOLE_BYTES: Final = 256
HEAD_BYTES: Final = 128


class NetFeature(IntFlag):
    """5.1.3. MAC, STATUS and MTU fields of the configuration space are the frontend's (QEMU's) to offer and fill, and
    so is the control queue: with `-netdev vhost-user` QEMU does its commands (MAC, RX mode, VLAN, announce, queue
    pairs) and passes on one thing, which pairs are enabled. By GUEST_ANNOUNCE it lets the driver announce itself."""

    CSUM = 1 << 0
    GUEST_CSUM = 1 << 1
    MTU = 1 << 3
    GUEST_TSO4 = 1 << 7
    GUEST_TSO6 = 1 << 8
    HOST_TSO4 = 1 << 11
    HOST_TSO6 = 1 << 12
    MRG_RXBUF = 1 << 15
    GUEST_ANNOUNCE = 1 << 21
    MQ = 1 << 22
