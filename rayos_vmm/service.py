"""The service: every operation that a front end can ask for, in one class.

The API layer translates HTTP to these calls and nothing else; see `errors.py` for what they raise.
"""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Literal

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.vm.view import Event, ExecResult, VmView

Condition = Literal["ready", "running", "stopped"]


class Service:
    async def info(self) -> dict[str, Any]:
        raise NotImplementedError

    async def define(self, spec: VmSpec) -> VmView:
        raise NotImplementedError

    async def start(self, name: str) -> VmView:
        """Returns once the machine runs (its devices are up and QEMU continued), not when it is ready."""
        raise NotImplementedError

    async def stop(self, name: str, timeout_s: float = 20.0) -> VmView:
        raise NotImplementedError

    async def kill(self, name: str) -> VmView:
        raise NotImplementedError

    async def pause(self, name: str) -> VmView:
        raise NotImplementedError

    async def resume(self, name: str) -> VmView:
        raise NotImplementedError

    async def reset(self, name: str) -> VmView:
        raise NotImplementedError

    async def remove(self, name: str) -> None:
        raise NotImplementedError

    async def get(self, name: str) -> VmView:
        raise NotImplementedError

    async def list(self) -> builtins.list[VmView]:
        raise NotImplementedError

    async def console_write(self, name: str, port: int, data: bytes) -> None:
        raise NotImplementedError

    def console_stream(
        self, name: str, port: int, since: int | None = None
    ) -> AbstractAsyncContextManager[AsyncIterator[tuple[int, bytes]]]:
        raise NotImplementedError

    async def console_resize(self, name: str, port: int, columns: int, rows: int) -> None:
        raise NotImplementedError

    async def type_text(self, name: str, text: str) -> None:
        raise NotImplementedError

    async def send_key(self, name: str, combo: str) -> None:
        raise NotImplementedError

    async def pointer(self, name: str, x: float, y: float, buttons: Sequence[str] = ()) -> None:
        """Moves the tablet to (x, y) in 0..1 with `buttons` (left, right, middle) held; () releases all."""
        raise NotImplementedError

    async def screenshot(self, name: str) -> bytes:
        raise NotImplementedError

    async def qmp(self, name: str, command: str, arguments: dict[str, Any] | None = None) -> Any:
        raise NotImplementedError

    async def exec(self, name: str, command: str | Sequence[str], timeout_s: float = 60.0) -> ExecResult:
        raise NotImplementedError

    async def read_file(self, name: str, path: str) -> bytes:
        raise NotImplementedError

    async def write_file(self, name: str, path: str, data: bytes, mode: int = 0o644) -> None:
        raise NotImplementedError

    async def stats(self, name: str) -> dict[str, Any]:
        raise NotImplementedError

    async def leases(self) -> builtins.list[dict[str, Any]]:
        raise NotImplementedError

    def events(self, since: int | None = None) -> AsyncIterator[Event]:
        """From event `since`+1 on, then live and without end; None = from now. Close it with `aclosing`."""
        raise NotImplementedError

    async def wait(self, name: str, condition: Condition, timeout_s: float = 60.0) -> VmView:
        raise NotImplementedError

    def client(self) -> AbstractContextManager[None]:
        """Held by the API around every request and stream, so that the daemon is not taken for idle."""
        raise NotImplementedError

    async def wait_idle(self, seconds: float) -> None:
        """Returns once no machine has been running and no client there for `seconds` on end."""
        raise NotImplementedError


def open_service(config: Any, paths: Any) -> AbstractAsyncContextManager[Service]:
    """The running service; leaving it stops our part (DHCP, supervision) and leaves the guests running."""
    raise NotImplementedError
