"""One machine in the daemon: its record, and what is attached to it while it runs.

Invariant: every change of state goes through `apply`, which publishes it and wakes whoever waits; the record
is saved by the task that runs the machine (`run.py`).
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from rayos_devices.gate import Op
from rayos_vmm.config.fault import FaultPlan
from rayos_vmm.errors import Conflict, GuestGone, Invalid, NotFound, RayosError, one_error
from rayos_vmm.events import EventLog
from rayos_vmm.host.process import Process
from rayos_vmm.machine.history import BoundedFile, History, Lines
from rayos_vmm.machine.lifecycle import LIVE, LifeEvent, WrongState, advance
from rayos_vmm.machine.line import LINE_PORTS, SERIAL_PORT, Line
from rayos_vmm.machine.outcome import Evidence
from rayos_vmm.machine.record import Record
from rayos_vmm.machine.recording import Recordings
from rayos_vmm.machine.remains import Remains
from rayos_vmm.machine.seats import Seats
from rayos_vmm.machine.view import ExitReason, VmState, VmView
from rayos_vmm.policy.capability import missing, needed
from rayos_vmm.qemu.qmp import Qmp, Transcript
from rayos_vmm.shared.packet import WorkerError, WorkerGone

if TYPE_CHECKING:
    from rayos_vmm.hardware.protocols import Worker
    from rayos_vmm.machine.agent import Agent

#: How long a part of a machine may be gone before the machine is said to have ended, or not.
_REASON_S: Final = 1.0

# In the runtime directory: the one file that QEMU may write, for its own view of the screen.
PICTURE = "qemu.picture"


class Machine:
    """A record with its life attached."""

    def __init__(self, record: Record, events: EventLog, *, runtime: Path, state: Path) -> None:
        self.record = record
        self.events = events
        self.runtime = runtime
        self.state_directory = state
        self.evidence = Evidence()
        self.remains = Remains(state)
        self.lines = self._new_lines()
        self.transcript = Transcript()
        self.faults: dict[str, FaultPlan] = {}
        self.faults_lock = trio.Lock()
        self.lock = trio.Lock()  # held by operations that change what exists
        self.start_scope = trio.CancelScope()
        self.qmp: Qmp | None = None
        self.process: Process | None = None
        self.log_fd = -1  # the reading end of QEMU's output
        self.log: BoundedFile | None = None
        self.log_lines: Lines | None = None
        self.start_error: RayosError | None = None
        self.attached = trio.Event()  # somebody looks after it, or it has ended
        self.has_run = record.state in LIVE - {VmState.STARTING}
        self.unreadable = ""  # why its record is not known, of one that the store could not read
        self.worker: Worker | None = None
        self.agent: Agent | None = None
        self.seats = Seats()
        self.holders = 0  # clients that want it to stay until they have seen its end (`Service.hold`)
        self.is_released = False  # it outlives them
        self.picture_lock = trio.Lock()
        self.input_recordings = Recordings()
        self.display_lock = trio.Lock()
        self._changed = trio.Event()
        self._start_clock = 0.0

    @property
    def name(self) -> str:
        return self.record.spec.name

    def _new_lines(self) -> dict[int, Line]:
        return {LINE_PORTS[name]: Line(self.name, name) for name in self.record.spec.ports.lines}

    def line(self, port: int) -> Line:
        """The line of the board that a console port number stands for.

        Raises:
            NotFound: the machine does not have it.
        """
        if port not in self.lines:
            known = ", ".join(f"{line.port} ({line.name})" for line in self.lines.values())
            raise NotFound(f"{self.name} has no console port {port}; its lines: {known}", code="no_such_port")
        return self.lines[port]

    @property
    def serial(self) -> History:
        """The output of COM1."""
        return self.lines[SERIAL_PORT].history

    @property
    def state(self) -> VmState:
        return self.record.state

    @property
    def is_live(self) -> bool:
        """True while there are processes to look after."""
        return self.record.state in LIVE

    def disk_path(self, index: int) -> Path:
        """Where the image of one of its disks is; an IndexError for a disk that it has not."""
        disk = self.record.spec.disks[index]
        if disk.path and not disk.snapshot:
            return Path(disk.path)
        return self.state_directory / f"disk-{index}.img"

    def view(self) -> VmView:
        return self.record.view()

    def recall(self) -> None:
        """Makes what a machine that does not run said to a former service readable."""
        if not self.is_live:
            for line in self.lines.values():
                line.recall(self.state_directory)

    def begin(self, now: float, wall: float) -> None:
        """Forgets the former run and enters *starting*; `now` steady, `wall` in seconds since the epoch.

        Raises:
            Conflict: it is running already, or nobody knows what it is.
        """
        if self.unreadable:
            raise Conflict(f"{self.name} cannot be started: {self.unreadable}", hint=f"rayos rm {self.name}")
        self.apply(LifeEvent.START)
        self.evidence = Evidence()
        self.lines = self._new_lines()
        self.transcript = Transcript()
        self.faults = {}
        self.start_scope = trio.CancelScope()
        self.start_error = None
        self.has_run = self.is_released = False
        self._start_clock = now
        self.remains.forget()
        record = self.record
        record.started, record.boot, record.is_ready = wall, {}, False
        record.address, record.exit_reason, record.reason, record.guest_exit_code = None, None, "", None

    def apply(self, event: LifeEvent, *, reason: str = "", exit_reason: ExitReason | None = None) -> None:
        """Advances the state, tells everybody.

        Raises:
            Conflict: the event cannot happen in this state.
        """
        try:
            state = advance(self.record.state, event)
        except WrongState as error:
            raise Conflict(f"{self.name}: {error}") from None
        was = self.record.state
        is_news = state is not was
        self.record.state = state
        self.has_run = self.has_run or event is LifeEvent.RUN
        if is_news and event in (LifeEvent.RUN, LifeEvent.PAUSE) and was is VmState.ADOPTING:
            self.record.reason = ""  # why it was not reached
        if event in (LifeEvent.EXIT, LifeEvent.FAIL):
            self.record.reason, self.record.exit_reason = reason, exit_reason
        if is_news:
            data: dict[str, Any] = {"state": state.value}
            if reason:
                data["reason"] = reason
            if exit_reason is not None:
                data["exit_reason"] = exit_reason.value
            self.events.publish("vm.state", self.name, **data)
        self.wake()

    def note_silence(self, why: str) -> None:
        """Says why it is not looked after yet although it lives; nothing is done to it."""
        if self.record.state is VmState.ADOPTING and self.record.reason != why:
            self.record.reason = why
            self.events.publish("vm.silent", self.name, reason=why)
            self.wake()

    def note(self, sentences: Sequence[str]) -> None:
        """Records what its owner should know and nothing is refused for."""
        self.record.notes = list(sentences)
        for text in sentences:
            self.events.publish("vm.note", self.name, text=text)

    def note_stage(self, stage: str, now: float) -> None:
        """Records that a stage of the start is done, in ms since it was asked for."""
        elapsed = round((now - self._start_clock) * 1000, 1)
        self.record.boot[f"{stage}_ms"] = elapsed
        self.events.publish("vm.boot", self.name, stage=stage, ms=elapsed)

    def note_ready(self, now: float, boot_s: float, address: str | None) -> None:
        """Records the guest's ready line; tell of it by `announce_ready` once that is saved."""
        self.record.is_ready = True
        self.record.address = address or self.record.address
        self.record.boot["guest_ms"] = round(boot_s * 1000, 1)
        if self._start_clock and "ready_ms" not in self.record.boot:
            self.note_stage("ready", now)

    def announce_ready(self) -> None:
        """Tells everybody that the guest is ready."""
        self.events.publish(
            "vm.ready",
            self.name,
            ready_ms=self.record.boot.get("ready_ms"),
            guest_ms=self.record.boot["guest_ms"],
            address=self.record.address,
        )
        self.wake()

    def forget_ready(self) -> None:
        """The guest starts over: it is not ready, and its agent knows nothing."""
        self.record.is_ready = False
        if self.agent is not None:
            self.agent.guest_was_reset()
        self.wake()

    def wake(self) -> None:
        """Wakes whoever waits for a change."""
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def wait_changed(self) -> None:
        """Returns at the next change of the record."""
        await self._changed.wait()

    def close_log(self) -> None:
        """Lets go of QEMU's output."""
        if self.log_fd >= 0:
            os.close(self.log_fd)
            self.log_fd = -1
        if self.log is not None:
            self.log.close()
            self.log = None

    def gone(self) -> GuestGone:
        """The error of a machine that has ended: its state and why."""
        return GuestGone(
            f"{self.name} is {self.state.value}: {self.record.reason}", hint="start it again first"
        )

    @asynccontextmanager
    async def alive(self) -> AsyncIterator[None]:
        """Ends the block when the machine ends: whatever waits inside for the guest learns why.

        Raises:
            Conflict: the machine does not run.
            GuestGone: the machine ended before the block did; the reason comes first.
        """
        while (
            self.state is VmState.ADOPTING and not self.record.reason
        ):  # until it is there, or called silent
            await self.wait_changed()
        self._check_reachable()
        run = self.evidence
        try:
            with one_error():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._raise_gone, run)
                    with worker_errors(self):
                        yield
                    nursery.cancel_scope.cancel()
        except GuestGone:
            if not self._is_leaving():
                raise
            with trio.move_on_after(
                _REASON_S
            ):  # the devices or the agent may be gone a moment before QEMU is
                await self._wait_over(run)
                raise self.gone() from None
            raise

    def _is_leaving(self) -> bool:
        """Whether QEMU is going away, though the machine has not ended yet."""
        return self.qmp is None or self.qmp.is_lost or self.evidence.shutdown_cause is not None

    async def _raise_gone(self, run: Evidence) -> None:
        await self._wait_over(run)
        raise self.gone()

    async def _wait_over(self, run: Evidence) -> None:
        while self.is_live and self.evidence is run:
            await self.wait_changed()

    def _check_reachable(self) -> None:
        if not self.is_live:
            if self.record.reason:
                raise self.gone()
            raise Conflict(f"{self.name} is {self.state.value}, not running", hint="start it first")
        if self.state is VmState.ADOPTING:
            why = f": {self.record.reason}" if self.record.reason else ""
            raise Conflict(f"{self.name} is being adopted{why}", hint=f"rayos wait {self.name} --for running")

    def need_qmp(self) -> Qmp:
        """The QMP connection.

        Raises:
            Conflict: the machine does not run.
            GuestGone: QEMU is going away.
        """
        self._check_reachable()
        if self.qmp is None or self.qmp.is_lost:
            raise GuestGone(f"{self.name}: QEMU is not there")
        return self.qmp

    def need_worker(self) -> Worker:
        """The connection to the machine's devices.

        Raises:
            Conflict: the machine does not run.
            GuestGone: its devices are not there.
        """
        self._check_reachable()
        if self.worker is None:
            raise GuestGone(f"{self.name}: its devices are not there")
        return self.worker


@contextmanager
def worker_errors(machine: Machine) -> Iterator[None]:
    """A worker's refusals and its absence in the service's words."""
    try:
        yield
    except WorkerError as error:
        if error.denied:
            op = Op(error.denied)
            raise missing(machine.name, needed(op), op.value) from None
        if error.code in ("no_such_port", "no_such_device"):
            raise NotFound(f"{machine.name}: {error}", code=error.code) from None
        raise Invalid(f"{machine.name}: {error}", code=error.code) from None
    except WorkerGone as error:
        raise GuestGone(f"{machine.name}: {error}") from None
