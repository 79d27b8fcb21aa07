"""Tells a machine's devices what was set before, whenever their worker is reached anew."""

from __future__ import annotations

import logging

from rayos_devices.levels import DEFAULT
from rayos_vmm.errors import RayosError
from rayos_vmm.machine.machine import Machine, worker_errors

log = logging.getLogger(__name__)


async def restore(machine: Machine) -> None:
    """Restores the limits of a machine's devices. A limit that a device refuses now (it has changed since) is told in
    the log, and does not keep the machine from running.
    """
    if machine.worker is None:
        return
    record = machine.record
    for device, limits in record.limits.items():
        try:
            with worker_errors(machine):
                await machine.worker.limit(device, limits)
        except RayosError as error:
            log.warning(
                "a device does not take its limits",
                extra={"vm": machine.name, "device": device, "why": error.message},
            )
    if record.level != DEFAULT:
        with worker_errors(machine):
            await machine.worker.set_level(record.level)


async def plan_faults_again(machine: Machine) -> None:
    """Gives a new worker the same faults, from the beginning.

    Raises:
        RayosError: the devices are not there, or refuse them.
    """
    worker = machine.need_worker()
    async with machine.faults_lock:
        with worker_errors(machine):
            for device, plan in machine.faults.items():
                await worker.set_faults(device, plan.rules, plan.seed)
