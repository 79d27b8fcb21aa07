"""The service's side of a worker's control socket, and of its keeper's.

A worker may be replaced under a request: the connection is made again and the request repeated. Every operation here
may be repeated: reads name their offset, and writes carry a token that the devices remember across workers.
"""

from __future__ import annotations

import array
import os
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from rayos_vmm.hardware.protocols import DisplayFrame
from rayos_vmm.shared import packet
from rayos_vmm.shared.packet import WorkerError, WorkerGone
from rayos_vmm.shared.spec import CONTROL_SOCKET, KEEPER_SOCKET
from rayos_vmm.shared.timed import Span, cut
from rayos_vmm.shared.view import DisplayInfo, FaultState, PortState, Verdict

#: Seconds until a successor must answer; a fork takes milliseconds.
RECONNECT_TIMEOUT: Final = 10.0
#: Events of one packet.
MAX_EVENTS: Final = 1024
_TRACE_SECONDS: Final = 2.0


class PacketClient:
    """One connection, one request at a time; made again when the other end was replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sock: trio.socket.SocketType | None = None
        self._lock = trio.Lock()
        self._next_id = 0

    async def call(self, op: str, data: bytes = b"", **fields: Any) -> tuple[packet.Head, bytes, list[int]]:
        """The answer's fields, bytes and descriptors (the caller's to close).

        Errors: WorkerError when it was refused, WorkerGone when nobody answers for RECONNECT_TIMEOUT. A cancelled
        call closes the connection, so that its late answer meets nobody.
        """
        async with self._lock:
            self._next_id += 1
            request = packet.encode({"id": self._next_id, "op": op, **fields}, data)
            while True:
                try:
                    head, body, fds = await self._exchange(request)
                    break
                except (OSError, EOFError):
                    self.close()
                except BaseException:
                    self.close()
                    raise
        if "error" in head:
            message, denied = str(head.get("message", head["error"])), str(head.get("denied", ""))
            raise WorkerError(head["error"], message, denied)
        return head, body, fds

    async def _exchange(self, request: bytes) -> tuple[packet.Head, bytes, list[int]]:
        if self._sock is None:
            self._sock = await self._connect()
        await self._sock.send(request)
        while True:
            data, ancillary, _, _ = await self._sock.recvmsg(
                packet.MAX_PACKET_BYTES, socket.CMSG_SPACE(16), socket.MSG_CMSG_CLOEXEC
            )
            if not data:
                raise EOFError
            fds = array.array("i")
            for _, _, content in ancillary:
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
            head, body = packet.decode(data)
            if head.get("id") == self._next_id:
                return head, body, list(fds)
            for fd in fds:
                os.close(fd)

    async def follow(self, on_event: Callable[[packet.Head], None]) -> None:
        """Hand over what comes unasked until the other end is gone. Errors: WorkerGone when nobody was there."""
        sock = self._sock = await self._connect()
        with suppress(OSError):
            while data := await sock.recv(packet.MAX_PACKET_BYTES):
                on_event(packet.decode(data)[0])

    async def _connect(self) -> trio.socket.SocketType:
        """Connect; while no worker listens yet the kernel queues us, so only a missing socket is a reason to wait."""
        deadline = trio.current_time() + RECONNECT_TIMEOUT
        while True:
            sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            try:
                await sock.connect(str(self.path))
                return sock
            except OSError as error:
                sock.close()
                if trio.current_time() > deadline or not self.path.exists():
                    raise WorkerGone(f"no worker answers on {self.path}: {error}") from error
                await trio.sleep(0.02)
            except BaseException:
                sock.close()
                raise

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


@dataclass(frozen=True, slots=True)
class Caught:
    """A piece of a capture: records as devices/rayos_devices/net/capture.py has them. Beside them stand the distance
    of the worker's steady clock from the epoch, the frames that passed so far and those that were lost.
    """

    records: bytes
    offset_ns: int
    seen: int
    dropped: int


class WorkerClient:
    """Every operation on the devices of one running VM. `run_dir` is the VM's."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / CONTROL_SOCKET
        self._client = PacketClient(self._path)

    async def stats(self) -> packet.Stats:
        """Counters by device name."""
        head, _, _ = await self._client.call("stats")
        stats: packet.Stats = head["stats"]
        return stats

    async def polling(self, budget_us: float | None = None) -> dict[str, float]:
        """How long the worker looks for work before it sleeps, at most; set by `budget_us` (0: not at all, up to 1000).

        Returns budget_us, window_us (what it is now: less when looking is of no use) and seconds (looked in vain).
        A successor of the worker starts with 0. Errors: WorkerError for a budget out of range.
        """
        head, _, _ = await self._client.call("polling", budget_us=budget_us)
        polling: dict[str, float] = head["polling"]
        return polling

    async def capture(self, snap: int) -> AsyncGenerator[Caught, None]:
        """Yields the frames that pass the network card from now on, `snap` bytes of each; empty at first, once it is
        on.

        Close it with `aclosing`: it ends when its connection does. A worker that was replaced starts anew.
        Errors: WorkerError when another capture runs or `snap` is out of range.
        """
        client = PacketClient(self._path)
        try:
            while True:
                head, data, _ = await client.call("net.capture", device="net", snap=snap)
                yield Caught(data, int(head["offset_ns"]), int(head["seen"]), int(head["dropped"]))
        finally:
            client.close()

    async def limit(self, device: str, limits: Mapping[str, int]) -> dict[str, int]:
        """Change limits of a running device (`rayos_devices.limits`); returns all that it has now, 0 is unbounded.

        Errors: WorkerError "no_such_device", "refused", "bad_request"; those before the refused one hold.
        """
        head, _, _ = await self._client.call("limit", device=device, limits=dict(limits))
        changed: dict[str, int] = head["limits"]
        return changed

    async def set_level(self, level: int) -> int:
        """Switch all devices to a level of optimization (`rayos_devices.levels`); returns it. Errors: WorkerError."""
        head, _, _ = await self._client.call("level", level=level)
        return int(head["level"])

    async def inject(self, device: str, events: Sequence[tuple[int, int, int]]) -> None:
        """Queue evdev events (type, code, value) for "keyboard", "mouse" or "tablet"; waits while the queue is full."""
        client = PacketClient(self._path)
        try:
            rest = list(events)
            while rest:
                head, _, _ = await client.call(
                    "inject", device=device, events=rest[:MAX_EVENTS], token=_token()
                )
                rest = rest[head["accepted"] :]
        finally:
            client.close()

    async def ports(self) -> list[PortState]:
        """The console's ports: port, name, guest_open."""
        head, _, _ = await self._client.call("console.ports")
        return msgspec.convert(head["ports"], list[PortState])

    async def console_write(self, port: int, data: bytes) -> None:
        """Type `data` into a port; waits for room as long as the guest takes. Nothing is lost or doubled."""
        client = PacketClient(self._path)
        try:
            while data:
                chunk = data[: packet.MAX_DATA_BYTES]
                head, _, _ = await client.call("console.write", chunk, port=port, token=_token())
                data = data[head["accepted"] :]
        finally:
            client.close()

    async def resize_disk(self, device: str) -> int:
        """Have a disk take up the size that its image has now, and the guest told of it; returns the size in bytes."""
        head, _, _ = await self._client.call("blk.resize", device=device)
        return int(head["size_bytes"])

    async def set_faults(self, device: str, rules: Sequence[Mapping[str, Any]], seed: int) -> None:
        """Have things go wrong in a disk or network card from now on (fields of `rayos_devices.faults.Fault`)."""
        await self._client.call("faults", device=device, rules=list(rules), seed=seed)

    async def faults(self, device: str) -> list[FaultState]:
        """The rules of a disk or network card, with `matched` and `done`."""
        head, _, _ = await self._client.call("faults", device=device)
        return msgspec.convert(head["rules"], list[FaultState])

    async def console_resize(self, port: int, columns: int, rows: int) -> None:
        await self._client.call("console.resize", port=port, columns=columns, rows=rows)

    @asynccontextmanager
    async def console_stream(
        self, port: int, *, since: int | None = None, hold: bool = False
    ) -> AsyncIterator[AsyncIterator[tuple[int, bytes]]]:
        """(offset, bytes) as the guest writes them; `since` 0 replays what is kept, None starts now.

        An offset larger than the end of the chunk before tells that the ring was too small for so slow a reader; with
        `hold` the guest waits for this one.
        """
        client = PacketClient(self._path)
        try:
            start = since
            if start is None:
                head, _, _ = await client.call("console.read", port=port, offset=None, hold=hold)
                start = head["total"]
            async with aclosing(_chunks(client, port, start, hold=hold)) as chunks:
                yield chunks
        finally:
            client.close()

    async def display_info(self) -> DisplayInfo:
        """`serial` of the newest damage, `scanouts`."""
        head, _, _ = await self._client.call("gpu.info")
        return msgspec.convert(head, DisplayInfo)

    @asynccontextmanager
    async def console_pieces(
        self, port: int, *, since: int = 0, follow: bool = False
    ) -> AsyncIterator[AsyncIterator[Span]]:
        """As `console_stream`, with the time at which each piece came; ends at the present unless to `follow`."""
        client = PacketClient(self._path)
        try:
            async with aclosing(_pieces(client, port, since, follow=follow)) as pieces:
                yield pieces
        finally:
            client.close()

    async def screenshot(self, scanout: int = 0, *, with_cursor: bool = False) -> DisplayFrame:
        """The picture on a scanout now."""
        head, _, fds = await self._client.call("gpu.frame", scanout=scanout, cursor=with_cursor)
        with os.fdopen(fds[0], "rb") as file:
            file.seek(0)
            pixels = file.read()
        return DisplayFrame(head["width"], head["height"], head["stride"], pixels, head["serial"])

    async def gpu_resize(self, scanout: int, width: int, height: int) -> None:
        """Give a scanout another mode; the guest learns of it when QEMU tells it to look."""
        await self._client.call("gpu.resize", scanout=scanout, width=width, height=height)

    async def wait_damage(self, since: int, scanout: int = 0) -> tuple[int, int, int, int, int]:
        """Waits for damage on a scanout after serial `since`; returns serial, x, y, width, height."""
        client = PacketClient(self._path)
        try:
            head, _, _ = await client.call("gpu.wait", since=since, scanout=scanout)
            x, y, width, height = head["rect"]
            return int(head["serial"]), x, y, width, height
        finally:
            client.close()

    async def set_rules(self, device: str, settings: bytes) -> int:
        """Tells a network card's firewall its rules (`rayos_vmm.worker.firewall.Settings` as JSON).

        Returns the revision that every frame is judged by from now on. Errors: WorkerError "bad_rule", "too_large".
        """
        client = PacketClient(self._path)
        try:
            while True:
                try:
                    return await _send_rules(client, device, settings)
                except WorkerError as error:
                    if error.code != "restart":  # the worker was replaced between two pieces
                        raise
        finally:
            client.close()

    async def explain(self, device: str, packet: str) -> Verdict:
        """Explains the fate of a packet in words. Errors: WorkerError "bad_packet"."""
        head, _, _ = await self._client.call("firewall.explain", device=device, packet=packet)
        return msgspec.convert(head["explanation"], Verdict)

    async def rule_counts(self, device: str) -> tuple[int, list[int]]:
        """The revision of the rules, and how many frames each has decided, in their order."""
        head, data, _ = await self._client.call("firewall.counts", device=device)
        return int(head["revision"]), list(memoryview(data).cast("Q"))

    @asynccontextmanager
    async def trace(self, device: str) -> AsyncIterator[AsyncIterator[Verdict]]:
        """Verdicts from now on, each with its packet in words and the rule that decided; numbers that are missing were
        too many."""
        client = PacketClient(self._path)
        try:
            async with aclosing(_verdicts(client, device)) as verdicts:
                yield verdicts
        finally:
            client.close()

    def close(self) -> None:
        self._client.close()


