"""Two busy workers on one processor: the service moves one of them to the other by itself, once."""

from __future__ import annotations

import os
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import trio

from rayos_vmm.config.spec import VmSpec
from rayos_vmm.events import EventLog
from rayos_vmm.hardware.client import WorkerClient
from rayos_vmm.hardware.launch import Spawner, stop_keeper
from rayos_vmm.host.identity import claim
from rayos_vmm.machine.machine import Machine
from rayos_vmm.machine.record import Record
from rayos_vmm.service.workers import Workers
from rayos_vmm.shared.spec import Device

#: To tell of so many costs a worker more than it costs us to ask.
DEVICES = [Device(kind="input", name=f"input{index}") for index in range(16)]
PERIOD_S = 0.5


async def start(spawner: Spawner, directory: Path, events: EventLog, stack: AsyncExitStack) -> Machine:
    """A machine of a worker alone, which ends with the stack."""
    with claim() as identity:
        log = directory / "log"
        keeper = await spawner.start_keeper(directory.name, directory, DEVICES, log, identity=identity)
    stack.push_async_callback(stop_keeper, keeper)
    spec = VmSpec(name=directory.name)
    machine = Machine(Record(spec=spec, uuid=spec.name), events, runtime=directory, state=directory)
    machine.worker = keeper.worker()
    client = keeper.client()
    await client.move_worker(sorted(os.sched_getaffinity(0))[:1])
    client.close()
    return machine


async def look(runtime: Path) -> None:
    """Asks for figures without end."""
    worker = WorkerClient(runtime)
    try:
        while True:
            await worker.stats()
    finally:
        worker.close()


async def test_one_of_two_busy_workers_is_moved(tmp_path: Path) -> None:
    """It goes to the idle processor, is told of and counted, and what is even then stays as it is."""
    events = EventLog()
    async with AsyncExitStack() as stack, Spawner() as spawner:
        for name in "ab":
            (tmp_path / name).mkdir()
        machines = {name: await start(spawner, tmp_path / name, events, stack) for name in "ab"}
        workers = Workers(lambda: list(machines.values()), machines.__getitem__, events, period_s=PERIOD_S)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(workers.run)
            for machine in machines.values():
                nursery.start_soon(look, machine.runtime)
            await trio.sleep(3 * PERIOD_S)
            assert workers.status().moves == 0, "it is switched off"
            workers.switch(True)
            with trio.fail_after(30):
                async with aclosing(events.follow(0)) as happened:
                    async for event in happened:
                        if event.type == "devices.moved":
                            break
            assert event.data["automatic"] and event.data["imbalance"] > 0.3
            await trio.sleep(4 * PERIOD_S)
            load = await workers.load()
            nursery.cancel_scope.cancel()
    assert {worker.core for worker in load.workers} == {event.data["source"], event.data["core"]}
    assert (load.moves, load.automatic.moves) == (1, 1)
    assert load.imbalance < event.data["imbalance"]
