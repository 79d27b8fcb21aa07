"""The host's operations on a network card."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from rayos_devices.faults import plan_faults
from rayos_devices.host import HostAnswer, HostOperation, HostRequest
from rayos_devices.net.backend import NetBackend


def _capture(backend: NetBackend, request: HostRequest) -> HostAnswer:
    """The first request of a connection starts a capture and is answered at once, the next bring what was caught; it
    ends with the connection.
    """
    fields = {"offset_ns": time.time_ns() - time.monotonic_ns()}
    capture = backend.capture
    if capture is None or backend.capturing_reader != request.reader:
        backend.start_capture(int(request.fields["snap"]), request.on_news)
        backend.capturing_reader = request.reader
        return {**fields, "seen": 0, "dropped": 0}, b"", []
    data = capture.read(request.room_bytes)
    if not data:
        capture.ask()
        return None
    return {**fields, "seen": capture.seen, "dropped": capture.dropped}, data, []


def _faults(backend: NetBackend, request: HostRequest) -> HostAnswer:
    """With `rules`: from now on these; without: what they did so far."""
    if "rules" in request.fields:
        backend.set_faults(plan_faults(backend.faults, request.fields))
    return {"rules": backend.faults.snapshot() if backend.faults else []}, b"", []


OPERATIONS: Final[Mapping[str, HostOperation[NetBackend]]] = {
    "net.capture": HostOperation(NetBackend, _capture, "net"),
    "faults": HostOperation(NetBackend, _faults),
}
