"""Kills every kind of process of a service, again and again, while four guests write and read back what they wrote.

`python -m benchmarks.kills --kills 200` (`make soak`) says for each kind how many kills there were, how long it took
until the service said so, and what was lost that should live. It fails when anything was, when a sentence does not name
the process, or when something is left behind.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from rayos_tpm.client import TpmClient
from rayos_vmm.cli.verify import processes
from rayos_vmm.client.client import Client
from rayos_vmm.client.daemon import start_daemon
from rayos_vmm.config.spec import Disk, Gpu, VmSpec
from rayos_vmm.errors import RayosError
from rayos_vmm.machine.view import VmState, VmView
from rayos_vmm.paths import Paths
from rayos_vmm.testing.daemon import PrivateDaemon, open_private_daemon
from rayos_vmm.testing.leftovers import Leftovers

GUESTS: Final = 4
LIMIT_S: Final = 60.0
#: A round writes a block and reads it back; it ends with a mark when that is another.
WRITER: Final = """
n=0
dd if=/dev/urandom of=/tmp/pattern bs=64k count=8 2>/dev/null
while :; do
  n=$((n+1))
  for disk in vda vdb; do
    dd if=/tmp/pattern of=/dev/$disk bs=64k count=8 seek=16 oflag=direct 2>/dev/null || echo bad >>/tmp/bad
    dd if=/dev/$disk bs=64k count=8 skip=16 iflag=direct 2>/dev/null | cmp -s - /tmp/pattern || echo bad >>/tmp/bad
  done
  echo $n >/tmp/rounds
done
"""
#: Kinds whose machine has failed afterwards, and whose TPM has.
FATAL: Final = ("qemu", "keeper", "reader")
TPM: Final = ("tpm", "swtpm")
PARENTS: Final = {"keepers' parent": b"rayos_vmm.worker", "TPMs' parent": b"rayos_vmm.worker.tpm_process"}
KINDS: Final = ("worker", *FATAL, *TPM, *PARENTS, "daemon")


@dataclass
class Tally:
    """One kind's kills: seconds until each was told, and what went wrong."""

    told_s: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Soak:
    """The daemon, its guests, and what is known of them."""

    def __init__(self, daemon: PrivateDaemon, folder: Path, seed: int) -> None:
        self.daemon = daemon
        self.folder = folder
        self.random = random.Random(seed)
        self.tallies: dict[str, Tally] = defaultdict(Tally)
        self.pid = daemon.process.pid
        self.adopted: set[str] = set()  # of their processes a later service does not see the status
        self.orphaned: set[str] = set()  # their keeper's parent is gone, who would have seen it

    @property
    def client(self) -> Client:
        return self.daemon.client

    @property
    def paths(self) -> Paths:
        return self.daemon.paths

    async def boot(self, name: str) -> None:
        """Starts a guest and its writer."""
        self.adopted.discard(name)
        self.orphaned.discard(name)
        await self.client.act(name, "start")
        await self.client.wait(name, "ready", timeout_s=120)
        await self.client.write_file(name, "/tmp/writer", WRITER.encode())
        await self.client.exec(name, "sh /tmp/writer >/dev/null 2>&1 &")
        await self.wait_round(name, 1)

    async def rounds(self, name: str) -> int:
        """How often the guest has written and read; -1 once something was not as it wrote it."""
        result = await self.client.exec(
            name, "[ -e /tmp/bad ] && echo -1 || cat /tmp/rounds", timeout_s=LIMIT_S
        )
        return int(result.stdout or b"0")

    async def wait_round(self, name: str, more: int) -> None:
        """Returns when the guest has got on by so many rounds."""
        with trio.fail_after(LIMIT_S):
            first = await self.rounds(name)
            while first >= 0 and (now := await self.rounds(name)) < first + more:
                if now < 0:
                    break
                await trio.sleep(0.05)
        if await self.rounds(name) < 0:
            raise AssertionError(f"{name} read something else than it wrote")

    async def kill(self, kind: str) -> None:
        """One kill at a random moment, and everything that must be so afterwards."""
        tally = self.tallies[kind]
        views = {view.spec.name: view for view in await self.client.machines()}
        name = self.random.choice(sorted(views))
        pid = await self.find(kind, views[name])
        await trio.sleep(self.random.random())
        start = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        tally.told_s.append(0.0)
        try:
            with trio.fail_after(2 * LIMIT_S):
                await self.expect(kind, name, pid)
                tally.told_s[-1] = time.monotonic() - start
                await self.mend(kind, name)
                await self.check_all({other: view for other, view in views.items() if other != name})
        except (AssertionError, trio.TooSlowError, RayosError) as error:
            tally.faults.append(f"{kind} of {name} (process {pid}): {type(error).__name__}: {error}")
            await self.repair()

    async def find(self, kind: str, view: VmView) -> int:
        if kind == "daemon":
            return self.pid
        if kind in PARENTS:
            return _parent(self.pid, PARENTS[kind])
        return next(pid for found, pid in await processes(view, self.paths) if found == kind)

    async def expect(self, kind: str, name: str, pid: int) -> None:
        """The service knows, and says which process it was."""
        if kind in FATAL:
            view = await self.client.wait(name, "stopped", timeout_s=LIMIT_S)
            is_unseen = name in self.adopted or (kind == "keeper" and name in self.orphaned)
            how = "nobody saw how" if is_unseen else "SIGKILL"
            assert view.state is VmState.FAILED and how in view.reason, view.reason
            assert kind != "keeper" or str(pid) in view.reason, view.reason
        elif kind in TPM:
            async with self.client.events(since=0) as events:
                async for event in events:
                    if event.type == "vm.tpm" and f"process {pid}" in event.data["reason"]:
                        break
            status = await TpmClient(self.paths.vm_runtime(name)).status()
            assert status.state == "failed", status
        elif kind == "keepers' parent":
            self.orphaned.update(view.spec.name for view in await self.client.machines())
        elif kind == "worker":
            await self.wait_round(name, 2)
        elif kind == "daemon":
            self.daemon.process.wait()
            config = ["--config", str(self.paths.state.parent / "rayos.toml")]
            process = await start_daemon(self.paths, config)
            self.pid = process.pid
            self.daemon = PrivateDaemon(self.paths, process, self.daemon.bridge, self.daemon.owner_fd)
            for view in await self.client.machines():
                await self.client.wait(view.spec.name, "running", timeout_s=LIMIT_S)
                self.adopted.add(view.spec.name)

    async def mend(self, kind: str, name: str) -> None:
        """Prepares the next kill: a machine that failed runs again, the next start replaces a parent."""
        if kind in TPM or kind in PARENTS:
            await self.client.act(name, "kill")
        if kind in TPM or kind in PARENTS or kind in FATAL:
            await self.boot(name)

    async def check_all(self, others: dict[str, VmView]) -> None:
        """Nobody else has noticed."""
        for name, before in others.items():
            view = await self.client.get(name)
            assert (view.state, view.pid) == (VmState.RUNNING, before.pid), (
                f"{name} is {view.state}: {view.reason}"
            )
            await self.wait_round(name, 1)

    async def repair(self) -> None:
        """After a fault: every machine runs again, whatever it takes."""
        for view in await self.client.machines():
            if view.state is not VmState.RUNNING:
                with suppress(RayosError):
                    await self.client.act(view.spec.name, "kill")
                await self.boot(view.spec.name)


