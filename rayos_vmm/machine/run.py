"""One machine from start to end, or from adoption to end: the supervisor boundary.

Whatever goes wrong in here ends this machine with a reason, never the service.
"""

from __future__ import annotations

import logging
import os
from typing import Final

import trio

from rayos_vmm.errors import GuestGone, RayosError
from rayos_vmm.host.process import Process, adopt
from rayos_vmm.machine.build import LOG_FIFO, Dependencies, build, dismantle, end_orphans
from rayos_vmm.machine.lifecycle import MEANT, LifeEvent
from rayos_vmm.machine.machine import Machine
from rayos_vmm.machine.outcome import judge, memory_note
from rayos_vmm.machine.supervisor import Supervisor
from rayos_vmm.machine.view import ExitReason, VmState

LOG: Final = logging.getLogger(__name__)
_SAVE_TIMEOUT_S: Final = 10.0
#: After which a QEMU that does not answer a new service is called silent.
_SILENCE_S: Final = 2.0
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 10.0


async def run_machine(machine: Machine, dependencies: Dependencies) -> None:
    """Builds the machine, stays with it, takes it apart. The machine is in *starting*.

    Cancelled while starting, it clears up; cancelled later (the daemon leaves), the machine goes on.
    """
    try:
        with machine.start_scope:
            await build(machine, dependencies)
        if machine.process is not None and machine.state is not VmState.STOPPING:
            await Supervisor(machine, dependencies).run(machine.process, is_new=True)
    except RayosError as error:
        machine.start_error = error
    except Exception as error:
        LOG.exception("a machine's supervisor failed", extra={"vm": machine.name})
        machine.start_error = GuestGone(f"internal error: {type(error).__name__}: {error}")
    except BaseException:  # cancelled
        if machine.state is VmState.STARTING:
            machine.start_error = GuestGone("the service was stopped while the machine was starting")
            await _finish(machine, dependencies)
        else:
            _let_go(machine)
        raise
    await _finish(machine, dependencies)


async def adopt_machine(machine: Machine, dependencies: Dependencies) -> None:
    """Takes over a machine of a former daemon, whose record is live, and stays with it; or clears up after it.

    A QEMU that lives and does not answer is waited for: that it is silent is said, and is no reason to end it.
    Cancelled, the machine goes on.
    """
    try:
        await _adopt(machine, dependencies)
    finally:
        machine.attached.set()


async def _adopt(machine: Machine, dependencies: Dependencies) -> None:
    record = machine.record
    process = adopt(record.live.qemu) if record.live.qemu is not None else None
    if process is None or record.state is VmState.STARTING:
        if process is not None:
            process.close()
        if record.state is VmState.STARTING:
            machine.start_error = GuestGone("the service died while the machine was starting")
            await end_orphans(machine)
        await _finish(machine, dependencies)
        return
    machine.process = process
    machine.apply(LifeEvent.ADOPT)
    try:
        try:
            machine.log_fd = os.open(machine.runtime / LOG_FIFO, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            machine.log_fd = -1  # only its messages are lost
        machine.events.publish("vm.adopted", machine.name, pid=process.pid)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_say_silence, machine)
            await _attach(machine, dependencies, process)
            nursery.cancel_scope.cancel()
    except BaseException:  # cancelled
        _let_go(machine)
        raise
    await _finish(machine, dependencies)


async def _attach(machine: Machine, dependencies: Dependencies, process: Process) -> None:
    """Stays with a machine that was found alive, however often that has to be tried; returns when it is gone."""
    pause_s = _FIRST_PAUSE_S
    while True:
        attendant = Supervisor(machine, dependencies)
        try:
            await attendant.run(process, is_new=False)
            return
        except RayosError as error:
            LOG.warning("a machine could not be adopted", extra={"vm": machine.name, "why": error.message})
            machine.note_silence(error.message)
        except Exception as error:
            LOG.exception("a machine's supervisor failed", extra={"vm": machine.name})
            machine.note_silence(f"internal error: {type(error).__name__}: {error}")
        if attendant.is_attached:
            return
        with trio.move_on_after(pause_s):
            machine.evidence.exit_status = await process.wait()
            return
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def _say_silence(machine: Machine) -> None:
    with trio.move_on_after(_SILENCE_S):
        await machine.attached.wait()
        return
    machine.note_silence(f"QEMU's monitor has not answered for {_SILENCE_S:g} s; it runs and is waited for")


def _let_go(machine: Machine) -> None:
    if machine.process is not None:
        machine.process.close()
        machine.process = None
    machine.close_log()


async def _finish(machine: Machine, dependencies: Dependencies) -> None:
    """Takes the machine apart and records why it ended; cannot be cancelled."""
    has_run = machine.has_run
    await dismantle(machine, dependencies)
    machine.serial.close()
    error = machine.start_error
    exit_reason, reason = judge(machine.evidence, success=machine.record.spec.verdict.success)
    machine.record.guest_exit_code = machine.evidence.guest_exit_code
    if machine.evidence.asked is not None and exit_reason is not machine.evidence.asked and not has_run:
        exit_reason, reason = machine.evidence.asked, "it was stopped while it was starting"
    elif error is not None and machine.evidence.asked is None and not has_run:
        exit_reason, reason = ExitReason.START_FAILED, error.message + memory_note(machine.evidence)
    elif error is not None and exit_reason in (ExitReason.LOST, ExitReason.QEMU_CRASHED):
        reason = f"{reason}; {error.message}"
    event = LifeEvent.EXIT if MEANT[exit_reason] else LifeEvent.FAIL
    machine.apply(event, reason=reason, exit_reason=exit_reason)
    try:
        with trio.move_on_after(_SAVE_TIMEOUT_S, shield=True):
            await dependencies.save(machine)
    except RayosError as failure:
        LOG.error("a machine's end could not be recorded", extra={"vm": machine.name, "why": failure.message})
