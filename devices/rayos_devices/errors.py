"""Whose fault it is, and therefore what happens next.

Every fault a guest or a frontend can provoke is one of four classes; each has exactly one reaction, taken at one place:

=========  ==========================================  ============================================================
class      example                                     reaction
=========  ==========================================  ============================================================
Request    unknown type, sector out of range           error status to the guest, counted (the device model)
Chain      buffer outside RAM, no status byte          ``used(head, 0)``, counted, the queue goes on (the vring)
Queue      avail index jump, loop, nested indirect     latched broken until the queue is reset; error eventfd
Protocol   bad vhost-user message                      received descriptors closed, session dropped, listen again
=========  ==========================================  ============================================================

Anything else that escapes is a bug of ours: the worker dies and its supervisor starts a successor.
"""

from __future__ import annotations


class DeviceError(Exception):
    """Base of every fault that is not ours. The message says what was seen and what was allowed."""


class RequestError(DeviceError):
    """A well-formed chain carries a request that cannot be done (class R)."""


class DeniedError(RequestError):
    """The gate does not let an operation of the host's happen; `op` is its name (`rayos_devices.gate.Op`)."""

    def __init__(self, op: str, message: str) -> None:
        super().__init__(message)
        self.op = op


class ChainError(DeviceError):
    """A descriptor chain that cannot be used (class C)."""


class QueueError(DeviceError):
    """A virtqueue whose driver broke the ring's rules (class Q)."""


class ProtocolError(DeviceError):
    """A vhost-user message that breaks the protocol (class P)."""


class ConfigurationError(DeviceError):
    """The operator asked for something impossible: a missing image, a size that is no multiple of 512."""