def _parent(daemon: int, module: bytes) -> int:
    """The daemon's child that runs a module."""
    for path in Path(f"/proc/{daemon}/task").glob("*/children"):
        for child in path.read_text().split():
            if module in (Path("/proc") / child / "cmdline").read_bytes().split(b"\0"):
                return int(child)
    raise AssertionError(f"process {daemon} has no child that runs {module.decode()}")


async def soak(daemon: PrivateDaemon, folder: Path, kills: int, seed: int) -> dict[str, Tally]:
    """So many kills of each kind in a random order, with all guests at work."""
    run = Soak(daemon, folder, seed)
    try:
        await work(run, kills)
    finally:
        with trio.CancelScope(shield=True):
            await end(run)
    return run.tallies


async def work(run: Soak, kills: int) -> None:
    """All guests at work, and then the kills."""
    async with trio.open_nursery() as nursery:
        for index in range(GUESTS):
            image = run.folder / f"{index}.qcow2"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "32M"], check=True)  # noqa: ASYNC221
            disks = [Disk(size="32MiB"), Disk(path=str(image), format="qcow2")]
            spec = VmSpec(name=f"soak{index}", memory="128MiB", gpu=Gpu(enabled=False), disks=disks)
            await run.client.create(spec)
            nursery.start_soon(run.boot, spec.name)
    orders = [kind for kind in KINDS for _ in range(kills)]
    run.random.shuffle(orders)
    for done, kind in enumerate(orders, 1):
        await run.kill(kind)
        print(f"\r{done} of {len(orders)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


async def end(run: Soak) -> None:
    """Leaves nothing of it, whatever happened."""
    for view in await run.client.machines():
        with suppress(RayosError):
            await run.client.act(view.spec.name, "kill")
        await run.client.remove(view.spec.name)
    run.daemon.process.send_signal(signal.SIGTERM)
    if run.daemon.process.wait() != 0:
        run.tallies["daemon"].faults.append("the last daemon did not end well")


def main() -> int:
    """Returns 0 when nothing was lost and nothing is left."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="of each kind (default: 200)")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    options = parser.parse_args()
    print(f"seed {options.seed}")
    before = Leftovers.now()
    with open_private_daemon() as daemon:
        daemon.kept.append("")  # it is killed and ended in here
        folder = daemon.directory
        tallies = trio.run(soak, daemon, folder, options.kills, options.seed)
    subprocess.run(["rm", "-r", str(folder)], check=True)
    left = before.wait_gone()
    faults = [fault for tally in tallies.values() for fault in tally.faults] + [
        f"left: {what}" for what in left
    ]
    for kind in KINDS:
        told = sorted(tallies[kind].told_s)
        if told:
            median, worst = statistics.median(told), told[-1]
            print(
                f"{kind:<16} {len(told):>4} kills, {len(tallies[kind].faults)} faults, "
                f"known after {median * 1000:.0f} ms (median), {worst * 1000:.0f} ms (worst)"
            )
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
