"""Stays with a running machine: QMP events, serial line, QEMU's log and the log port, until QEMU is gone.

It gathers the evidence from which `outcome.py` judges the end. Cancelling it (the daemon leaves) changes
nothing about the machine.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Awaitable, Callable, Hashable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from rayos_vmm.errors import GuestGone, RayosError, one_error
from rayos_vmm.hardware.protocols import Worker
from rayos_vmm.host.process import adopt, ending
from rayos_vmm.machine import limits
from rayos_vmm.machine.agent import Agent
from rayos_vmm.machine.build import QMP_SOCKET, Dependencies
from rayos_vmm.machine.history import BoundedFile, Lines
from rayos_vmm.machine.lifecycle import REACHABLE, LifeEvent
from rayos_vmm.machine.line import Line, line_socket
from rayos_vmm.machine.machine import Machine
from rayos_vmm.machine.outcome import (
    Evidence,
    Ready,
    count_of,
    note_reset,
    parse_panic,
    parse_ready,
)
from rayos_vmm.machine.verdict import LAST_WORDS_S, SILENCE_S, Verdict
from rayos_vmm.machine.view import ExitReason, VmState
from rayos_vmm.machine.watchdog import Watchdog, progress
from rayos_vmm.network.published import open_published, parse_published
from rayos_vmm.qemu.arch import architecture_of
from rayos_vmm.qemu.qmp import Qmp, QmpEvent, open_qmp
from rayos_vmm.shared.packet import Head, WorkerError, WorkerGone

if TYPE_CHECKING:
    from rayos_vmm.host.process import Process, ProcessId

AGENT_PORT: Final = 1
LOG_PORT: Final = 2
# QEMU writes each byte of a serial line for itself: so long they gather, or every reader is woken for each.
GATHER_S: Final = 0.002
GATHERED_BYTES: Final = 4096
_READ_BYTES: Final = 64 << 10
_QUIT_TIMEOUT_S: Final = 2.0
# After the kernel's last line of a panic nothing follows; a guest without pvpanic just hangs.
_PANIC_SILENCE_S: Final = 0.5
_PANIC_END: Final = re.compile(r"---\[ end Kernel panic")
_DRAIN_TIMEOUT_S: Final = 2.0
_COMMON_END_S: Final = 0.3
#: The TPM's state (`rayos_tpm.protocol.State`) that is for good.
FAILED_TPM: Final = "failed"


class Supervisor:
    """The tasks around one machine. `run` it once."""

    def __init__(self, machine: Machine, dependencies: Dependencies) -> None:
        self._machine = machine
        self._dependencies = dependencies
        self._evidence = machine.evidence
        self._end_wanted = trio.Event()
        self._panic_over = trio.Event()
        self._verdict = Verdict(machine.record.spec)
        self._decided = trio.Event()
        self._ready_send, self._ready_receive = trio.open_memory_channel[tuple[float, Ready]](1)
        self._events_read = trio.Event()
        self._worker_started = trio.Event()
        self._log_read = trio.Event()
        self._lines_read = {name: trio.Event() for name in machine.record.spec.ports.lines}
        self.is_attached = False  # QEMU and the devices have answered
        self._resets = 0
        self._has_new_fault = False  # a triple fault whose reset has not been told yet

    async def run(self, process: Process, *, is_new: bool) -> None:
        """Returns when QEMU is gone and everything that it said was read.

        Args:
            process: QEMU, waiting for `cont` when `is_new`, running or paused when not.

        Raises:
            GuestGone: QEMU did not get as far as answering QMP; the message says why.
            RayosError: the devices could not be reached, or QEMU refused to run.
        """
        machine = self._machine
        try:
            with one_error():
                async with (
                    open_qmp(
                        machine.runtime / QMP_SOCKET,
                        timeout_s=self._dependencies.start_timeout_s,
                        transcript=machine.transcript,
                    ) as qmp,
                    self._dependencies.hardware.connect(machine.runtime) as worker,
                ):
                    machine.qmp, machine.worker = qmp, worker
                    await limits.restore(machine)
                    await self._supervise(qmp, worker, process, is_new=is_new)
        except GuestGone:
            if not is_new:
                raise
            with trio.move_on_after(_DRAIN_TIMEOUT_S):
                self._evidence.exit_status = await process.wait()
            self._drain_log()
            if refusal := self._dependencies.tpms.refusal(machine.runtime):
                raise GuestGone(f"the TPM refused the launch: {refusal}") from None
            if self._evidence.last_log_line:
                raise GuestGone(f"QEMU did not start: {self._evidence.last_log_line}") from None
            raise
        finally:
            machine.qmp = machine.worker = machine.agent = None
            for line in machine.lines.values():
                line.stream = None
            if is_new or self.is_attached:
                machine.input_recordings.close()
                for line in machine.lines.values():
                    line.close()

    async def _supervise(self, qmp: Qmp, worker: Worker | None, process: Process, *, is_new: bool) -> None:
        machine = self._machine
        ports = [parse_published(one) for one in machine.record.spec.net.publish]
        async with open_published(ports, lambda: machine.record.address), trio.open_nursery() as nursery:
            for line in machine.lines.values():
                line.keep_in(machine.state_directory, is_continued=not is_new)
                line.stream = await trio.open_unix_socket(str(line_socket(machine.runtime, line.name)))
                nursery.start_soon(self._follow_line, line, line.stream)
            nursery.start_soon(self._follow_log)
            nursery.start_soon(self._follow_events, qmp)
            nursery.start_soon(self._end_when_wanted, qmp, process)
            nursery.start_soon(self._end_after_panic)
            nursery.start_soon(self._end_after_verdict)
            nursery.start_soon(self._follow_ready)
            nursery.start_soon(self._watch, qmp, worker)
            nursery.start_soon(self._plan_faults_again)
            nursery.start_soon(self._dependencies.hardware.follow, machine.runtime, self._on_device_event)
            self._follow_deaths(nursery, process)
            if machine.record.live.swtpm is not None:
                nursery.start_soon(self._dependencies.tpms.follow, machine.runtime, self._on_tpm)
            if worker is not None and machine.record.live.ports > AGENT_PORT:
                machine.agent = Agent(worker, AGENT_PORT)
                nursery.start_soon(machine.agent.run)
            if worker is not None and machine.record.live.ports > LOG_PORT:
                nursery.start_soon(self._follow_log_port, worker)
            if worker is not None and self._verdict.is_wanted:
                for port, name in enumerate(machine.record.spec.console_ports[: machine.record.live.ports]):
                    if port not in (AGENT_PORT, LOG_PORT):
                        nursery.start_soon(self._judge_port, worker, port, name)
            if is_new:
                machine.note_stage("qemu", trio.current_time())
                await qmp.execute("cont")
                machine.apply(LifeEvent.RUN)
                machine.note_stage("running", trio.current_time())
            else:
                status = await qmp.execute("query-status")
                machine.apply(LifeEvent.RUN if status["running"] else LifeEvent.PAUSE)
                if machine.state is VmState.STOPPING:  # what a former service had begun
                    self._evidence.asked = ExitReason.STOPPED
                    self._end_wanted.set()
            self.is_attached = True
            machine.attached.set()
            await self._dependencies.save(machine)
            self._evidence.exit_status = await process.wait()
            with trio.move_on_after(_DRAIN_TIMEOUT_S):
                await self._events_read.wait()
                await self._log_read.wait()
                for read in self._lines_read.values():  # a quick guest's words are still in the socket
                    await read.wait()
            if worker is not None:
                await machine.remains.save(worker)
            nursery.cancel_scope.cancel()

    def _follow_deaths(self, nursery: trio.Nursery, process: Process) -> None:
        """Every process that the machine has beside QEMU is followed by its pidfd."""
        live, hardware = self._machine.record.live, self._dependencies.hardware
        if live.keeper is not None:
            name = f"its devices' keeper (process {live.keeper.pid})"
            nursery.start_soon(self._end_without, name, partial(hardware.watch, live.keeper), process)
        for reader in live.readers:
            nursery.start_soon(self._end_without_reader, reader, process)
        if live.swtpm is not None:
            nursery.start_soon(self._fail_tpm, live.swtpm, process)

    async def _end_without(
        self, name: str, watch: Callable[[], Awaitable[int | None]], process: Process
    ) -> None:
        """The guest's devices are gone for good with that process: QEMU goes too, and the machine has failed."""
        how = ending(await watch())
        self._evidence.lost = self._evidence.lost or f"{name} {how}"
        process.signal(signal.SIGKILL)

    async def _end_without_reader(self, reader: ProcessId, process: Process) -> None:
        """As `_end_without`. A reader also ends when its keeper has died, and then that is told."""
        status, keeper = await _ended(reader), self._machine.record.live.keeper
        holder = None if keeper is None else adopt(keeper)
        if holder is not None:
            holder.close()
            name = f"the reader of its disk (process {reader.pid})"
            self._evidence.lost = self._evidence.lost or f"{name} {ending(status)}"
            process.signal(signal.SIGKILL)

    async def _fail_tpm(self, identity: ProcessId, process: Process) -> None:
        tpms, machine = self._dependencies.tpms, self._machine
        how = await tpms.watch(identity)
        with trio.move_on_after(_COMMON_END_S):  # it ends with QEMU, and may be the first to be seen
            await process.wait()
            return
        reason = f"the TPM process (process {identity.pid}) {how}"
        tpms.note_death(machine.runtime, reason)
        self._on_tpm(FAILED_TPM, reason)
        await self._dependencies.save(machine)

    async def _follow_events(self, qmp: Qmp) -> None:
        try:
            while True:
                self._on_event(await qmp.next_event())
        except GuestGone:
            self._events_read.set()

    def _on_event(self, event: QmpEvent) -> None:
        machine, evidence = self._machine, self._evidence
        match event.name:
            case "SHUTDOWN":
                evidence.shutdown_cause = str(event.data.get("reason"))
            case "RESET":
                self._on_reset(is_guest=bool(event.data.get("guest")))
            case "STOP" | "RESUME":
                if machine.state in REACHABLE:
                    machine.apply(LifeEvent.PAUSE if event.name == "STOP" else LifeEvent.RUN)
            case "GUEST_PANICKED" | "GUEST_CRASHLOADED":
                evidence.has_panicked = True
                self._end_wanted.set()
        if event.name not in ("STOP", "RESUME"):
            machine.events.publish("vm.qemu", machine.name, event=event.name, data=dict(event.data))

    def _on_device_event(self, event: Head) -> None:
        name = str(event.pop("event", ""))
        if name == "worker_started":
            self._worker_started.set()
        if name:
            self._machine.events.publish(f"devices.{name}", self._machine.name, **event)

    async def _plan_faults_again(self) -> None:
        while True:
            await self._worker_started.wait()
            self._worker_started = trio.Event()
            with suppress(RayosError):  # it ended once more, or the machine does
                await limits.plan_faults_again(self._machine)

    def _on_tpm(self, state: str, reason: str) -> None:
        if state == FAILED_TPM:
            self._machine.record.reason = f"its TPM failed: {reason}"
            self._machine.wake()
        self._machine.events.publish("vm.tpm", self._machine.name, state=state, reason=reason)

    def _on_reset(self, *, is_guest: bool) -> None:
        machine, evidence = self._machine, self._evidence
        if is_guest and evidence.panic is not None:
            evidence.has_panicked = True  # a kernel with panic=N restarts after its panic
            self._end_wanted.set()
            return
        if is_guest and self._is_enough(evidence):
            self._end_wanted.set()
            return
        machine.forget_ready()

    def _is_enough(self, evidence: Evidence) -> bool:
        """Whether a reset of the guest's own is its last, by what is asked for resets and triple faults."""
        spec = self._machine.record.spec
        before = evidence.triple_faults
        self._drain_log()  # QEMU has written of a triple fault before it told of the reset
        if evidence.triple_faults > before or self._has_new_fault:
            self._has_new_fault = False
            return evidence.has_triple_faulted
        self._resets += 1
        limit = count_of(spec.on_reset)
        if spec.on_reset == "auto" and not self._machine.record.is_ready:
            note_reset(evidence, trio.current_time())
        elif limit is not None and self._resets >= limit:
            evidence.has_reset_enough = self._resets
        return evidence.is_reset_loop or bool(evidence.has_reset_enough)

    async def _follow_line(self, line: Line, stream: trio.SocketStream) -> None:
        lines = Lines(self._on_console_line)
        try:
            while True:
                try:
                    data = await stream.receive_some(_READ_BYTES)
                except trio.BrokenResourceError:
                    return
                if not data:
                    return
                line.history.write(bytes(data))
                lines.write(bytes(data))
                self._judge(line.name, bytes(data))
                if len(data) < GATHERED_BYTES:
                    await trio.sleep(GATHER_S)
        finally:
            self._lines_read[line.name].set()
            await trio.aclose_forcefully(stream)

    async def _follow_log_port(self, worker: Worker) -> None:
        lines = Lines(self._on_console_line)
        async with worker.console_stream(LOG_PORT, since=0) as chunks:
            async for _, data in chunks:
                lines.write(data)
                self._judge("log", data)

    async def _judge_port(self, worker: Worker, port: int, name: str) -> None:
        async with worker.console_stream(port, since=0) as chunks:
            async for _, data in chunks:
                self._judge(name, data)

    def _judge(self, console: str, data: bytes) -> None:
        if self._evidence.decided is None:
            self._evidence.decided = self._verdict.feed(console, data)
            if self._evidence.decided is not None:
                self._decided.set()

    async def _end_after_verdict(self) -> None:
        await self._decided.wait()
        if self._evidence.decided is not None and self._evidence.decided[0] is not ExitReason.PASSED:
            with trio.move_on_after(LAST_WORDS_S):
                await self._until_silent()
        self._end_wanted.set()

    async def _until_silent(self) -> None:
        while True:
            with trio.move_on_after(SILENCE_S) as silence:
                await self._machine.serial.changed()
            if silence.cancelled_caught:
                return

    def _on_console_line(self, line: str) -> None:
        ready = parse_ready(line)
        if ready is not None:
            with suppress(trio.WouldBlock):  # the line comes on two consoles
                self._ready_send.send_nowait((trio.current_time(), ready))
            return
        panic = parse_panic(line)
        if panic is not None and self._evidence.panic is None:
            self._evidence.panic = panic
        elif self._evidence.panic is not None and _PANIC_END.search(line):
            self._panic_over.set()

    async def _end_after_panic(self) -> None:
        await self._panic_over.wait()
        end = self._machine.serial.end
        await trio.sleep(_PANIC_SILENCE_S)
        if self._machine.serial.end - end <= 2:  # the line's own end may still have been on its way
            self._evidence.has_panicked = True
            self._end_wanted.set()

    async def _watch(self, qmp: Qmp, worker: Worker | None) -> None:
        machine, limits = self._machine, self._machine.record.spec.watchdog
        has_run_s = max(0.0, time.time() - (machine.record.started or time.time()))
        now = trio.current_time()
        watchdog = Watchdog(silence_s=limits.silence_s, run_s=limits.run_s, now=now - has_run_s)
        while self._evidence.expired is None:
            await trio.sleep_until(watchdog.deadline())
            now = trio.current_time()
            self._evidence.expired = watchdog.check(await self._mark(worker, now), now)
        if self._evidence.expired[0] is ExitReason.HANG:
            self._evidence.expired = (
                ExitReason.HANG,
                self._evidence.expired[1] + await _where(qmp, self._machine),
            )
        self._end_wanted.set()

    async def _mark(self, worker: Worker | None, now: float) -> Hashable:
        """Different whenever the guest has got on; a paused one is excused, and so is one whose devices restart."""
        if self._machine.state is VmState.PAUSED:
            return now
        try:
            done = progress(await worker.stats()) if worker is not None else 0
        except (WorkerError, WorkerGone):
            return now
        return sum(line.history.end for line in self._machine.lines.values()), done

    async def _follow_ready(self) -> None:
        machine = self._machine
        async for now, ready in self._ready_receive:
            if not machine.record.is_ready:
                machine.note_ready(now, ready.boot_s, ready.address)
                await self._dependencies.save(machine)
                machine.announce_ready()

    async def _follow_log(self) -> None:
        while self._machine.log_fd >= 0 and self._drain_log():
            await trio.lowlevel.wait_readable(self._machine.log_fd)
        self._log_read.set()

    def _drain_log(self) -> bool:
        """Reads what is there; False when QEMU closed it."""
        machine = self._machine
        if machine.log is None:
            machine.log = BoundedFile(machine.state_directory / "qemu.log")
            machine.log_lines = Lines(self._on_log_line)
        while machine.log_fd >= 0 and machine.log_lines is not None:
            try:
                data = os.read(machine.log_fd, _READ_BYTES)
            except BlockingIOError:
                return True
            if not data:
                return False
            machine.log.write(data)
            machine.log_lines.write(data)
        return False

    def _on_log_line(self, line: str) -> None:
        evidence = self._evidence
        if (
            line.startswith(("qemu-system", "qemu: "))
            and "warning:" not in line
            and "terminating on" not in line
        ):
            evidence.last_log_line = line.partition(": ")[2] or line
        elif architecture_of(self._machine.record.spec).fault_line in line:
            self._on_triple_fault()

    def _on_triple_fault(self) -> None:
        evidence, reaction = self._evidence, self._machine.record.spec.on_triple_fault
        evidence.triple_faults += 1
        self._has_new_fault = True
        limit = count_of(reaction)
        is_last = limit is not None and evidence.triple_faults >= limit
        if is_last or (reaction == "auto" and not self._machine.record.is_ready):
            evidence.has_triple_faulted = True
            self._end_wanted.set()

    async def _end_when_wanted(self, qmp: Qmp, process: Process) -> None:
        await self._end_wanted.wait()
        try:
            await qmp.execute("quit", timeout_s=_QUIT_TIMEOUT_S)
        except RayosError:
            process.signal(signal.SIGKILL)


async def _ended(identity: ProcessId) -> int | None:
    process = adopt(identity)
    if process is None:
        return None
    try:
        return await process.wait()
    finally:
        process.close()


async def _where(qmp: Qmp, machine: Machine) -> str:
    """Where each processor of a guest that hangs is, for its sentence; nothing when QEMU does not say."""
    try:
        said = await qmp.execute("human-monitor-command", {"command-line": "info registers -a"})
    except RayosError:
        return ""
    registers = architecture_of(machine.record.spec).registers
    found = [f"{ip}{' (halted)' if halted == '1' else ''}" for ip, halted in registers.findall(str(said))]
    return f"; instruction pointer {', '.join(found)}" if found else ""
