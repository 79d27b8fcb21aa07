"""Requests of the host's side to one device: a name, the device that does it, and an answer now or later."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from rayos_devices.backend import Backend

B = TypeVar("B", bound=Backend)
#: None: not yet, ask again at the next news; else the answer's fields, its bytes, and descriptors to close when sent.
HostAnswer = tuple[dict[str, Any], bytes, list[int]] | None


class Refused(Exception):
    """A request that cannot be done; `code` is for programs, the text for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class HostRequest:
    """One request. `reader` names the connection that it came on; an answer has at most `room_bytes` of data."""

    fields: dict[str, Any]
    data: bytes
    reader: int
    room_bytes: int
    on_news: Callable[[], None]


@dataclass(frozen=True, slots=True)
class HostOperation(Generic[B]):
    """One operation of a kind. `device` is whom it means when the request names none; "" if it has to."""

    backend: type[B]
    do: Callable[[B, HostRequest], HostAnswer]
    device: str = ""

    def takes(self, backend: Backend | None) -> bool:
        """Whether it can be done by this device."""
        return isinstance(backend, self.backend)

    def __call__(self, backend: Backend, request: HostRequest) -> HostAnswer:
        """Errors: Refused, RequestError; KeyError, TypeError and ValueError for a field that is missing or wrong."""
        if not isinstance(backend, self.backend):
            raise Refused("no_such_device", f"device {backend.name!r} does no such thing")
        return self.do(backend, request)
