"""The channels of a run: consoles to where the command line wants them, monitors, and forwarded ports."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Final

import trio

from rayos_vmm.cli.attended import Life
from rayos_vmm.client.client import Client
from rayos_vmm.client.console import Console
from rayos_vmm.dropin.channel import Channel
from rayos_vmm.dropin.ends import End, File, Peer, Pty, Standard, connect, listen
from rayos_vmm.dropin.monitor import HumanSession, Machine, QmpSession
from rayos_vmm.dropin.plan import Forward, Monitor, Plan
from rayos_vmm.errors import Conflict, GuestGone, Invalid
from rayos_vmm.machine.line import LINE_PORTS

ESCAPE: Final = 0x01  # Ctrl-A
#: After the machine's end, what its consoles still have to say.
LAST_WORDS_S: Final = 10.0
_MUX_HELP: Final = (
    b"C-a h    print this help\r\nC-a x    exit emulator\r\n"
    b"C-a c    switch to the monitor\r\nC-a C-a  sends C-a\r\n"
)


class Session:
    """`open` before the machine starts, `close` after its end."""

    def __init__(self, client: Client, name: str, plan: Plan, life: Life) -> None:
        self._client = client
        self._name = name
        self._plan = plan
        self._life = life
        self._nursery: trio.Nursery
        self._machine: Machine
        self._qmp: set[QmpSession] = set()
        self._running = 0
        self._is_heard = trio.Event()

    async def open(self, nursery: trio.Nursery) -> None:
        """Starts everything; servers listen when it returns, and one that waits has its client."""
        self._nursery = nursery
        version = str((await self._client.info()).qemu.version)
        self._machine = Machine(self._client, self._name, version, self._quit)
        for name, where in self._plan.lines.items():
            if where.kind != "null":
                self._running += 1
                await self._open_end(where, name, partial(self._line, LINE_PORTS[name], where), one=True)
        for monitor in self._plan.monitors:
            if monitor.channel.kind != "null" and not self._is_muxed(monitor):
                await self._open_end(monitor.channel, "monitor", partial(self._monitor, monitor), one=False)
        for forward in self._plan.forwards:
            await nursery.start(self._serve_forward, forward)
        if any(one.is_qmp for one in self._plan.monitors):
            nursery.start_soon(self._follow_events)
        if not self._running:
            self._is_heard.set()

    async def close(self) -> None:
        """Returns when every console has said its last byte."""
        with trio.move_on_after(LAST_WORDS_S):
            await self._is_heard.wait()

    def _is_muxed(self, monitor: Monitor) -> bool:
        """True when a serial line on the same standard input has the monitor behind Ctrl-A c."""
        return monitor.channel.kind == "stdio" and any(
            where.kind == "stdio" and where.is_mux for where in self._plan.lines.values()
        )

    def _quit(self) -> None:
        async def kill() -> None:
            with suppress(Conflict, GuestGone):
                await self._client.act(self._name, "kill")

        self._nursery.start_soon(kill)

    # -- ends ----------------------------------------------------------------------------------------------------

    async def _open_end(
        self, where: Channel, label: str, use: Callable[[End], Awaitable[None]], *, one: bool
    ) -> None:
        match where.kind:
            case "stdio":
                self._nursery.start_soon(use, Standard())
            case "file":
                self._nursery.start_soon(use, File(where))
            case "pty":
                self._nursery.start_soon(use, Pty(label))
            case _ if where.is_server:
                listener = listen(where)
                if where.waits and one:
                    self._nursery.start_soon(use, Peer(await listener.accept()))
                else:
                    self._nursery.start_soon(self._serve, listener, use)
            case _:
                await self._nursery.start(self._connected, where, use)

    async def _connected(
        self,
        where: Channel,
        use: Callable[[End], Awaitable[None]],
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        async with connect(where) as peer:
            task_status.started()
            await use(peer)

    async def _serve(self, listener: trio.SocketListener, use: Callable[[End], Awaitable[None]]) -> None:
        async with listener:
            while True:
                stream = await listener.accept()
                async with stream:
                    await use(Peer(stream))

    # -- consoles ------------------------------------------------------------------------------------------------

    async def _line(self, port: int, where: Channel, end: End) -> None:
        await self._life.begin()
        try:
            async with self._client.console(self._name, port, since=0) as console:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._type, console, where, end)
                    while data := await console.read():
                        await end.write(data)
                    nursery.cancel_scope.cancel()
        except (Conflict, GuestGone):
            pass  # the machine ended, and says why
        if not where.is_server or where.waits:
            self._heard()
        else:
            await trio.sleep_forever()

    def _heard(self) -> None:
        self._running -= 1
        if self._running <= 0:
            self._is_heard.set()

    async def _type(self, console: Console, where: Channel, end: End) -> None:
        mux = _Mux(self._machine, end) if where.is_mux else None
        with suppress(GuestGone):
            while data := await end.read():
                typed = await mux.feed(data) if mux is not None else data
                if typed:
                    await console.write(typed)

    # -- monitors ------------------------------------------------------------------------------------------------

    async def _monitor(self, monitor: Monitor, end: End) -> None:
        session = (
            QmpSession(self._machine, end.write) if monitor.is_qmp else HumanSession(self._machine, end.write)
        )
        if isinstance(session, QmpSession):
            self._qmp.add(session)
        try:
            await session.open()
            while data := await end.read():
                await session.feed(data)
        finally:
            if isinstance(session, QmpSession):
                self._qmp.discard(session)

    async def _follow_events(self) -> None:
        async with self._client.events() as events:
            async for event in events:
                if event.vm == self._name and event.type == "vm.qemu":
                    for session in tuple(self._qmp):
                        await session.event(str(event.data.get("event")), event.data.get("data") or {})

    # -- ports ---------------------------------------------------------------------------------------------------

    async def _serve_forward(
        self, forward: Forward, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        try:
            listeners = await trio.open_tcp_listeners(forward.port, host=forward.host)
        except OSError as error:
            raise Invalid(
                f"Could not set up host forwarding rule for {forward.host}:{forward.port}: {error.strerror}"
            ) from None
        task_status.started()
        await trio.serve_listeners(partial(self._forwarded, forward), listeners)

    async def _forwarded(self, forward: Forward, outside: trio.SocketStream) -> None:
        address = self._life.view.address
        if address is None:
            return  # it has no address yet
        with suppress(OSError, trio.BrokenResourceError):
            async with (
                await trio.open_tcp_stream(address, forward.guest_port) as inside,
                trio.open_nursery() as both,
            ):
                both.start_soon(_copy, outside, inside)
                both.start_soon(_copy, inside, outside)


async def _copy(source: trio.SocketStream, sink: trio.SocketStream) -> None:
    with suppress(trio.BrokenResourceError):
        async for data in source:
            await sink.send_all(data)
        await sink.send_eof()


class _Mux:
    """A serial line and the monitor on one input (`mon:stdio`): Ctrl-A is the escape."""

    def __init__(self, machine: Machine, end: End) -> None:
        self._machine = machine
        self._end = end
        self._monitor = HumanSession(machine, end.write)
        self._is_escaped = self._is_at_monitor = False

    async def feed(self, data: bytes) -> bytes:
        """The bytes for the serial line."""
        line = bytearray()
        for byte in data:
            if self._is_escaped:
                self._is_escaped = False
                await self._command(byte, line)
            elif byte == ESCAPE:
                self._is_escaped = True
            elif self._is_at_monitor:
                await self._monitor.feed(bytes([byte]))
            else:
                line.append(byte)
        return bytes(line)

    async def _command(self, byte: int, line: bytearray) -> None:
        match byte:
            case 0x78:  # x
                await self._end.write(b"QEMU: Terminated\r\n")
                self._machine.quit()
            case 0x63:  # c
                self._is_at_monitor = not self._is_at_monitor
                if self._is_at_monitor:
                    await self._monitor.open()
            case 0x68:  # h
                await self._end.write(_MUX_HELP)
            case _ if byte == ESCAPE:
                line.append(byte)
