"""The host's operation on an input device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from rayos_devices.host import HostAnswer, HostOperation, HostRequest
from rayos_devices.input.backend import InputBackend


def _inject(backend: InputBackend, request: HostRequest) -> HostAnswer:
    head = request.fields
    events = [(int(t), int(c), int(v)) for t, c, v in head["events"]]
    accepted = backend.offer(events, token=int(head.get("token", 0)))
    return ({"accepted": accepted}, b"", []) if accepted or not events else None


OPERATIONS: Final[Mapping[str, HostOperation[InputBackend]]] = {
    "inject": HostOperation(InputBackend, _inject)
}
