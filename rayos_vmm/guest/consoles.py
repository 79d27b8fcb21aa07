"""A machine's consoles as a person uses them: reading and typing.

Key and pointer events are evdev's (linux/input-event-codes.h); the worker closes each batch with SYN_REPORT.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

import msgspec

from rayos_vmm.guest.view import ConsolePort
from rayos_vmm.machine.history import History
from rayos_vmm.machine.line import SERIAL_PORT
from rayos_vmm.machine.machine import Machine, worker_errors
from rayos_vmm.shared.packet import WorkerGone
from rayos_vmm.shared.timed import Span, cut
from rayos_vmm.shared.view import PortState


async def console_write(machine: Machine, port: int, data: bytes) -> None:
    """Types into a console port or a line of the board; waits for room."""
    if port >= SERIAL_PORT:
        machine.need_qmp()
        await machine.line(port).send(data)
        return
    worker = machine.need_worker()
    with worker_errors(machine):
        await worker.console_write(port, data)


@asynccontextmanager
async def console_stream(
    machine: Machine, port: int, since: int | None
) -> AsyncIterator[AsyncIterator[tuple[int, bytes]]]:
    """(offset, bytes) of a port. The history of the board's lines is there after the end as well."""
    if port >= SERIAL_PORT:
        async with aclosing(machine.line(port).history.follow(since)) as said:
            yield said
        return
    if not machine.is_live:
        async with aclosing(machine.remains.spans(port, since or 0)) as spans:
            yield ((span.offset, span.data) async for span in spans)
        return
    worker = machine.need_worker()
    with worker_errors(machine):
        async with worker.console_stream(port, since=since) as chunks:
            async with aclosing(_until_gone(chunks)) as until_gone:
                yield until_gone


async def _until_gone(chunks: AsyncIterator[tuple[int, bytes]]) -> AsyncGenerator[tuple[int, bytes], None]:
    try:
        async for chunk in chunks:
            yield chunk
    except WorkerGone:
        return  # the machine ended: so does its console


async def console_ports(machine: Machine) -> list[ConsolePort]:
    """Every port, the board's lines last: number, name, whether a program has it open, its size, who sits at it."""
    worker = machine.need_worker()
    with worker_errors(machine):
        ports = await worker.ports()
    # The guest is told no name for its console.
    ports[0] = msgspec.structs.replace(ports[0], name=machine.record.spec.console_ports[0])
    lines = (
        PortState(port=line.port, name=line.name, is_console=True, guest_open=True, columns=0, rows=0)
        for line in machine.lines.values()
    )
    return [
        msgspec.convert({**msgspec.structs.asdict(one), **machine.seats.describe(one.port)}, ConsolePort)
        for one in (*ports, *lines)
    ]


@asynccontextmanager
async def console_pieces(
    machine: Machine, port: int, since: int, *, follow: bool
) -> AsyncIterator[AsyncIterator[Span]]:
    """A port's output with times, from what is kept; up to now, or on and on."""
    if port >= SERIAL_PORT:
        async with aclosing(_line_pieces(machine.line(port).history, since, follow=follow)) as said:
            yield said
        return
    if not machine.is_live:
        async with aclosing(machine.remains.spans(port, since)) as spans:
            yield spans
        return
    worker = machine.need_worker()
    with worker_errors(machine):
        async with worker.console_pieces(port, since=since, follow=follow) as pieces:
            yield pieces


async def _line_pieces(history: History, since: int, *, follow: bool) -> AsyncGenerator[Span, None]:
    end = history.end
    if not follow and since >= end:
        return
    async with aclosing(history.follow(since)) as chunks:
        async for offset, data in chunks:
            for piece in cut(offset, data, history.marks(offset, offset + len(data))):
                yield piece
            if not follow and offset + len(data) >= end:
                return
