"""Faults that somebody asked for in a machine's devices. They last until its end, also over its worker's death."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rayos_vmm.config.fault import FaultPlan, FaultRule
from rayos_vmm.machine.machine import Machine, worker_errors
from rayos_vmm.shared.view import FaultState


async def set_faults(machine: Machine, device: str, rules: Sequence[FaultRule], seed: int) -> None:
    """From now on these things go wrong in a device; no rules: none.

    Raises:
        Invalid: a rule is wrong, or not for this kind of device.
        NotFound: there is no such disk or network card.
        Conflict: it does not run.
    """
    plan = FaultPlan(tuple(asdict(rule.fault()) for rule in rules), seed)
    worker = machine.need_worker()
    async with machine.faults_lock:
        with worker_errors(machine):
            await worker.set_faults(device, plan.rules, seed)
        machine.faults.pop(device, None)
        if plan.rules:
            machine.faults[device] = plan
    machine.events.publish("devices.faults", machine.name, device=device, rules=len(plan.rules), seed=seed)


async def faults(machine: Machine) -> dict[str, list[FaultState]]:
    """Each device that has faults: its rules, with how often each `matched` and was `done` in the worker of now."""
    worker = machine.need_worker()
    async with machine.faults_lock:
        with worker_errors(machine):
            found = {device: await worker.faults(device) for device in sorted(machine.faults)}
    return found
