"""The console device: ports between a guest and whoever attaches (VIRTIO 1.3, 5.3). The template for the other devices.

A guest's bytes travel: kick -> `process` -> `_transmit` -> gate -> `ConsolePort.take_output` -> `commit` ->
`on_output` -> a viewer reads them back by offset. A viewer's: `write` -> gate -> `ConsolePort.give` -> save ->
`_receive` -> the guest's buffers -> `commit` -> `on_room`.

Invariants: what was published to the guest and what `total`, `taken` and `todo` say changes in one step
(`rayos_devices.durable`); control messages are `control.py`'s, which keeps no queue of them.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

from rayos_devices.bucket import BURST_SECONDS, TokenBucket
from rayos_devices.console.control import hear, next_message
from rayos_devices.console.history import BATCH_BYTES, HISTORY_BYTES
from rayos_devices.console.marks import Mark
from rayos_devices.console.port import PORT_BYTES, ConsolePort, PortSpec, Todo
from rayos_devices.console.wire import (
    CONFIG,
    CONTROL,
    CONTROL_RX,
    CONTROL_TX,
    EMERG_WR_OFFSET,
    ConsoleFeature,
    queue_count,
    rx_queue,
    tx_queue,
)
from rayos_devices.durable import DurableBackend
from rayos_devices.errors import ConfigurationError, DeniedError, RequestError
from rayos_devices.gate import OPEN, Denial, Gate, Op
from rayos_devices.idempotency import IdempotentResults
from rayos_devices.limits import Limit
from rayos_devices.loop import Loop
from rayos_devices.native import now_ns
from rayos_devices.state import StateStore
from rayos_devices.stats import Stats
from rayos_devices.virtio.chain import Chain
from rayos_devices.virtio.features import DeviceId

#: Writes of the configuration in this session that are done, before IdempotentResults and the ports.
_HEAD: Final = struct.Struct("<Q")
#: QEMU's own limit for virtio-serial.
MAX_PORTS: Final = 31


def _nothing(_port: int) -> None:
    """A hook that nobody set."""


class ConsoleBackend(DurableBackend):
    """Ports in the order of `ports`; port 0 is the one a driver without MULTIPORT uses.

    `history_fd` holds `history_bytes(len(ports))` bytes that outlive the worker; with None, and `state` None, nothing
    does. Hooks, called with a port's number on the loop's thread: `on_output` after bytes arrived, `on_room` after the
    guest took some.
    """

    device_id = DeviceId.CONSOLE
    BUDGET: ClassVar[int] = 128
    #: Capacity the StateStore must have.
    STATE_BYTES: ClassVar[int] = (
        _HEAD.size + IdempotentResults.STATE_BYTES + MAX_PORTS * ConsolePort.STATE.size
    )

    def __init__(
        self,
        name: str,
        loop: Loop,
        *,
        ports: Sequence[PortSpec],
        state: StateStore | None = None,
        history_fd: int | None = None,
        gate: Gate = OPEN,
    ) -> None:
        """Errors: ConfigurationError for no ports, too many, or a name that cannot be told to a guest."""
        if not 1 <= len(ports) <= MAX_PORTS:
            raise ConfigurationError(f"{len(ports)} console ports: 1 to {MAX_PORTS} are allowed")
        stats = Stats(Op.CONSOLE_WRITE, Op.CONSOLE_READ, Op.CONSOLE_RESIZE)
        store = state or StateStore(None, self.STATE_BYTES)
        super().__init__(name, queue_count(len(ports)), loop, stats, gate, store=store)
        self.on_output: Callable[[int], object] = _nothing
        self.on_room: Callable[[int], object] = _nothing
        memory = map_ports(history_fd, len(ports))
        self._ports = [
            ConsolePort(index, spec, memory[index * PORT_BYTES : (index + 1) * PORT_BYTES])
            for index, spec in enumerate(ports)
        ]
        self._sinks: dict[int, Callable[[], None]] = {}
        #: (port, reader) -> the offset up to which a reader that must miss nothing has read.
        self._read_up_to: dict[tuple[int, int], int] = {}
        self._by_queue: dict[int, tuple[ConsolePort, bool]] = {}
        for port in self._ports:
            self._by_queue[rx_queue(port.index)] = port, True
            self._by_queue[tx_queue(port.index)] = port, False
        self._results = IdempotentResults()
        self._bucket: TokenBucket | None = None
        self._held_back: dict[int, int] = {}
        self._config_writes = 0
        self._room = 0
        self._got_output: set[int] = set()
        self._got_room: set[int] = set()
        self.restore()

    @staticmethod
    def history_bytes(ports: int) -> int:
        """The size of the memfd that holds the bytes of so many ports."""
        return ports * PORT_BYTES

    @property
    def features(self) -> int:
        return super().features | ConsoleFeature.SIZE | ConsoleFeature.MULTIPORT | ConsoleFeature.EMERG_WRITE

    def config_space(self) -> bytes:
        first = self._ports[0]
        return CONFIG.pack(first.columns, first.rows, len(self._ports), 0)

    # -- state that outlives the worker --------------------------------------------------------------------------

    def pack_state(self) -> bytes:
        head = _HEAD.pack(self._config_writes)
        return head + self._results.pack() + b"".join([port.pack() for port in self._ports])

    def unpack_state(self, payload: bytes) -> None:
        (self._config_writes,) = _HEAD.unpack_from(payload)
        offset = _HEAD.size + IdempotentResults.STATE_BYTES
        self._results.unpack(payload[_HEAD.size : offset])
        for port in self._ports:
            port.unpack(payload[offset : offset + ConsolePort.STATE.size])
            offset += ConsolePort.STATE.size

    def ready_again(self) -> None:
        for port in self._ports:
            self.on_output(port.index)
            self.on_room(port.index)

    def forget_driver(self) -> None:
        for port in self._ports:
            port.restart(Todo.NOTHING)

    # -- accounting ----------------------------------------------------------------------------------------------

    LIMITS = (Limit.RATE,)

    @property
    def depth(self) -> int:
        """Bytes that wait for the guest."""
        return sum(port.waiting for port in self._ports)

    def limit(self, limit: Limit) -> int:
        return 0 if self._bucket is None else round(self._bucket.rate)

    def apply_limit(self, limit: Limit, value: int) -> None:
        """Output beyond the rate of all ports together waits in the guest's queues."""
        if self._sinks and value:
            raise RequestError("a console rate needs a QEMU with vhost-user consoles (10.2)")
        burst = max(value * BURST_SECONDS, 1.0)
        if not value:
            self._bucket = None
        elif self._bucket is None:
            self._bucket = TokenBucket(value, burst, now=self.loop.now())
        else:
            self._bucket.set_rate(value, burst, now=self.loop.now())
        for queue, timer in tuple(self._held_back.items()):
            self.loop.cancel(timer)
            self._go_on(queue)

    def _must_wait(self, queue: int) -> bool:
        if queue in self._held_back:
            return True
        now = self.loop.now()
        seconds = 0.0 if self._bucket is None else self._bucket.wait(now)
        if seconds > 0.0:
            self._held_back[queue] = self.loop.call_at(now + seconds, lambda: self._go_on(queue))
        return seconds > 0.0

    def _go_on(self, queue: int) -> None:
        self._held_back.pop(queue, None)
        self.run_soon(queue)

    def listen(self, on_news: Callable[[], None]) -> None:
        self.on_output = self.on_room = lambda _port: on_news()

    def forget_reader(self, reader: int) -> None:
        self.release(reader)

    # -- the host's side -----------------------------------------------------------------------------------------

    def write(self, port: int, data: bytes, *, token: int = 0) -> int:
        """Take over bytes for the guest's port; returns how many, 0 when there is no room until `on_room`.

        The same `token` (not 0) again does nothing and returns the same. Errors: RequestError when the gate refuses.
        """
        if self.is_undecided:
            return 0
        done = self._results.find(token)
        if done is not None:
            return done
        target = self._ports[port]
        if not data:
            return 0
        started = now_ns()
        denial = self.gate.check(Op.CONSOLE_READ, len(data))
        if denial is not None:
            self.stats.deny(Op.CONSOLE_READ, denial, len(data), started)
            raise DeniedError(
                Op.CONSOLE_READ.value, f"{len(data)} bytes for console port {port} refused: {denial.value}"
            )
        size = target.give(data)
        if size:
            self._results.remember(token, size)
            self.save()
            self.stats.allow(Op.CONSOLE_READ, size, started)
            self._deliver_soon(port)
        return size

    def _deliver_soon(self, port: int) -> None:
        sink = self._sinks.get(port)
        if sink is None:
            self.run_soon(rx_queue(port))
        else:
            self.loop.call_soon(sink)

    def resize(self, port: int, columns: int, rows: int) -> bool:
        """Tell the guest the size of a port's terminal; False until a successor knows its predecessor's state
        (`on_room` tells). Errors: RequestError for a size or a gate that says no."""
        started = now_ns()
        target = self._ports[port]
        for what, value in (("columns", columns), ("rows", rows)):
            if not 0 <= value <= 0xFFFF:
                self.stats.deny(Op.CONSOLE_RESIZE, Denial.INVALID, 0, started)
                raise RequestError(f"{value} {what}: 0 to 65535 are allowed")
        denial = self.gate.check(Op.CONSOLE_RESIZE, 0)
        if denial is not None:
            self.stats.deny(Op.CONSOLE_RESIZE, denial, 0, started)
            raise DeniedError(
                Op.CONSOLE_RESIZE.value, f"resize of console port {port} refused: {denial.value}"
            )
        if self.is_undecided:
            return False
        target.columns, target.rows = columns, rows
        if target.spec.is_console and target.is_ready:
            target.todo |= Todo.RESIZE
        self.save()
        self.stats.allow(Op.CONSOLE_RESIZE, 0, started)
        self.run_soon(CONTROL_RX)
        return True

    def read(self, port: int, offset: int, limit: int) -> tuple[int, bytes]:
        """(offset, bytes): up to `limit` bytes of a port's output from `offset`; one that is too old jumps forward."""
        return self._ports[port].read(offset, limit)

    def hold(self, port: int, reader: int, offset: int) -> None:
        """Notes that `reader` has read up to `offset` and must miss nothing. The guest waits before unread bytes are
        overwritten, until the reader calls again or calls `release`.
        """
        self._read_up_to[port, reader] = offset
        self._go_on_with(port)

    def release(self, reader: int) -> None:
        """It reads no more; unknown ones are ignored."""
        for key in [key for key in self._read_up_to if key[1] == reader]:
            del self._read_up_to[key]
            self._go_on_with(key[0])

    def _go_on_with(self, port: int) -> None:
        if port in self._sinks:
            self.loop.call_soon(self._sinks[port])
        else:
            self.run_soon(tx_queue(port))

    def room(self, port: int) -> int:
        """Bytes that the guest's port may write now, at most BATCH_BYTES; 0: more than half is to be read first."""
        offsets = [offset for (held, _), offset in self._read_up_to.items() if held == port]
        unread = self._ports[port].total - min(offsets) if offsets else 0
        return 0 if 2 * unread > HISTORY_BYTES else min(BATCH_BYTES, HISTORY_BYTES - unread)

    def marks(self, port: int, start: int, end: int, limit: int) -> list[Mark]:
        """(offset, nanoseconds since the epoch): when the bytes of a port's output from `start` to `end` came.

        The first is at or before `start` unless that is forgotten; at most `limit`, so the last may be before `end`.
        """
        return self._ports[port].marks_of(start, end, limit)

    def total(self, port: int) -> int:
        """Bytes the guest ever wrote to a port: the offset behind the last."""
        return self._ports[port].total

    def ports(self) -> list[dict[str, Any]]:
        """port, name, is_console, guest_open, columns, rows of each."""
        return [port.describe() for port in self._ports]

    # -- another way to the guest (chardev.py) -------------------------------------------------------------------

    def connect(self, port: int, sink: Callable[[], None] | None) -> None:
        """Have a port's bytes go another way than queues: `sink()` is called when some wait, and when there is `room`
        again; None ends that."""
        self._ports[port].restart(Todo.NOTHING)
        self._sinks.pop(port, None)
        if sink is not None:
            self._sinks[port] = sink
            self._ports[port].guest_open = True
            self.loop.call_soon(sink)
        self.save()

    def feed(self, port: int, data: bytes) -> None:
        """At most BATCH_BYTES came the other way; the gate is asked as for those of a queue."""
        if self._take_output(self._ports[port], [memoryview(data)], len(data)):
            self.save()
            self._got_output.clear()
            self.on_output(port)

    def waiting(self, port: int) -> list[memoryview]:
        """The bytes for the guest, in one piece or two."""
        target = self._ports[port]
        return target.pending.pieces(target.taken, target.waiting)

    def took(self, port: int, size: int) -> None:
        """The guest's side took so many of them."""
        self._ports[port].taken += size
        self.save()
        self.on_room(port)

    # -- the guest's side ----------------------------------------------------------------------------------------

    @property
    def _is_multiport(self) -> bool:
        return bool(self.acked_features & ConsoleFeature.MULTIPORT)

    def process(self, queue: int) -> bool:
        if queue >= CONTROL_RX and not self._is_multiport:
            return False  # queues that this driver did not ask for
        if queue == CONTROL_RX:
            return self.drain(queue, self._tell_driver, lambda: next_message(self._ports) is not None)
        if queue == CONTROL_TX:
            return self.drain(queue, self._hear_driver)
        port, is_rx = self._by_queue[queue]
        if is_rx:
            return self.drain(queue, lambda chain: self._receive(port, chain), lambda: self._is_ready(port))
        if self._must_wait(queue):
            return False
        self._room = self.room(port.index)
        if not self._room:
            return False  # `hold` goes on
        has_more = self.drain(queue, lambda chain: self._transmit(port, chain))
        return has_more and self.room(port.index) == BATCH_BYTES

    def commit(self, queue: int) -> None:
        super().commit(queue)
        for port in self._got_output:
            self.on_output(port)
        for port in self._got_room:
            self.on_room(port)
        self._got_output.clear()
        self._got_room.clear()

    def _transmit(self, port: ConsolePort, chain: Chain) -> int | None:
        """Guest to host: at most BUDGET chains and one batch of bytes a turn, so that a flood leaves others theirs."""
        if self._room < chain.readable_bytes <= BATCH_BYTES:
            return None
        self._room -= self._take_output(port, chain.readable, chain.readable_bytes)
        return 0

    def _take_output(self, port: ConsolePort, buffers: list[memoryview], size: int) -> int:
        started = now_ns()
        denial = Denial.INVALID if size > BATCH_BYTES else self.gate.check(Op.CONSOLE_WRITE, size)
        if denial is not None:
            self.stats.deny(Op.CONSOLE_WRITE, denial, size, started)
            return 0
        if self._bucket is not None:
            self._bucket.take(size)
        if size:
            port.take_output(buffers, time.time_ns())
            self._got_output.add(port.index)
            self.is_dirty = True
        self.stats.allow(Op.CONSOLE_WRITE, size, started)
        return size

    def _is_ready(self, port: ConsolePort) -> bool:
        """Something waits for the guest, and somebody there reads it."""
        return port.waiting > 0 and (port.guest_open or not self._is_multiport)

    def _receive(self, port: ConsolePort, chain: Chain) -> int:
        """Host to guest: into the buffers a guest offers while its port is open. Without buffers the bytes wait."""
        size = port.fill(chain.writable, chain.writable_bytes)
        if size:
            self._got_room.add(port.index)
            self.is_dirty = True
        else:
            self.queues[rx_queue(port.index)].chain_errors += 1
        return size

    # -- control messages ----------------------------------------------------------------------------------------

    def _hear_driver(self, chain: Chain) -> int:
        if chain.readable_bytes < CONTROL.size:
            self.queues[CONTROL_TX].chain_errors += 1
        elif hear(self._ports, *CONTROL.unpack(chain.read(CONTROL.size))):
            self.is_dirty = True
            self.run_soon(CONTROL_RX)
            for port in self._ports:
                if port.guest_open and port.waiting:
                    self.run_soon(rx_queue(port.index))
        else:
            self.stats.deny(Op.CONSOLE_WRITE, Denial.INVALID)
        return 0

    def _tell_driver(self, chain: Chain) -> int:
        news = next_message(self._ports)
        assert news is not None  # there was work
        port, todo, message = news
        if chain.writable_bytes < len(message):
            self.queues[CONTROL_RX].chain_errors += 1
            return 0
        port.todo &= ~todo
        self.is_dirty = True
        return chain.write(message)

    # -- EMERG_WRITE ---------------------------------------------------------------------------------------------

    def start_session(self, *, resumed: bool) -> None:
        if not resumed:
            self._config_writes = 0

    def is_new_write(self, number: int) -> bool:
        if number <= self._config_writes:
            return False
        self._config_writes = number  # saved with the character, or with the next one
        return True

    def write_config(self, offset: int, data: bytes) -> None:
        """A character that works before any queue does (5.3.4): it goes to port 0."""
        at = EMERG_WR_OFFSET - offset
        if not 0 <= at < len(data) or data[at] == 0:
            return  # NUL is what a driver reads there, and hands back with a write of another field
        started = now_ns()
        character = data[at : at + 1]
        if self.gate.check(Op.CONSOLE_WRITE, 1) is not None:
            self.stats.deny(Op.CONSOLE_WRITE, Denial.CAPABILITY, 1, started)
            return
        if self.is_undecided:
            self.defer(lambda: self._emergency(character))
        else:
            self._emergency(character)
        self.stats.allow(Op.CONSOLE_WRITE, 1, started)

    def _emergency(self, character: bytes) -> None:
        port = self._ports[0]
        port.take_output([memoryview(character)], time.time_ns())
        self.save()
        self.on_output(0)

    def snapshot(self) -> dict[str, Any]:
        return {**super().snapshot(), "ports": [port.snapshot() for port in self._ports]}


def map_ports(history_fd: int | None, ports: int) -> memoryview:
    """The ports' memory: a descriptor's (grown to its size; it stays the caller's), or private when there is none."""
    size = ConsoleBackend.history_bytes(ports)
    if history_fd is None:
        return memoryview(mmap.mmap(-1, size))
    if os.fstat(history_fd).st_size < size:
        os.ftruncate(history_fd, size)
    return memoryview(mmap.mmap(history_fd, size))
