"""One frontend's session: folds vhost-user messages into a backend's features, memory and live queues.

Per queue the frontend sends NUM, ADDR, BASE and KICK in its own order (net sends ENABLE before anything else), so a
queue goes live exactly when all of them are known and it is enabled; that rule is `_update`. Descriptors are owned
here from the message that brought them until they are replaced, the queue is stopped or the session ends.

A frontend may negotiate bits that were never offered (QEMU's vhost-user-gpu sends RING_RESET); they are masked.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from rayos_devices.backend import Backend
from rayos_devices.errors import ProtocolError
from rayos_devices.loop import Loop
from rayos_devices.native import signal
from rayos_devices.vhost_user.message import (
    ANSWERED,
    LOG_BASE,
    U64,
    VRING_F_LOG,
    VRING_INDEX_MASK,
    VRING_NO_FD,
    VRING_STATE,
    BackendRequest,
    ConfigAccess,
    FrontendRequest,
    Message,
    VringAddress,
    pack_backend_request,
    pack_reply,
    unpack_memory_region,
    unpack_memory_table,
)
from rayos_devices.virtio.features import Feature
from rayos_devices.virtio.layout import (
    EVENT_BYTES,
    MAX_QUEUE_SIZE,
    avail_ring_bytes,
    descriptor_table_bytes,
    used_ring_bytes,
)
from rayos_devices.virtio.log import DirtyLog
from rayos_devices.virtio.memory import MAX_REGIONS, GuestMemory
from rayos_devices.virtio.packed import is_packed_base

_ACK: Final = U64.pack(0)
#: vhost-user, *VHOST_USER_PROTOCOL_F_REPLY_ACK*: anything but zero is a failure.
_REFUSED: Final = U64.pack(1)
#: VIRTIO 1.3, 2.1: the device status is one byte.
_MAX_STATUS: Final = 0xFF


@dataclass(slots=True)
class _Queue:
    """The frontend's settings of one queue so far."""

    size: int = 0
    address: VringAddress | None = None
    base: int = 0
    kick_fd: int = -1
    is_kicked: bool = False
    is_enabled: bool = False
    is_resumed: bool = False

    def forget(self) -> None:
        """The device was reset."""
        self.size, self.address, self.base = 0, None, 0
        self.is_kicked = self.is_enabled = self.is_resumed = False


