"""Who sits at a machine's consoles: any number of watchers and at most one writer a port; hand-over is explicit.

Theory of operation: a seat is opened to write, to watch, or to take over. Who asks to write while another writes
watches. A taken port's former writer watches on, and is told who took it; when a writer leaves, nobody writes until a
seat asks (`take`). Every change of a port's writer is told to all seats there, so nobody types into the void.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal

import trio

from rayos_vmm.errors import Busy

Preference = Literal["write", "watch", "take"]
#: Seats at one port at a time.
SEATS_MAXIMUM: Final = 32


class Seat:
    """One client of one port. `who` is told to the others."""

    def __init__(self, port: PortSeats, who: str) -> None:
        self._port = port
        self.who = who
        self._news = trio.Event()
        self._news.set()  # how things are is news at first

    @property
    def is_writer(self) -> bool:
        return self._port.writer is self

    @property
    def writer(self) -> str | None:
        """Who writes; None when nobody does."""
        return None if self._port.writer is None else self._port.writer.who

    def take(self) -> None:
        """Become the writer; whoever was watches on."""
        self._port.write(self)

    async def changed(self) -> None:
        """Returns when the writer may have changed since the last call, at once the first time."""
        await self._news.wait()
        self._news = trio.Event()

    def tell(self) -> None:
        self._news.set()


class PortSeats:
    """The seats at one port."""

    def __init__(self) -> None:
        self.seats: list[Seat] = []
        self.writer: Seat | None = None

    def write(self, seat: Seat | None) -> None:
        self.writer = seat
        for one in self.seats:
            one.tell()


class Seats:
    """All ports of one machine, by number."""

    def __init__(self) -> None:
        self._ports: dict[int, PortSeats] = {}

    @contextmanager
    def open(self, port: int, who: str, preference: Preference = "write") -> Iterator[Seat]:
        """A seat, until left.

        Raises:
            Busy: SEATS_MAXIMUM are there already.
        """
        place = self._ports.setdefault(port, PortSeats())
        if len(place.seats) >= SEATS_MAXIMUM:
            raise Busy(f"{SEATS_MAXIMUM} clients are at console port {port}; no more are allowed")
        seat = Seat(place, who)
        place.seats.append(seat)
        if preference == "take" or (preference == "write" and place.writer is None):
            place.write(seat)
        try:
            yield seat
        finally:
            place.seats.remove(seat)
            if place.writer is seat:
                place.write(None)
            if not place.seats:
                del self._ports[port]

    def describe(self, port: int) -> dict[str, str | int | None]:
        """JSON-ready: `writer` (who, or None) and the number of `watchers`."""
        place = self._ports.get(port, PortSeats())
        writer = place.writer.who if place.writer is not None else None
        return {"writer": writer, "watchers": len(place.seats) - (writer is not None)}
