"""The network device for a guest without our driver: a card that QEMU emulates sends and receives its frames here.

QEMU's `-netdev stream` puts a length of 32 bits, big-endian, before each Ethernet frame. Each frame goes through the
device's own rings, as a driver's would (`virtio/local.py`): shaped, judged, captured and counted as any other. No
offload is acknowledged, so frames are whole and their checksums are there.

QEMU connects again when the connection is lost; frames on their way are lost then, as on a wire.
"""

from __future__ import annotations

import logging
import socket
from typing import Final

from rayos_devices.errors import ProtocolError
from rayos_devices.loop import READ, WRITE, Loop
from rayos_devices.net.backend import RX, TX, NetBackend
from rayos_devices.net.wire import ETHERNET_HEADER_BYTES, HEADER_BYTES
from rayos_devices.virtio.features import Feature
from rayos_devices.virtio.local import LocalMemory, LocalQueue, ring_bytes

log = logging.getLogger(__name__)

LENGTH_BYTES: Final = 4
#: QEMU's NET_BUFSIZE (include/net/net.h): 4096 + 65536.
MAX_LENGTH: Final = 69632
#: IEEE 802.3, 4.4.2: minFrameSize without its check sequence. A tap has shorter frames, and a card drops those.
LEAST_BYTES: Final = 60
_SLOTS: Final = 256
#: Two VLAN tags.
_TAGS_BYTES: Final = 8
#: What waits for QEMU to take it; above, frames wait in the ring, and behind it on the network.
_MAX_OUTPUT_BYTES: Final = 256 << 10
_CHUNK_BYTES: Final = 256 << 10


def frame_bytes(mtu: int) -> int:
    """The longest frame of a network, with tags."""
    return ETHERNET_HEADER_BYTES + _TAGS_BYTES + mtu


def memory_bytes(mtu: int) -> int:
    """Bytes of this process's memory that the device takes."""
    return 2 * (_SLOTS * _slot_bytes(mtu) + ring_bytes(_SLOTS))