async def _send_rules(client: PacketClient, device: str, settings: bytes) -> int:
    token = _token()
    for offset in range(0, len(settings), packet.MAX_DATA_BYTES):
        head, _, _ = await client.call(
            "firewall.set",
            settings[offset : offset + packet.MAX_DATA_BYTES],
            device=device,
            token=token,
            offset=offset,
            total=len(settings),
        )
    return int(head["revision"])


async def _verdicts(client: PacketClient, device: str) -> AsyncGenerator[Verdict, None]:
    after: int | None = None
    while True:
        head: packet.Head = {"last": after, "verdicts": []}
        # Asked again and again: neither a worker's successor nor one that nobody asks keeps a trace.
        with trio.move_on_after(_TRACE_SECONDS):
            head, _, _ = await client.call("firewall.trace", device=device, after=after)
        after = head["last"]
        for verdict in msgspec.convert(head["verdicts"], list[Verdict]):
            yield verdict


async def _chunks(
    client: PacketClient, port: int, offset: int, *, hold: bool
) -> AsyncGenerator[tuple[int, bytes], None]:
    while True:
        head, data, _ = await client.call("console.read", port=port, offset=offset, hold=hold)
        yield head["offset"], data
        offset = head["offset"] + len(data)


async def _pieces(
    client: PacketClient, port: int, offset: int, *, follow: bool
) -> AsyncGenerator[Span, None]:
    while True:
        head, data, _ = await client.call("console.read", port=port, offset=offset, times=True, wait=follow)
        if not data:
            return
        for piece in cut(head["offset"], data, head["marks"]):
            yield piece
        offset = head["offset"] + len(data)


