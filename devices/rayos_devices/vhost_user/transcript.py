"""A frontend's conversation with a backend, folded: enough to tell a successor the same.

Messages go in as they pass (`fold`), and `replay` gives the shortest conversation that leads a fresh backend to the
same state. The descriptors of the folded messages are owned here until they are replaced. Bounded: one entry per queue
and kind, one per configuration offset, MAX_REGIONS regions.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from rayos_devices.errors import ProtocolError
from rayos_devices.vhost_user.message import (
    FLAG_NEED_REPLY,
    U64,
    VRING_INDEX_MASK,
    VRING_STATE,
    ConfigAccess,
    FrontendRequest,
    Message,
    unpack_memory_region,
)
from rayos_devices.virtio.memory import MAX_REGIONS

_Key = TypeVar("_Key")

#: What stays of a queue when its device is reset: the frontend's descriptors, which it does not send again.
_KEPT_AT_RESET = frozenset((FrontendRequest.SET_VRING_CALL, FrontendRequest.SET_VRING_ERR))
#: In the order a backend needs them: a queue goes live at its kick, or when it is enabled afterwards.
_QUEUE_ORDER = (
    FrontendRequest.SET_VRING_CALL,
    FrontendRequest.SET_VRING_ERR,
    FrontendRequest.SET_VRING_NUM,
    FrontendRequest.SET_VRING_ADDR,
    FrontendRequest.SET_VRING_BASE,
    FrontendRequest.SET_VRING_KICK,
    FrontendRequest.SET_VRING_ENABLE,
)
_GLOBAL_ORDER = (
    FrontendRequest.SET_PROTOCOL_FEATURES,
    FrontendRequest.SET_OWNER,
    FrontendRequest.SET_BACKEND_REQ_FD,
    FrontendRequest.SET_LOG_BASE,
    FrontendRequest.SET_FEATURES,
    FrontendRequest.SET_STATUS,
    FrontendRequest.NET_SET_MTU,
    FrontendRequest.GPU_SET_SOCKET,
)


@dataclass(slots=True)
class Transcript:
    """The fold. `queue_count` bounds what a frontend can make it remember."""

    queue_count: int
    _globals: dict[FrontendRequest, Message] = field(default_factory=dict)
    _config: dict[int, Message] = field(default_factory=dict)
    _memory: Message | None = None
    _regions: list[Message] = field(default_factory=list)
    _queues: dict[tuple[int, FrontendRequest], Message] = field(default_factory=dict)
    _config_writes: int = 0

    def fold(self, message: Message, reply: bytes | None = None) -> None:
        """Take over `message` with its descriptors; `reply` is the payload it was answered with, if it was."""
        request = message.request
        if request in _GLOBAL_ORDER:
            _put(self._globals, request, message)
        elif request is FrontendRequest.SET_CONFIG:
            self._config_writes += 1
            _put(self._config, ConfigAccess.unpack(message.payload).offset, message)
        elif request is FrontendRequest.SET_MEM_TABLE:
            self._drop_memory()
            self._memory = message
        elif request is FrontendRequest.ADD_MEM_REG:
            if len(self._regions) >= MAX_REGIONS:
                _close(message)
                raise ProtocolError(f"more than {MAX_REGIONS} memory regions")
            self._regions.append(message)
        elif request is FrontendRequest.REM_MEM_REG:
            self._remove_region(message)
            _close(message)
        elif request is FrontendRequest.GET_VRING_BASE:
            if reply is not None and len(reply) == VRING_STATE.size:
                self._stop_queue(*VRING_STATE.unpack(reply))
            _close(message)
        elif request is FrontendRequest.RESET_DEVICE:
            self._reset_device()
            _close(message)
        elif request in _QUEUE_ORDER:
            index = _queue_index(message)
            if index < self.queue_count:
                _put(self._queues, (index, request), message)
            else:
                _close(message)
        else:
            _close(message)

    def _stop_queue(self, index: int, base: int) -> None:
        stopped = self._queues.pop((index, FrontendRequest.SET_VRING_KICK), None)
        if stopped is not None:
            _close(stopped)
        if index < self.queue_count:
            payload = VRING_STATE.pack(index, base)
            _put(
                self._queues,
                (index, FrontendRequest.SET_VRING_BASE),
                Message(FrontendRequest.SET_VRING_BASE, 1, payload),
            )

    def _reset_device(self) -> None:
        for key in [key for key in self._queues if key[1] not in _KEPT_AT_RESET]:
            _close(self._queues.pop(key))
        self._globals.pop(FrontendRequest.SET_FEATURES, None)

    def _remove_region(self, message: Message) -> None:
        gone = unpack_memory_region(message.payload)
        for candidate in self._regions:
            spec = unpack_memory_region(candidate.payload)
            if (spec.guest_address, spec.user_address, spec.size) == (
                gone.guest_address,
                gone.user_address,
                gone.size,
            ):
                _close(candidate)
                self._regions.remove(candidate)
                return

    def _drop_memory(self) -> None:
        if self._memory is not None:
            _close(self._memory)
        for region in self._regions:
            _close(region)
        self._memory = None
        self._regions = []

    def replay(self) -> Iterator[Message]:
        """The messages to send; those in ANSWERED have a reply anyway. The descriptors stay the transcript's."""
        for request in _GLOBAL_ORDER:
            if request in self._globals:
                yield _silent(self._globals[request])
        yield from map(_silent, self._config.values())
        if self._memory is not None:
            yield _silent(self._memory)
        yield from map(_silent, self._regions)
        for index in range(self.queue_count):
            for request in _QUEUE_ORDER:
                message = self._queues.get((index, request))
                if message is not None:
                    yield _silent(message)

    @property
    def config_writes_before(self) -> int:
        """How many writes of the configuration there were before the first that `replay` gives again."""
        return self._config_writes - len(self._config)

    def is_running(self, queue: int) -> bool:
        """The frontend gave the queue to the backend, and did not take it back."""
        return (queue, FrontendRequest.SET_VRING_KICK) in self._queues

    @property
    def is_empty(self) -> bool:
        return not (self._globals or self._queues or self._memory)

    def close(self) -> None:
        """Forget everything: the frontend left."""
        self._drop_memory()
        for message in (*self._globals.values(), *self._config.values(), *self._queues.values()):
            _close(message)
        self._globals.clear()
        self._config.clear()
        self._config_writes = 0
        self._queues.clear()


def _put(table: dict[_Key, Message], key: _Key, message: Message) -> None:
    old = table.get(key)
    table[key] = message
    if old is not None:
        _close(old)


def _close(message: Message) -> None:
    for fd in message.fds:
        os.close(fd)
    message.fds.clear()


def _silent(message: Message) -> Message:
    return Message(message.request, message.flags & ~FLAG_NEED_REPLY, message.payload, message.fds)


def _queue_index(message: Message) -> int:
    if message.request in (
        FrontendRequest.SET_VRING_KICK,
        FrontendRequest.SET_VRING_CALL,
        FrontendRequest.SET_VRING_ERR,
    ):
        return int(U64.unpack(message.payload)[0] & VRING_INDEX_MASK)
    return int(VRING_STATE.unpack_from(message.payload)[0])
