"""The host's operations on a console's ports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from rayos_devices.console.backend import ConsoleBackend
from rayos_devices.host import HostAnswer, HostOperation, HostRequest, Refused

#: Marks of one answer: they are JSON, some 32 bytes each.
MAX_MARKS: Final = 1024


def _port(console: ConsoleBackend, fields: dict[str, Any]) -> int:
    port = fields["port"]
    count = len(console.ports())
    if not isinstance(port, int) or not 0 <= port < count:
        raise Refused("no_such_port", f"no port {port!r}: 0 to {count - 1} are there")
    return port


def _write(backend: ConsoleBackend, request: HostRequest) -> HostAnswer:
    console, head, data = backend, request.fields, request.data
    port = _port(console, head)
    accepted = console.write(port, data, token=int(head.get("token", 0)))
    if accepted == 0 and data:
        return None
    return {"accepted": accepted}, b"", []


def _read(backend: ConsoleBackend, request: HostRequest) -> HostAnswer:
    console, head, data = backend, request.fields, request.data
    port = _port(console, head)
    total = console.total(port)
    offset = total if head["offset"] is None else int(head["offset"])
    if head.get("hold", False):  # as long as the connection lasts
        console.hold(port, request.reader, offset)
    if offset >= total:
        if head.get("wait", True) and head["offset"] is not None:
            return None
        return {"offset": total, "total": total}, b"", []
    start, data = console.read(port, offset, request.room_bytes)
    if not head.get("times", False):
        return {"offset": start, "total": total}, data, []
    marks = console.marks(port, start, start + len(data), MAX_MARKS + 1)
    if len(marks) > MAX_MARKS:
        data = data[: marks.pop()[0] - start]
    return {"offset": start, "total": total, "marks": marks}, data, []


def _resize(backend: ConsoleBackend, request: HostRequest) -> HostAnswer:
    console, head = backend, request.fields
    port = _port(console, head)
    is_done = console.resize(port, int(head["columns"]), int(head["rows"]))
    return ({}, b"", []) if is_done else None


def _ports(backend: ConsoleBackend, _request: HostRequest) -> HostAnswer:
    return {"ports": backend.ports()}, b"", []


OPERATIONS: Final[Mapping[str, HostOperation[ConsoleBackend]]] = {
    "console.write": HostOperation(ConsoleBackend, _write, "console"),
    "console.read": HostOperation(ConsoleBackend, _read, "console"),
    "console.resize": HostOperation(ConsoleBackend, _resize, "console"),
    "console.ports": HostOperation(ConsoleBackend, _ports, "console"),
}