def _token() -> int:
    """Names a write, so that its repetition is recognised."""
    return secrets.randbits(63) | 1


class KeeperClient:
    """Asks a VM's keeper."""

    def __init__(self, run_dir: Path) -> None:
        self._client = PacketClient(run_dir / KEEPER_SOCKET)

    async def status(self) -> packet.Head:
        """pid, worker_pid, restarts, degraded, connected (device names), sandbox (layer -> on, what)."""
        head, _, _ = await self._client.call("status")
        return head

    async def kill_worker(self) -> int:
        """Kill the worker with SIGKILL, as a test of everything above; returns the pid it had."""
        head, _, _ = await self._client.call("kill_worker")
        return int(head["worker_pid"])

    async def move_worker(self, cores: Sequence[int]) -> float:
        """Hand the devices over to a new worker on `cores`; the milliseconds in which nobody served them.

        Errors: WorkerError (bad_request) for processors that are not there.
        """
        head, _, _ = await self._client.call("move", cores=list(cores))
        return float(head["pause_ms"])

    async def follow(self, on_event: Callable[[packet.Head], None]) -> None:
        """Calls `on_event` with each event ({"event": "worker_started" | "worker_exited", …}) until the keeper ends."""
        client = PacketClient(self._client.path)
        try:
            await client.follow(on_event)
        finally:
            client.close()

    async def quit(self) -> None:
        """End worker and keeper."""
        await self._client.call("quit")

    def close(self) -> None:
        self._client.close()