class Session:
    """`handle` every message in order, `close` at the end.

    `resume` tells that a predecessor was killed: the first start of each queue takes its position out of the used ring
    or the packed ring's journal, and calls the driver once, since the predecessor's call may be lost.
    """

    def __init__(
        self,
        backend: Backend,
        loop: Loop,
        *,
        resume: bool = False,
        config_writes: int = 0,
        must_be_sealed: bool = True,
        on_refusal: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        """`config_writes`: how many writes of the configuration a predecessor was told that are not told again.
        `must_be_sealed`: memory that could shrink under us is refused. `on_refusal` hears why a request was refused."""
        self._backend = backend
        self._loop = loop
        self._on_refusal = on_refusal
        self._memory = GuestMemory(must_be_sealed=must_be_sealed)
        self._log: DirtyLog | None = None
        self._features = 0
        self._protocol_features = 0
        self._status = 0
        self._backend_channel: socket.socket | None = None
        self._queues = [_Queue(is_resumed=resume) for _ in backend.queues]
        self._config_writes = config_writes
        backend.start_session(resumed=resume)
        self._leftover: set[int] = set()

    def handle(self, message: Message) -> bytes | None:
        """Act on one message; returns the bytes to answer, or None.

        Takes over the message's descriptors, also when it raises. Errors: ProtocolError (class P): the caller closes;
        but a frontend that asked for an acknowledgement gets one that is not zero, and the session goes on.
        """
        try:
            reply = self._dispatch(message)
        except ProtocolError as error:
            if not message.needs_reply or message.request in ANSWERED:
                raise
            self._on_refusal(str(error))
            return pack_reply(message.request, _REFUSED)
        finally:
            for fd in message.fds:
                os.close(fd)
            message.fds.clear()
        if reply is not None:
            return pack_reply(message.request, reply)
        if message.needs_reply and message.request not in ANSWERED:
            return pack_reply(message.request, _ACK)
        return None

    def _dispatch(self, message: Message) -> bytes | None:
        payload = message.payload
        match message.request:
            case FrontendRequest.GET_FEATURES:
                return U64.pack(self._backend.features)
            case FrontendRequest.SET_FEATURES:
                self._set_features(U64.unpack(payload)[0])
            case FrontendRequest.GET_PROTOCOL_FEATURES:
                return U64.pack(self._backend.protocol_features)
            case FrontendRequest.SET_PROTOCOL_FEATURES:
                self._protocol_features = U64.unpack(payload)[0] & self._backend.protocol_features
            case FrontendRequest.SET_OWNER:
                pass
            case FrontendRequest.RESET_OWNER:
                self._stop_all()
            case FrontendRequest.GET_QUEUE_NUM:
                return U64.pack(self._backend.queue_num)
            case FrontendRequest.SET_MEM_TABLE:
                self._set_memory(message)
            case FrontendRequest.SET_LOG_BASE:
                self._log = DirtyLog(message.fds[0], *LOG_BASE.unpack(payload))
                self._restart_all()
                return _ACK
            case FrontendRequest.GET_MAX_MEM_SLOTS:
                return U64.pack(MAX_REGIONS)
            case FrontendRequest.ADD_MEM_REG:
                spec, fd = unpack_memory_region(payload), message.fds[0]
                self._change_memory(lambda memory: memory.add(spec, fd))
            case FrontendRequest.REM_MEM_REG:
                spec = unpack_memory_region(payload)
                self._change_memory(lambda memory: memory.remove(spec))
            case FrontendRequest.SET_VRING_NUM:
                self._set_size(*VRING_STATE.unpack(payload))
            case FrontendRequest.SET_VRING_ADDR:
                self._set_address(VringAddress.unpack(payload))
            case FrontendRequest.SET_VRING_BASE:
                self._set_base(*VRING_STATE.unpack(payload))
            case FrontendRequest.GET_VRING_BASE:
                return self._get_base(VRING_STATE.unpack(payload)[0])
            case FrontendRequest.SET_VRING_KICK:
                self._set_kick(message)
            case FrontendRequest.SET_VRING_CALL | FrontendRequest.SET_VRING_ERR:
                self._set_signal(message)
            case FrontendRequest.SET_VRING_ENABLE:
                self._set_enabled(*VRING_STATE.unpack(payload))
            case FrontendRequest.RESET_DEVICE:
                self._reset_device()
            case FrontendRequest.SET_STATUS:
                self._set_status(U64.unpack(payload)[0])
            case FrontendRequest.GET_STATUS:
                return U64.pack(self._status)
            case FrontendRequest.SET_BACKEND_REQ_FD:
                self._set_backend_channel(message)
            case FrontendRequest.NET_SET_MTU:
                pass  # told for information: the MTU the guest uses is in the frontend's config space
            case FrontendRequest.GET_CONFIG:
                try:
                    access = ConfigAccess.unpack(payload)
                except ProtocolError as error:
                    self._on_refusal(str(error))
                    return b""  # vhost-user, GET_CONFIG: how an error is answered
                space = self._backend.config_space()[access.offset : access.offset + access.size]
                return ConfigAccess(
                    access.offset, access.size, access.flags, space.ljust(access.size, b"\0")
                ).pack()
            case FrontendRequest.SET_CONFIG:
                access = ConfigAccess.unpack(payload)
                self._config_writes += 1
                if self._backend.is_new_write(self._config_writes):
                    self._backend.write_config(access.offset, access.data)
            case FrontendRequest.GPU_SET_SOCKET:
                if not self._backend.take_gpu_socket(message.fds[0]):
                    raise ProtocolError(f"GPU_SET_SOCKET for {self._backend.name}, which is no GPU")
                message.fds.clear()
        return None

    def has_mapped(self, address: int) -> bool:
        """Whether guest memory of this session is at an address in this process."""
        return any(0 <= address - region.address < region.size for region in self._memory.regions)

    # -- the device as a whole -----------------------------------------------------------------------------------

    def _reset_device(self) -> None:
        """RESET_DEVICE: what the driver set up goes; memory, signals, configuration and sockets are the frontend's."""
        self._stop_all()
        for queue in self._queues:
            self._drop_kick(queue)
            queue.forget()
        self._features = 0
        self._backend.reset_device()

    def _set_status(self, status: int) -> None:
        if status > _MAX_STATUS:
            raise ProtocolError(f"device status {status:#x}: it is one byte")
        self._status = status
        self._backend.status = status

    def _set_backend_channel(self, message: Message) -> None:
        if not stat.S_ISSOCK(os.fstat(message.fds[0]).st_mode):
            raise ProtocolError("SET_BACKEND_REQ_FD with a descriptor that is no socket")
        self._drop_backend_channel()
        self._backend_channel = socket.socket(fileno=message.fds.pop())
        self._backend_channel.setblocking(False)
        self._backend.set_config_listener(self._tell_config_change)

    def _tell_config_change(self) -> None:
        """A frontend that does not read has earlier ones to read, which say the same."""
        assert self._backend_channel is not None
        with suppress(OSError):
            self._backend_channel.send(
                pack_backend_request(BackendRequest.CONFIG_CHANGE), socket.MSG_NOSIGNAL
            )

    def _drop_backend_channel(self) -> None:
        if self._backend_channel is not None:
            self._backend_channel.close()
            self._backend_channel = None
            self._backend.set_config_listener(None)

    # -- features and memory -------------------------------------------------------------------------------------

    def _set_features(self, features: int) -> None:
        was_logging = self._features & Feature.LOG_ALL
        self._features = features & self._backend.features
        if self._features & Feature.LOG_ALL != was_logging:
            self._restart_all()  # no request may be under way that is half logged
        self._backend.set_features(self._features)

    def _set_memory(self, message: Message) -> None:
        specs, fds = unpack_memory_table(message.payload), message.fds
        self._change_memory(lambda memory: memory.replace(specs, fds))

    def _change_memory(self, change: Callable[[GuestMemory], None]) -> None:
        """Change the memory, or nothing: a live queue whose ring would be outside of it goes on where it is."""
        before = self._memory.regions
        change(self._memory)
        try:
            self._restart_all()
        except ProtocolError:
            self._memory.restore(before)
            self._restart_all()
            raise

    def _restart_all(self) -> None:
        """Live queues look into the new memory; their positions stay."""
        for index, queue in enumerate(self._queues):
            if self._backend.queues[index].attached:
                self._stop(index)
                self._update(index)
            elif queue.is_kicked:
                self._update(index)

    # -- queues --------------------------------------------------------------------------------------------------

    def _queue(self, index: int) -> _Queue:
        if index >= len(self._queues):
            raise ProtocolError(f"queue {index}: {self._backend.name} has {len(self._queues)}")
        return self._queues[index]

    def _set_size(self, index: int, size: int) -> None:
        queue = self._queue(index)
        if self._backend.queues[index].attached:
            raise ProtocolError(f"SET_VRING_NUM for queue {index} while it runs")
        if not 1 <= size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise ProtocolError(
                f"queue {index} of {size} entries: a power of 2 up to {MAX_QUEUE_SIZE} is allowed"
            )
        queue.size = size
        self._update(index)

    def _set_address(self, address: VringAddress) -> None:
        queue = self._queue(address.index)
        for name, value, alignment in (
            ("descriptor table", address.descriptors, 16),
            ("avail ring", address.avail, 2),
            ("used ring", address.used, 4),
        ):
            if value % alignment:
                raise ProtocolError(
                    f"{name} of queue {address.index} at {value:#x}: it must be aligned to {alignment}"
                )
        queue.address = address
        if self._backend.queues[address.index].attached:
            self._stop(address.index)
        self._update(address.index)

    def _set_base(self, index: int, base: int) -> None:
        queue = self._queue(index)
        if self._backend.queues[index].attached:
            raise ProtocolError(f"SET_VRING_BASE for queue {index} while it runs")
        if base > 0xFFFF and not self._is_packed:
            raise ProtocolError(f"base {base} of queue {index}: at most 65535 is allowed")
        queue.base = base

    def _get_base(self, index: int) -> bytes:
        queue = self._queue(index)
        if self._backend.queues[index].attached:
            self._stop(index)
        queue.is_kicked = False
        self._drop_kick(queue)
        return VRING_STATE.pack(index, queue.base)

    def _set_kick(self, message: Message) -> None:
        value = U64.unpack(message.payload)[0]
        index = value & VRING_INDEX_MASK
        queue = self._queue(index)
        fd = _take_eventfd(message, value)
        if self._backend.queues[index].attached:
            self._stop(index)
        self._drop_kick(queue)
        queue.kick_fd = fd
        queue.is_kicked = True
        if not self._features & Feature.PROTOCOL_FEATURES:
            queue.is_enabled = True
        if fd >= 0:
            self._loop.register(fd, lambda _events, index=index: self._kicked(index))  # type: ignore[misc]
        self._update(index)

    def _set_signal(self, message: Message) -> None:
        value = U64.unpack(message.payload)[0]
        index = value & VRING_INDEX_MASK
        self._queue(index)
        name = "call_fd" if message.request is FrontendRequest.SET_VRING_CALL else "error_fd"
        self._replace_signal(index, name, _take_signal(message, value))
        vring = self._backend.queues[index]
        if name == "error_fd":
            if vring.broken:
                signal(vring.error_fd)
        elif vring.attached:
            # QEMU throws away the descriptor that a queue has from its start until the driver's vector is known, and
            # with it a call of that time; the driver, called for nothing, finds nothing and goes on.
            vring.call()

    def _set_enabled(self, index: int, enabled: int) -> None:
        queue = self._queue(index)
        queue.is_enabled = bool(enabled)
        self._update(index)

    def _update(self, index: int) -> None:
        """Bring the queue to what the frontend asked for: live exactly when everything about it is known."""
        queue = self._queues[index]
        vring = self._backend.queues[index]
        wanted = queue.is_kicked and queue.is_enabled and queue.size > 0 and queue.address is not None
        if wanted and not vring.attached:
            self._start(index)
        elif not wanted and vring.attached:
            self._stop(index)

    def _start(self, index: int) -> None:
        queue = self._queues[index]
        vring = self._backend.queues[index]
        address, memory = queue.address, self._memory
        assert address is not None
        if self._is_packed:
            self._check_packed(index, queue, address)
            avail_bytes = used_bytes = EVENT_BYTES
            # A frontend names one address to log by, and a packed ring is written in two places.
            descriptors_at, used_at = map(memory.guest_address, (address.descriptors, address.used))
        else:
            avail_bytes, used_bytes = avail_ring_bytes(queue.size), used_ring_bytes(queue.size)
            descriptors_at, used_at = 0, address.log if address.flags & VRING_F_LOG else 0
        vring.attach(
            memory,
            queue.size,
            memory.user_view(address.descriptors, descriptor_table_bytes(queue.size)),
            memory.user_view(address.avail, avail_bytes),
            memory.user_view(address.used, used_bytes),
            base=queue.base,
            resumed=queue.is_resumed,
            packed=self._is_packed,
            event_idx=bool(self._features & Feature.EVENT_IDX),
            indirect=bool(self._features & Feature.INDIRECT_DESC),
            notify_on_empty=bool(self._features & Feature.NOTIFY_ON_EMPTY),
            log=self._log if self._features & Feature.LOG_ALL else None,
            used_address=used_at,
            descriptors_address=descriptors_at,
        )
        resumed, queue.is_resumed = queue.is_resumed, False
        self._backend.start_queue(index, resumed=resumed)
        if resumed:
            vring.call()
        # A kick before this moment is in no eventfd of ours: look once without waiting for one.
        self._schedule(index)

    @property
    def _is_packed(self) -> bool:
        return bool(self._features & Feature.RING_PACKED)

    def _check_packed(self, index: int, queue: _Queue, address: VringAddress) -> None:
        """Checks what a split ring leaves open."""
        for name, value in ("driver", address.avail), ("device", address.used):
            if value % EVENT_BYTES:
                raise ProtocolError(
                    f"{name} event suppression of queue {index} at {value:#x}: it must be aligned to {EVENT_BYTES}"
                )
        if not is_packed_base(queue.base, queue.size):
            raise ProtocolError(
                f"base {queue.base:#x} of queue {index}: positions of a ring of {queue.size} are allowed"
            )

    def _stop(self, index: int) -> None:
        self._backend.stop_queue(index)
        self._queues[index].base = self._backend.queues[index].stop()

    def _stop_all(self) -> None:
        for index in range(len(self._queues)):
            if self._backend.queues[index].attached:
                self._stop(index)

    # -- work ----------------------------------------------------------------------------------------------------

    def _kicked(self, index: int) -> None:
        if self._backend.queues[index].take_kick(self._queues[index].kick_fd):
            self._run(index)

    def _schedule(self, index: int) -> None:
        if index not in self._leftover:
            self._leftover.add(index)
            self._loop.call_soon(lambda: self._run_leftover(index))

    def _run_leftover(self, index: int) -> None:
        if index in self._leftover:
            self._leftover.discard(index)
            self._run(index)

    def _run(self, index: int) -> None:
        if self._backend.run_queue(index):
            self._schedule(index)

    # -- descriptors ---------------------------------------------------------------------------------------------

    def _drop_kick(self, queue: _Queue) -> None:
        if queue.kick_fd >= 0:
            self._loop.unregister(queue.kick_fd)
            os.close(queue.kick_fd)
            queue.kick_fd = -1

    def _replace_signal(self, index: int, name: str, fd: int) -> None:
        vring = self._backend.queues[index]
        old: int = getattr(vring, name)
        setattr(vring, name, fd)
        if old >= 0:
            os.close(old)

    def close(self) -> None:
        """Stop every queue and close every descriptor; the backend can serve another session."""
        self._stop_all()
        self._leftover.clear()
        for index, queue in enumerate(self._queues):
            self._drop_kick(queue)
            self._replace_signal(index, "call_fd", -1)
            self._replace_signal(index, "error_fd", -1)
        self._drop_backend_channel()
        self._memory.clear()
        self._log = None
        self._backend.reset()


def _take_eventfd(message: Message, value: int) -> int:
    """The message's eventfd, out of the message; -1 when it says that there is none."""
    if not _brings_descriptor(message, value):
        return -1
    if not _is_eventfd(message.fds[0]):
        raise ProtocolError(f"{message.request.name} with a descriptor that is no eventfd")
    return message.fds.pop(0)


def _take_signal(message: Message, value: int) -> int:
    """As `_take_eventfd`; the end of a pipe, too, which User Mode Linux listens to."""
    if not _brings_descriptor(message, value):
        return -1
    if not (_is_writable_pipe(message.fds[0]) or _is_eventfd(message.fds[0])):
        raise ProtocolError(
            f"{message.request.name} with a descriptor that is no eventfd and no writable pipe"
        )
    return message.fds.pop(0)


def _brings_descriptor(message: Message, value: int) -> bool:
    if value & ~(VRING_INDEX_MASK | VRING_NO_FD):
        raise ProtocolError(
            f"{message.request.name} with value {value:#x}: a queue index and the no-descriptor bit are allowed"
        )
    if value & VRING_NO_FD:
        if message.fds:
            raise ProtocolError(f"{message.request.name} brought a descriptor and said that there is none")
        return False
    if not message.fds:
        raise ProtocolError(f"{message.request.name} without its descriptor")
    return True


def _is_writable_pipe(fd: int) -> bool:
    """Also makes it non-blocking: a full pipe says all that a call says."""
    if (
        not stat.S_ISFIFO(os.fstat(fd).st_mode)
        or fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    ):
        return False
    os.set_blocking(fd, False)
    return True


def _is_eventfd(fd: int) -> bool:
    """Also makes it non-blocking. Other anonymous descriptors (epoll, pidfd, timerfd) do not take a zero."""
    if stat.S_IFMT(os.fstat(fd).st_mode) != 0:
        return False
    try:
        os.set_blocking(fd, False)
        return os.write(fd, bytes(8)) == 8
    except OSError:
        return False
