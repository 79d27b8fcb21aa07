"""Three ways to run a backend under test, with one interface: `connect` a frontend, let the device act, `close`.

* `Stepped`: in this thread, on a loop that moves only while a frontend waits or `settle` is called: deterministic;
* `Threaded`: on a loop in a thread of its own, behind a socket pair: for races and timing;
* `Served`: a real process, `python -P -m rayos_devices.serve …` or any other command that listens on a socket path.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from rayos_devices.backend import Backend
from rayos_devices.loop import Loop
from rayos_devices.vhost_user.connection import Connection
from rayos_devices.vhost_user.message import FrontendRequest
from rayos_devices.virtio.features import Feature
from rayos_devices.virtio.log import DirtyLog
from rayos_devices.virtio.memory import GuestMemory
from rayos_devices.virtio.vring import Vring
from tests.framework.driver import DriverQueue, descriptor_table_bytes
from tests.framework.frontend import ANSWER_TIMEOUT, Frontend
from tests.framework.guest_memory import GuestRam
from tests.framework.packed_driver import PackedDriverQueue

B = TypeVar("B", bound=Backend)


class Target(Protocol):
    """Where a backend runs."""

    def connect(self) -> Frontend:
        """A new session; the one before must have ended."""
        ...

    def settle(self) -> None:
        """Return when the device did what it was kicked for (`Stepped`), or had a little time (others)."""
        ...

    def close(self) -> None: ...


class Stepped(Generic[B]):
    """`make(loop)` builds the backend. `reasons` collects why sessions ended."""

    def __init__(self, make: Callable[[Loop], B], *, resume: bool = False) -> None:
        self.loop = Loop()
        self.backend = make(self.loop)
        self.reasons: list[str] = []
        self.on_refusal: Callable[[str], None] = lambda _reason: None
        self._resume = resume
        self._connection: Connection | None = None

    def connect(self) -> Frontend:
        if self._connection is not None:
            self._connection.close("the next frontend is here")
        ours, theirs = socket.socketpair()
        self._connection = Connection(
            theirs,
            self.backend,
            self.loop,
            self._closed,
            resume=self._resume,
            on_refusal=lambda reason: self.on_refusal(reason),
        )
        return Frontend(ours, self.settle)

    def _closed(self, reason: str) -> None:
        self.reasons.append(reason)
        self._connection = None

    def settle(self) -> None:
        for _ in range(16):
            self.loop.step(0)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close("the test is over")
        self.backend.close()
        self.loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Threaded(Generic[B]):
    """As `Stepped`, in a thread. An exception of the loop is raised by `close` (class X: a bug of ours)."""

    def __init__(self, make: Callable[[Loop], B]) -> None:
        self.loop = Loop()
        self.backend = make(self.loop)
        self.reasons: list[str] = []
        self._connection: Connection | None = None
        self._failure: BaseException | None = None
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.loop.register(self._wake, self._woken)
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:
            self._failure = error

    def _woken(self, _events: int) -> None:
        os.eventfd_read(self._wake)
        while not self._calls.empty():
            self._calls.get()()

    def call(self, function: Callable[[], object]) -> None:
        """Run `function` on the loop's thread and wait for it."""
        done = threading.Event()

        def run() -> None:
            try:
                function()
            finally:
                done.set()

        self._calls.put(run)
        os.eventfd_write(self._wake, 1)
        if not done.wait(ANSWER_TIMEOUT):
            raise TimeoutError("the device's thread does not react") from self._failure

    def connect(self) -> Frontend:
        ours, theirs = socket.socketpair()

        def accept() -> None:
            if self._connection is not None:
                self._connection.close("the next frontend is here")
            self._connection = Connection(theirs, self.backend, self.loop, self._closed)

        self.call(accept)
        return Frontend(ours)

    def _closed(self, reason: str) -> None:
        self.reasons.append(reason)
        self._connection = None

    def settle(self) -> None:
        for _ in range(2):
            self.call(lambda: None)

    def close(self) -> None:
        def end() -> None:
            if self._connection is not None:
                self._connection.close("the test is over")
            self.loop.stop()

        if self._thread.is_alive():
            self.call(end)
        self._thread.join(ANSWER_TIMEOUT)
        self.loop.unregister(self._wake)
        os.close(self._wake)
        self.backend.close()
        self.loop.close()
        if self._failure is not None:
            raise self._failure

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Served:
    """A process that serves `socket_path`: `python -P -m rayos_devices.serve` with `arguments`, or `command`."""

    #: Descriptors of a session that was only connected.
    session_fds = 1

    def __init__(
        self,
        socket_path: Path,
        arguments: Sequence[str | Path] = (),
        *,
        command: Sequence[str | Path] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.path = socket_path
        self.idle_fds = 0
        if command is None:
            command = [sys.executable, "-P", "-m", "rayos_devices.serve", *arguments, "--socket", socket_path]
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._words,
            pass_fds=pass_fds,
        )

    @property
    def words(self) -> str:
        """All that it has said on standard error until now."""
        size = os.fstat(self._words.fileno()).st_size
        return os.pread(self._words.fileno(), size, 0).decode(errors="replace")

    def connect(self) -> Frontend:
        """Errors: ChildProcessError with its last words when the process has ended."""
        while True:
            if self.process.poll() is not None:
                raise ChildProcessError(f"exit code {self.process.returncode}: {self.words}")
            with suppress(OSError):
                return Frontend.connect(self.path, timeout=0.5)

    def settle(self) -> None:
        time.sleep(0.002)

    @property
    def pids(self) -> list[int]:
        """The processes between a frontend and its device; none when one of them has ended."""
        return [self.process.pid] if self.process.poll() is None else []

    def count_idle_fds(self) -> int:
        """Descriptors open without a session. One frontend is served at a time: an answer means the former is gone."""
        self.connect().close()
        with self.connect() as frontend:
            frontend.ask_u64(FrontendRequest.GET_QUEUE_NUM)
            self.idle_fds = self.fd_count - self.session_fds
        return self.idle_fds

    @property
    def fd_count(self) -> int:
        """Open descriptors of the processes."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.pids)

    @property
    def rss_bytes(self) -> int:
        """Of the largest process."""
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids]
        return max(pages, default=0) * os.sysconf("SC_PAGESIZE")

    def close(self) -> None:
        """End it; an exit code other than 0 is an error, with its last words."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(ANSWER_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        words = self.words
        self._words.close()
        if self.process.returncode != 0:
            raise ChildProcessError(f"exit code {self.process.returncode}: {words}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Rig:
    """A whole guest for one session: memory, a negotiated frontend, `queues` running; `close` closes all of it."""

    def __init__(
        self,
        target: Target,
        queues: int = 1,
        *,
        size: int = 256,
        ram: GuestRam | None = None,
        features: int | None = None,
        event_idx: bool = True,
        packed: bool = False,
    ) -> None:
        self.target = target
        self.ram = ram or GuestRam()
        self.frontend = target.connect()
        self.offered = self.frontend.negotiate(features, packed=packed)
        assert not packed or self.frontend.features & Feature.RING_PACKED, "there are no packed rings"
        self.frontend.set_memory(self.ram)
        kind = PackedDriverQueue if packed else DriverQueue
        self.queues = [kind(self.ram, size, event_idx=event_idx) for _ in range(queues)]
        for index, driver in enumerate(self.queues):
            self.frontend.start(index, driver)
        self.heap = self.ram.allocate(0)

    def settle(self) -> None:
        self.target.settle()

    def restart(self, index: int = 0) -> None:
        """Reset one queue the vhost-user way: stop it, clear the rings, set it up again from index 0."""
        self.frontend.stop(index)
        self.queues[index].reset()
        self.frontend.start(index, self.queues[index])

    def wait_used(
        self, index: int = 0, count: int = 1, timeout: float = ANSWER_TIMEOUT
    ) -> list[tuple[int, int]]:
        """Collect until `count` used entries came. Errors: TimeoutError."""
        entries: list[tuple[int, int]] = []
        deadline = time.monotonic() + timeout
        while True:
            entries += self.queues[index].collect()
            if len(entries) >= count:
                return entries
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(entries)} of {count} used entries after {timeout} s")
            self.target.settle()

    def request(self, data: bytes, room: int = 0, *, index: int = 0, indirect: bool = False) -> bytes:
        """One honest request: `data` readable, `room` bytes writable; returns what the device wrote."""
        source = self.ram.put(data, 4096)
        target = self.ram.allocate(room)
        head = self.queues[index].submit(
            [(source, len(data))] if data else [], [(target, room)] if room else [], indirect=indirect
        )
        ((done, written),) = self.wait_used(index)
        assert done == head, f"head {done} came back, {head} was offered"
        answer = self.ram.read(target, written)
        self.ram.rewind(self.heap)
        return answer

    def close(self) -> None:
        self.frontend.close()
        self.target.settle()
        for driver in self.queues:
            driver.close()
        self.ram.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attach(
    driver: DriverQueue,
    *,
    base: int | None = None,
    resumed: bool = False,
    journal: memoryview | None = None,
    event_idx: bool | None = None,
    indirect: bool = True,
    notify_on_empty: bool = False,
    log: DirtyLog | None = None,
    used_address: int = 0,
    descriptors_address: int = 0,
) -> tuple[Vring, GuestMemory]:
    """A vring on the driver's rings without a session; the eventfds stay the driver's."""
    memory = GuestMemory()
    memory.replace([driver.ram.spec], [driver.ram.fd])
    vring = Vring(0)
    vring.call_fd, vring.error_fd = driver.call_fd, driver.error_fd
    if journal is not None:
        vring.journal = journal
    vring.attach(
        memory,
        driver.size,
        memory.view(driver.descriptors, descriptor_table_bytes(driver.size)),
        memory.view(driver.avail, driver.avail_bytes),
        memory.view(driver.used, driver.used_bytes),
        base=driver.start if base is None else base,
        resumed=resumed,
        packed=driver.is_packed,
        event_idx=driver.event_idx if event_idx is None else event_idx,
        indirect=indirect,
        notify_on_empty=notify_on_empty,
        log=log,
        used_address=used_address,
        descriptors_address=descriptors_address,
    )
    return vring, memory


class Footprint:
    """Descriptors and mappings of guest memory that this process has now, for `check` to compare with later."""

    def __init__(self) -> None:
        self.fds, self.mappings = open_fds(), mapped()

    def check(self) -> None:
        """Errors: AssertionError when there are more, and not just until the next garbage collection."""
        if open_fds() > self.fds or mapped() > self.mappings:
            gc.collect()
        assert open_fds() <= self.fds, "descriptors were left open"
        assert mapped() <= self.mappings, "guest memory is still mapped"


def mapped() -> int:
    """Mappings of guest memory in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:guest-ram")


def open_fds() -> int:
    """Descriptors open in this process."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - listdir's own descriptor counts the same every time