def _slot_bytes(mtu: int) -> int:
    return -(-(HEADER_BYTES + frame_bytes(mtu)) // 64) * 64


class Frames:
    """Cuts QEMU's stream into frames."""

    def __init__(self) -> None:
        self._data = bytearray()

    def __len__(self) -> int:
        return len(self._data)

    def add(self, data: bytes) -> None:
        """More of the stream."""
        self._data += data

    def take(self) -> bytes | None:
        """The next frame, None when it is not all there.

        Errors: ProtocolError for a length that QEMU never sends.
        """
        size = int.from_bytes(self._data[:LENGTH_BYTES])
        if size > MAX_LENGTH:
            raise ProtocolError(f"a frame of {size} bytes: at most {MAX_LENGTH} are allowed")
        if len(self._data) < LENGTH_BYTES + size:
            return None
        frame = bytes(self._data[LENGTH_BYTES : LENGTH_BYTES + size])
        del self._data[: LENGTH_BYTES + size]
        return frame


class StreamPort:
    """Serves `backend`, a card of one pair of queues, on a listening socket, to one QEMU at a time; the socket stays
    the caller's. `too_long` counts frames of the guest's that no network of this `mtu` carries."""

    def __init__(self, backend: NetBackend, listening: socket.socket, loop: Loop, *, mtu: int = 1500) -> None:
        self._backend = backend
        self._listening = listening
        self._loop = loop
        self._mtu = mtu
        self._sock: socket.socket | None = None
        self._frames = Frames()
        self._output = bytearray()
        self.too_long = 0
        self._memory = LocalMemory(memory_bytes(mtu))
        self._slots = {
            queue: [self._memory.allocate(_slot_bytes(mtu)) for _ in range(_SLOTS)] for queue in (RX, TX)
        }
        self._free = list(range(_SLOTS))  # of TX
        self._spent = list(range(_SLOTS))  # of RX: not offered to the device
        backend.set_features(backend.features & Feature.VERSION_1)
        self._receive = LocalQueue(backend, RX, self._memory, _SLOTS, self._received)
        self._transmit = LocalQueue(backend, TX, self._memory, _SLOTS, self._transmitted)
        for head, address in enumerate(self._slots[RX]):
            self._receive.lay_out(head, [(address, HEADER_BYTES + frame_bytes(mtu), True)])
        listening.setblocking(False)
        loop.register(listening.fileno(), self._accept)

    # -- the connection ------------------------------------------------------------------------------------------

    def _accept(self, _events: int) -> None:
        try:
            sock, _ = self._listening.accept()
        except (BlockingIOError, ConnectionError):
            return
        self.disconnect()  # who connects again has given its former connection up
        sock.setblocking(False)
        self._sock = sock
        self._loop.register(sock.fileno(), self._ready)
        self._offer()

    def _ready(self, events: int) -> None:
        if events & WRITE:
            self._send()
            self._received()
        if events & ~WRITE:
            self._read()

    def _read(self) -> None:
        sock = self._sock
        if sock is None:
            return
        try:
            data = sock.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.disconnect()
            return
        self._frames.add(data)
        self._take_frames()

    def disconnect(self) -> None:
        """Drops the connection, if there is one, and the frames that wait for it."""
        if self._sock is None:
            return
        self._loop.unregister(self._sock.fileno())
        self._sock.close()
        self._sock = None
        self._frames = Frames()
        self._output.clear()

    def _listen(self) -> None:
        """For frames while there are slots for them, for room on the socket while it is full."""
        if self._sock is not None:
            wanted = (READ if self._free else 0) | (WRITE if self._output else 0)
            self._loop.modify(self._sock.fileno(), wanted)

    # -- guest to network ----------------------------------------------------------------------------------------

    def _take_frames(self) -> None:
        try:
            is_new = False
            while self._free and (frame := self._frames.take()) is not None:
                if len(frame) > frame_bytes(self._mtu):
                    self.too_long += 1
                    continue
                head = self._free.pop()
                address = self._slots[TX][head]
                view = self._memory.view(address, HEADER_BYTES + len(frame))
                view[:HEADER_BYTES] = bytes(HEADER_BYTES)
                view[HEADER_BYTES:] = frame
                self._transmit.lay_out(head, [(address, len(view), False)])
                self._transmit.offer(head)
                is_new = True
            if is_new:
                self._transmit.kick()
        except ProtocolError as error:
            log.warning("the card of %s broke its stream and was dropped: %s", self._backend.name, error)
            self.disconnect()
        self._listen()

    def _transmitted(self) -> None:
        self._free.extend(head for head, _ in self._transmit.take_used())
        self._take_frames()

    # -- network to guest ----------------------------------------------------------------------------------------

    def _received(self) -> None:
        for head, written in self._receive.take_used():
            self._spent.append(head)
            size = written - HEADER_BYTES
            if self._sock is not None and size > 0:
                padding = max(0, LEAST_BYTES - size)
                self._output += (size + padding).to_bytes(LENGTH_BYTES)
                self._output += self._memory.view(self._slots[RX][head] + HEADER_BYTES, size)
                self._output += bytes(padding)
        self._send()
        self._offer()

    def _offer(self) -> None:
        """Gives receive buffers back to the device, unless QEMU does not take what it has."""
        if not self._spent or self._sock is None or len(self._output) > _MAX_OUTPUT_BYTES:
            return
        for head in self._spent:
            self._receive.offer(head)
        self._spent.clear()
        self._receive.kick()

    def _send(self) -> None:
        """As much as the socket takes; the rest when it is writable again."""
        while self._sock is not None and self._output:
            try:
                del self._output[: self._sock.send(self._output, socket.MSG_NOSIGNAL)]
            except BlockingIOError:
                break
            except OSError:
                self.disconnect()
        self._listen()

    def close(self) -> None:
        """Serves no more; the listening socket stays open."""
        self.disconnect()
        self._transmit.close()
        self._receive.close()
        self._loop.unregister(self._listening.fileno())
