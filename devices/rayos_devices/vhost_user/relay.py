"""Stands between a frontend that must never see a disconnect and a backend that may die.

QEMU aborts or loses the device when a GPU, input or console backend goes away, so it talks to a relay that does not.
Towards the frontend the relay is a backend; towards the backend it is a frontend: it passes messages on, folds them
into a `Transcript`, and tells a successor the lot. Exactly once: a message that wants an answer is kept until
the answer is here; a backend's last answer is read even after its death; then the message is sent again. The data
path (eventfds, guest memory) does not pass through.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable
from typing import Final

from rayos_devices.errors import ProtocolError
from rayos_devices.loop import READ, Loop
from rayos_devices.vhost_user.connection import MESSAGE_TIMEOUT, Channel
from rayos_devices.vhost_user.message import ANSWERED, FLAG_REPLY, U64, FrontendRequest, Message
from rayos_devices.vhost_user.transcript import Transcript

log = logging.getLogger(__name__)

_ACK: Final = U64.pack(0)


class Relay:
    """One device's relay on a loop.

    `connect(has_history, config_writes_before)` is called when a backend connection is wanted and gives the relay's end
    of a socket pair, or None while there is no backend; `attach` is called again when there is one. `forget(queue)` is
    called, also again, when a queue does not run: where its backend was in it means nothing any more.
    """

    def __init__(
        self,
        name: str,
        queue_count: int,
        listening: socket.socket,
        loop: Loop,
        connect: Callable[[bool, int], socket.socket | None],
        forget: Callable[[int], None] = lambda _queue: None,
    ) -> None:
        self.name = name
        self.is_connected = False
        self._listening = listening
        self._loop = loop
        self._connect = connect
        self._forget = forget
        self._queue_count = queue_count
        self._transcript = Transcript(queue_count)
        self._front: Channel | None = None
        self._back: Channel | None = None
        self._pending: Message | None = None
        #: Answers to what a successor was told, which the frontend has had from its predecessor.
        self._repeated = 0
        self._timer = 0
        listening.setblocking(False)
        loop.register(listening.fileno(), self._accept)

    # -- the frontend's side -------------------------------------------------------------------------------------

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listening.accept()
        except (BlockingIOError, ConnectionError):
            return
        self._loop.unregister(self._listening.fileno())
        self._front = Channel(sock)
        self.is_connected = True
        self._loop.register(sock.fileno(), self._front_ready)
        self.attach()

    def _front_ready(self, events: int) -> None:
        assert self._front is not None
        self._cancel_timer()
        if self._pending is not None:
            if events & ~READ:
                self.drop("the frontend left while it waited for an answer")
            return
        try:
            while self._pending is None:
                message = self._front.receive()
                if message is None:
                    break
                self._pass_on(message)
        except (EOFError, ConnectionError):
            self.drop("the frontend left")
            return
        except ProtocolError as error:
            self.drop(str(error))
            return
        if self._front is not None and self._front.is_partial:
            self._timer = self._loop.call_at(
                self._loop.now() + MESSAGE_TIMEOUT, lambda: self.drop("half a message, and nothing more")
            )

    def _cancel_timer(self) -> None:
        if self._timer:
            self._loop.cancel(self._timer)
            self._timer = 0

    def _pass_on(self, message: Message) -> None:
        if message.request in ANSWERED or message.needs_reply:
            self._pending = message
            self._pause_front()
            self._send_back(message)
        else:
            self._send_back(message)
            self._fold(message)

    def _pause_front(self) -> None:
        """No message of the frontend is read while one waits for its answer."""
        assert self._front is not None
        self._loop.modify(self._front.sock.fileno(), 0)

    def drop(self, reason: str) -> None:
        """End the frontend's session and listen for the next one."""
        self._cancel_timer()
        if self._front is not None:
            log.info("frontend session of %s ended: %s", self.name, reason)
            self._loop.unregister(self._front.sock.fileno())
            self._front.discard()
            self._front.sock.close()
            self._front = None
            self._loop.register(self._listening.fileno(), self._accept)
        self.is_connected = False
        self._close_back()
        if self._pending is not None:
            for fd in self._pending.fds:
                os.close(fd)
            self._pending = None
        self._transcript.close()
        self._forget_stopped()

    def _fold(self, message: Message, reply: bytes | None = None) -> None:
        self._transcript.fold(message, reply)
        if message.request in (FrontendRequest.GET_VRING_BASE, FrontendRequest.RESET_DEVICE):
            self._forget_stopped()

    def _forget_stopped(self) -> None:
        for queue in range(self._queue_count):
            if not self._transcript.is_running(queue):
                self._forget(queue)

    # -- the backend's side --------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Connect the backend, or its successor, and bring it to where the session is."""
        if self._front is None or self._back is not None:
            return
        has_history = not self._transcript.is_empty
        sock = self._connect(has_history, self._transcript.config_writes_before)
        if sock is None:
            return
        self._back = Channel(sock, is_frontend=True)
        self._loop.register(sock.fileno(), self._back_ready)
        self._repeated = 0
        self._forget_stopped()
        for message in self._transcript.replay():
            self._repeated += message.request in ANSWERED
            self._send_back(message)
        if self._pending is not None:
            self._send_back(self._pending)

    def _send_back(self, message: Message) -> None:
        if self._back is None:
            return
        try:
            self._back.send(message.pack(), tuple(message.fds))
        except (ProtocolError, OSError):
            # It is dead or does not read: what it knew is in the transcript, and its supervisor sees the rest.
            self._close_back()

    def _back_ready(self, _events: int) -> None:
        self.drain()

    def drain(self) -> None:
        """Pass the backend's answers on, also those it sent just before it died."""
        try:
            while self._back is not None:
                reply = self._back.receive()
                if reply is None:
                    return
                self._answer(reply)
        except (EOFError, ConnectionError):
            self._close_back()
        except ProtocolError as error:
            self.drop(f"the backend broke the protocol: {error}")

    def _answer(self, reply: Message) -> None:
        if self._repeated:
            self._repeated -= 1
            return
        message, self._pending = self._pending, None
        if message is None or reply.request is not message.request:
            raise ProtocolError(f"an answer to {reply.request.name} that nobody asked for")
        if message.request in ANSWERED or reply.payload == _ACK:
            self._fold(message, reply.payload)
        else:  # refused: a successor must not be told
            for fd in message.fds:
                os.close(fd)
        assert self._front is not None
        try:
            self._front.send(Message(reply.request, reply.flags | FLAG_REPLY, reply.payload).pack())
        except (ProtocolError, OSError) as error:
            self.drop(f"the frontend does not take its answers: {error}")
            return
        self._loop.modify(self._front.sock.fileno(), READ)

    def _close_back(self) -> None:
        if self._back is not None:
            self._loop.unregister(self._back.sock.fileno())
            self._back.discard()
            self._back.sock.close()
            self._back = None

    def close(self) -> None:
        """Stop relaying for good."""
        self.drop("shutting down")
        self._loop.unregister(self._listening.fileno())
        self._listening.close()
