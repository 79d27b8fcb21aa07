"""What a person in front of the machine does: read and type at its consoles, press keys, point.

Key and pointer events are evdev's (linux/input-event-codes.h); the worker closes each batch with SYN_REPORT.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager

import trio

from rayos_vmm.errors import GuestGone, Invalid, NotFound
from rayos_vmm.vm.machine import SERIAL_PORT, Machine
from rayos_vmm.worker.client import WorkerError, WorkerGone


@contextmanager
def worker_errors(machine: Machine) -> Iterator[None]:
    """A worker's refusals and its absence in the service's words."""
    try:
        yield
    except WorkerError as error:
        if error.code in ("no_such_port", "no_such_device"):
            raise NotFound(f"{machine.name}: {error}", code=error.code) from None
        raise Invalid(f"{machine.name}: {error}", code=error.code) from None
    except WorkerGone as error:
        raise GuestGone(f"{machine.name}: {error}") from None


async def console_write(machine: Machine, port: int, data: bytes) -> None:
    """Types into a console port or the serial line; waits for room."""
    if port == SERIAL_PORT:
        machine.need_qmp()
        if machine.serial_stream is None:
            raise GuestGone(f"{machine.name}: its serial line is not connected")
        try:
            async with machine.serial_lock:
                await machine.serial_stream.send_all(data)
        except trio.BrokenResourceError:
            raise GuestGone(f"{machine.name}: its serial line was closed") from None
        return
    worker = machine.need_worker()
    with worker_errors(machine):
        await worker.console_write(port, data)


@asynccontextmanager
async def console_stream(
    machine: Machine, port: int, since: int | None
) -> AsyncIterator[AsyncIterator[tuple[int, bytes]]]:
    """(offset, bytes) of a port. The serial line's history is there after the end as well."""
    if port == SERIAL_PORT:
        async with aclosing(machine.serial.follow(since)) as serial:
            yield serial
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
