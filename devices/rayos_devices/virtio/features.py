"""Device-independent feature bits and device identifiers (VIRTIO 1.3, 5 and 6)."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class DeviceId(IntEnum):
    """VIRTIO 1.3, 5 *Device Types*."""

    NET = 1
    BLOCK = 2
    CONSOLE = 3
    GPU = 16
    INPUT = 18


class Feature(IntFlag):
    """VIRTIO 1.3, 6 *Reserved Feature Bits*; PROTOCOL_FEATURES is the vhost-user specification's.

    Not RING_RESET (40): QEMU tells the reset of one queue to a tap alone (ARCHITECTURE.md), so we would go on in a
    ring whose memory the driver has given up. Not IN_ORDER (35), although it holds here: Linux has no driver for it.
    """

    #: 6.3, of the legacy interface: a call when the driver's ring has run dry, whatever it suppresses.
    NOTIFY_ON_EMPTY = 1 << 24
    #: Between the frontend and us, as is PROTOCOL_FEATURES: log what is written (a migration).
    LOG_ALL = 1 << 26
    #: 6.3, of the legacy interface: buffers may be cut anywhere, as they always may be here.
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    RING_PACKED = 1 << 34


class Status(IntFlag):
    """VIRTIO 1.3, 2.1 *Device Status Field*."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    DEVICE_NEEDS_RESET = 64
    FAILED = 128


#: What every device here offers beside its own bits.
TRANSPORT_FEATURES = (
    Feature.NOTIFY_ON_EMPTY
    | Feature.LOG_ALL
    | Feature.ANY_LAYOUT
    | Feature.INDIRECT_DESC
    | Feature.EVENT_IDX
    | Feature.PROTOCOL_FEATURES
    | Feature.VERSION_1
)
