"""A console of a guest, over the API's WebSocket."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from rayos_vmm import errors


class Console:
    """One console of one guest. `writer` is who may write (None: nobody does), `is_writer` whether it is this one; both
    change while it is read, and `on_writer` is called then."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket
        self.offset = 0
        self.is_writer = False
        self.writer: str | None = None
        self.on_writer: Callable[[], object] | None = None

    async def be_seated(self) -> None:
        """Hear who writes, which is said first. Raises GuestGone when the daemon closed it instead."""
        from trio_websocket import ConnectionClosed

        try:
            self._hear(json.loads(await self._socket.get_message()))
        except ConnectionClosed as error:
            raise errors.GuestGone(f"the console was closed: {error.reason}") from None

    def _hear(self, said: dict[str, Any]) -> None:
        if "offset" in said:
            self.offset = int(said["offset"])
            return
        self.is_writer, self.writer = bool(said["is_writer"]), said["writer"]
        if self.on_writer is not None:
            self.on_writer()

    async def take(self) -> None:
        """Become the writer; whoever was watches on. Raises GuestGone when the console has ended."""
        await self._say({"take": True})

    async def write(self, data: bytes) -> None:
        """Input for the guest. Raises GuestGone when the console has ended."""
        from trio_websocket import ConnectionClosed

        try:
            await self._socket.send_message(data)
        except ConnectionClosed:
            raise errors.GuestGone("the console has ended") from None

    async def resize(self, columns: int, rows: int) -> None:
        """The size of the terminal, which counts while it writes. Raises GuestGone when the console has ended."""
        await self._say({"columns": columns, "rows": rows})

    async def _say(self, said: dict[str, Any]) -> None:
        from trio_websocket import ConnectionClosed

        try:
            await self._socket.send_message(json.dumps(said))
        except ConnectionClosed:
            raise errors.GuestGone("the console has ended") from None

    async def read(self) -> bytes:
        """The next bytes the guest wrote; empty once the console has ended. `offset` is then behind them.

        Raises:
            GuestGone: the daemon closed it with a reason.
        """
        from trio_websocket import ConnectionClosed

        while True:
            try:
                message = await self._socket.get_message()
            except ConnectionClosed as error:
                reason = error.reason
                if reason is not None and reason.code == 1008:
                    raise errors.GuestGone(str(reason.reason or "the console was closed")) from None
                return b""
            if isinstance(message, bytes):
                self.offset += len(message)
                return message
            self._hear(json.loads(message))
