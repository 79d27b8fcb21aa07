"""An answer that comes in pieces, without a known end."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import cast

from starlette.responses import StreamingResponse
from starlette.types import Send


class Stream(StreamingResponse):
    """Pieces of an async generator, which is closed whenever the client leaves, also between two of them."""

    async def stream_response(self, send: Send) -> None:
        async with aclosing(cast("AsyncGenerator[bytes, None]", self.body_iterator)):
            await super().stream_response(send)
