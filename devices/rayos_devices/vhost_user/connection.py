"""The socket of a session: whole messages in, answers out, every descriptor closed.

`Channel` frames; it is used by backends and by the keeper, which stands between QEMU and a worker. A frontend that
sends half a message and stops is dropped after MESSAGE_TIMEOUT seconds; nobody else notices.
"""

from __future__ import annotations

import array
import logging
import os
import socket
from collections.abc import Callable
from typing import Final

from rayos_devices.backend import Backend
from rayos_devices.errors import ProtocolError
from rayos_devices.loop import READ, Loop
from rayos_devices.vhost_user.message import HEADER, MAX_FDS, Header, Message
from rayos_devices.vhost_user.session import Session

log = logging.getLogger(__name__)

#: Seconds a frontend has to finish a message it began.
MESSAGE_TIMEOUT: Final = 5.0
_ANCILLARY: Final = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


class Channel:
    """Reads messages from a non-blocking stream socket, a header and then its payload, never a byte further."""

    def __init__(self, sock: socket.socket, *, is_frontend: bool = False) -> None:
        """`is_frontend`: this end asks, so what it receives are replies."""
        sock.setblocking(False)
        self.sock = sock
        self._unpack_header = Header.unpack_reply if is_frontend else Header.unpack
        self._header: Header | None = None
        self._data = b""
        self._fds: list[int] = []

    @property
    def is_partial(self) -> bool:
        """A message has begun and is not complete."""
        return self._header is not None or bool(self._data)

    def receive(self) -> Message | None:
        """One whole message, or None when more bytes are needed.

        Errors: ProtocolError for bytes that are no message; EOFError at the end of the stream. Descriptors
        of the broken message are closed.
        """
        try:
            while True:
                wanted = HEADER.size if self._header is None else self._header.size
                if len(self._data) < wanted:
                    try:
                        self._fill(wanted - len(self._data))
                    except BlockingIOError:
                        return None
                    continue
                data, self._data = self._data, b""
                if self._header is None:
                    self._header = self._unpack_header(data)
                    if self._header.size:
                        continue
                    data = b""
                header, self._header = self._header, None
                header.check_fds(len(self._fds))
                fds, self._fds = self._fds, []
                return Message(header.request, header.flags, data, fds)
        except (ProtocolError, EOFError, ConnectionError):
            self.discard()
            raise

    def _fill(self, wanted: int) -> None:
        data, ancillary, flags, _ = self.sock.recvmsg(wanted, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(content[: len(content) - len(content) % received.itemsize])
                self._fds.extend(received)
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            raise ProtocolError(f"a message with more than {MAX_FDS} descriptors")
        if not data:
            raise EOFError
        self._data += data

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send a whole message at once. Errors: ProtocolError when the peer does not read its answers."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            sent = self.sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            sent = 0
        if sent != len(data):
            raise ProtocolError(f"the peer took {sent} of {len(data)} bytes: it does not read its answers")

    def discard(self) -> None:
        """Close the descriptors of a message that never became whole."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class Connection:
    """Serves one frontend on a loop until it leaves or breaks the protocol; then calls `on_close(reason)`."""

    def __init__(
        self,
        sock: socket.socket,
        backend: Backend,
        loop: Loop,
        on_close: Callable[[str], None],
        *,
        resume: bool = False,
        config_writes: int = 0,
        must_be_sealed: bool = True,
        on_refusal: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        self._channel = Channel(sock)
        self._session = Session(
            backend,
            loop,
            resume=resume,
            config_writes=config_writes,
            must_be_sealed=must_be_sealed,
            on_refusal=on_refusal,
        )
        self._loop = loop
        self._on_close = on_close
        self._timer = 0
        loop.register(sock.fileno(), self._ready)

    def _ready(self, _events: int) -> None:
        is_complete = False
        try:
            while (message := self._channel.receive()) is not None:
                is_complete = True
                answer = self._session.handle(message)
                if answer is not None:
                    self._channel.send(answer)
        except (EOFError, ConnectionError):
            self.close("the frontend left")
            return
        except ProtocolError as error:
            self.close(str(error))
            return
        if self._timer and is_complete:
            self._loop.cancel(self._timer)
            self._timer = 0
        # The deadline is the message's: a byte now and then does not move it.
        if self._channel.is_partial and not self._timer:
            self._timer = self._loop.call_at(self._loop.now() + MESSAGE_TIMEOUT, self._timed_out)

    def catch_up(self) -> None:
        """Handle what the frontend has said until now, its end too."""
        self._ready(READ)

    def lose(self, address: int) -> None:
        """A page of guest memory is gone: end the session if it was this one's."""
        if self._session.has_mapped(address):
            self.close("guest memory is gone: the file that the frontend shared was truncated")

    def _timed_out(self) -> None:
        self._timer = 0
        self.close(f"half a message, and nothing more for {MESSAGE_TIMEOUT:.0f} s")

    def close(self, reason: str) -> None:
        if self._timer:
            self._loop.cancel(self._timer)
        self._loop.unregister(self._channel.sock.fileno())
        self._session.close()
        self._channel.discard()
        # Told before it is seen: whoever holds the other end must be able to tell this from our death.
        self._on_close(reason)
        self._channel.sock.close()
