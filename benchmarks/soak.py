"""Sixty-four real guests at once, in sixteen zones: `make soak-64`; the figures go into docs/performance.md.

Boots them on a daemon of its own, a few at a time; changes the policy of all and waits for every worker's word; asks
every guest for an answer; kills the daemon with SIGKILL, and counts what the next one takes over: machines, addresses,
grants, the audit record. Fails when one is lost. 64 guests of 96 MiB want 10 GiB of memory and, under TCG, 350 s of
CPU. Their initramfs is ours without the modules that these guests never load: in 96 MiB there is no room for both
copies of the whole one while the kernel unpacks it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from benchmarks.report import publish, table
from rayos_images import initramfs
from rayos_images import kernel as kernels
from rayos_images.cache import Cache
from rayos_vmm.client.client import Client
from rayos_vmm.client.daemon import log_path, start_daemon
from rayos_vmm.config.spec import Gpu, VmSpec
from rayos_vmm.paths import Paths, default_paths
from rayos_vmm.qemu.platform import APPEND

ZONES: Final = 16
BOOT_LIMIT_S: Final = 900.0
ASK_LIMIT_S: Final = 300.0
#: What is kept free for the rest of the host.
RESERVE_BYTES: Final = 2 << 30
GUEST_BYTES: Final = 160 << 20


#: Parts of paths of modules that a guest with a disk, a card and a console does without.
UNUSED: Final = (
    "/fs/",
    "/gpu/",
    "/vmw_vsock/",
    "/8021q/",
    "/802/",
    "/cdrom/",
    "loop.ko",
    "tun.ko",
    "balloon",
)


class Lost(Exception):
    """Something did not survive; the text says what."""


@dataclass
class Soak:
    """One run on a daemon that lives in `paths`; `rows` are the figures so far."""

    paths: Paths
    config: Path
    kernel: Path
    initrd: Path
    count: int
    rows: list[list[str]] = field(default_factory=list)
    daemon: subprocess.Popen[bytes] | None = None
    revision: int = 0  # of the policy before the change

    @property
    def client(self) -> Client:
        return Client(self.paths.api_socket)

    @property
    def names(self) -> list[str]:
        return [f"soak{index:02}" for index in range(self.count)]

    def note(self, what: str, figure: str) -> None:
        self.rows.append([what, figure])
        print(f"{what}: {figure}", flush=True)

    async def get(self, path: str) -> Any:
        return msgspec.json.decode(await self.client.request("GET", path))

    async def start_daemon(self) -> float:
        """Seconds until it answers, which is after it has taken everything over."""
        started = time.monotonic()
        self.daemon = await start_daemon(self.paths, ["--config", str(self.config)])
        return time.monotonic() - started

    async def each(self, act: Callable[[str], Awaitable[None]], at_once: int) -> list[float]:
        """`act` on every machine, `at_once` of them at a time; the seconds that each took."""
        seconds: list[float] = []
        limiter = trio.CapacityLimiter(at_once)

        async def one(name: str) -> None:
            async with limiter:
                started = time.monotonic()
                await act(name)
                seconds.append(time.monotonic() - started)

        async with trio.open_nursery() as nursery:
            for name in self.names:
                nursery.start_soon(one, name)
        return seconds

    async def boot(self, at_once: int) -> None:
        async def one(name: str) -> None:
            zone = f"zone{int(name[4:]) % ZONES:02}"
            spec = VmSpec(
                name=name,
                kernel=str(self.kernel),
                initrd=str(self.initrd),
                append=f"{kernels.command_line(has_display=False)} {APPEND}",
                memory="96MiB",
                gpu=Gpu(enabled=False),
                tpm=False,
                zone=zone,
            )
            await self.client.create(spec, start=True)
            await self.client.wait(name, "ready", timeout_s=BOOT_LIMIT_S)
            print(f"{name} is ready", flush=True)

        for index in range(ZONES):
            await self.client.request("POST", "/zones", body={"zone": f"zone{index:02}"})
        before, started = cpu_seconds(), time.monotonic()
        seconds = await self.each(one, at_once)
        cpu = cpu_seconds() - before
        self.note(
            f"{self.count} boots, {at_once} at a time",
            f"{time.monotonic() - started:.0f} s ({cpu:.0f} s of the machine's CPU), each {spread(seconds)}",
        )

    async def ask_all(self) -> None:
        """Every guest answers, by its agent."""

        async def one(name: str) -> None:
            result = await self.client.exec(name, "echo $((6*7))", timeout_s=ASK_LIMIT_S)
            if result.stdout.strip() not in (b"42", "42"):
                raise Lost(f"{name} answered {result.stdout!r}")

        self.note("a command in every guest", spread(await self.each(one, 8)))

    async def change_policy(self) -> None:
        """One rule for all: seconds until every worker has said that it applied it."""
        policy = await self.get("/policy")
        self.revision, document = policy["revision"], policy["document"]
        rule = {"kind": "firewall", "action": "deny", "protocol": "tcp", "ports": 25}
        host = document.setdefault("host", {})
        host["rules"] = {**host.get("rules", {}), "no-mail": rule}
        started = time.monotonic()
        changed = msgspec.json.decode(
            await self.client.request("PUT", "/policy", body={"document": document, "reason": "soak"})
        )
        with trio.fail_after(60):
            while True:
                found = await self.get("/scalability")
                behind = [
                    entry["vm"]
                    for entry in found["vms"]
                    if entry["applied"] is None or entry["applied"] < changed["revision"]
                ]
                if not behind:
                    break
                await trio.sleep(0.005)
        self.note(
            f"one policy change, all {len(found['vms'])} workers in {len(found['zones'])} zones applied it",
            f"{(time.monotonic() - started) * 1000:.0f} ms as the API's caller sees it",
        )
        self.note(
            "the same, from the service's word to the workers'",
            f"median {found['status']['broadcast_median_ms']} ms",
        )
        if len(found["vms"]) != self.count or len(found["zones"]) != ZONES:
            raise Lost(f"{len(found['vms'])} machines in {len(found['zones'])} zones are known to the policy")

    async def grant(self) -> None:
        for name in self.names:
            body = {"capabilities": ["CAP_GPU"], "ttl_s": 3600, "reason": "soak"}
            await self.client.request("POST", f"/vms/{name}/grants", body=body)

    async def state(self) -> dict[str, Any]:
        """Returns the state that must survive a kill of the daemon."""
        views = await self.client.machines()
        grants = (await self.get("/grants"))["grants"]
        leases = await self.client.leases()
        return {
            "machines": {
                view.spec.name: (view.pid, view.address) for view in views if view.state.value == "running"
            },
            "grants": sorted((grant["vm"], grant["id"]) for grant in grants),
            "leases": sorted(lease.address for lease in leases),
            "revision": (await self.get("/policy"))["revision"],
        }

    async def kill_daemon(self) -> None:
        before = await self.state()
        if len(before["machines"]) != self.count:
            raise Lost(f"{len(before['machines'])} of {self.count} run")
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGKILL)
        await trio.to_thread.run_sync(self.daemon.wait)
        seconds = await self.start_daemon()
        print(f"the next daemon answers after {seconds:.1f} s", flush=True)
        after = await self.state()
        different = [key for key in before if before[key] != after[key]]
        if different:
            raise Lost(
                f"after kill -9 of the daemon: {[(key, before[key], after[key]) for key in different]}"
            )
        audit = await self.get("/audit/verify")
        if not audit["ok"]:
            raise Lost(f"the audit record: {audit}")
        self.note(
            f"daemon killed (-9), the next has {len(after['machines'])} of {self.count}",
            f"{seconds:.1f} s; {len(after['leases'])} leases, {len(after['grants'])} grants, audit whole",
        )

    async def latency(self) -> None:
        seconds = []
        for _ in range(20):
            started = time.monotonic()
            await self.client.machines()
            seconds.append(time.monotonic() - started)
        self.note("GET /vms", f"{statistics.median(seconds) * 1000:.0f} ms")

    def note_memory(self) -> None:
        """Of the daemon and of the host."""
        assert self.daemon is not None
        status = Path(f"/proc/{self.daemon.pid}/status").read_text()
        rss = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
        fds = len(os.listdir(f"/proc/{self.daemon.pid}/fd"))  # noqa: PTH208
        self.note("daemon", f"{int(rss) >> 10} MiB, {fds} descriptors")
        self.note("memory still available", f"{available_bytes() / (1 << 30):.1f} GiB")

    async def run(self, at_once: int) -> None:
        before = available_bytes()
        await self.start_daemon()
        try:
            await self.boot(at_once)
            self.note("memory", f"{(before - available_bytes()) / self.count / (1 << 20):.0f} MiB a guest")
            await self.ask_all()
            await self.grant()
            await self.change_policy()
            await self.kill_daemon()
            await self.change_back()
            await self.latency()
            await self.ask_all()
            self.note_memory()
        finally:
            with trio.CancelScope(shield=True):
                await self.end()

    async def change_back(self) -> None:
        """The new daemon's workers take a revision too."""
        await self.client.request("POST", "/policy/rollback", body={"revision": self.revision})

    async def end(self) -> None:
        async def one(name: str) -> None:
            view = known.get(name)
            if view is not None and view.pid is not None:
                await self.client.act(name, "kill")
            if view is not None:
                await self.client.remove(name)

        known = {view.spec.name: view for view in await self.client.machines()}
        started = time.monotonic()
        await self.each(one, 8)
        print(f"ended in {time.monotonic() - started:.0f} s", flush=True)
        if self.daemon is not None:
            self.daemon.send_signal(signal.SIGTERM)
            await trio.to_thread.run_sync(self.daemon.wait)


def small_guest(directory: Path) -> tuple[Path, Path]:
    """Our kernel, and an initramfs with few modules, written to `directory`."""
    cache = Cache(default_paths().cache)
    kernel = kernels.build(cache)
    busybox = initramfs.find_busybox(cache)
    names = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    modules = {
        str(path.relative_to(kernel.modules)): path.read_bytes()
        for path in sorted(kernel.modules.rglob("*"))
        if path.is_file() and not any(part in f"/{path.relative_to(kernel.modules)}" for part in UNUSED)
    }
    scripts = {path: (initramfs.GUEST / name).read_bytes() for path, name in initramfs.SCRIPTS.items()}
    initrd = directory / "initramfs.cpio"
    initrd.write_bytes(initramfs.pack(busybox.read_bytes(), names, kernel.release, modules, scripts))
    return kernel.vmlinux, initrd


def spread(seconds: Sequence[float]) -> str:
    return f"median {statistics.median(seconds):.1f} s, at most {max(seconds):.1f} s"


def cpu_seconds() -> float:
    """Of all processors of this machine, not idle, since it started (proc_stat(5))."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    return (sum(fields[:8]) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--at-once", type=int, default=4, help="boots at a time")
    parser.add_argument("--no-append", action="store_true", help="leave docs/performance.md alone")
    arguments = parser.parse_args()
    wanted = arguments.count * GUEST_BYTES + RESERVE_BYTES
    if available_bytes() < wanted:
        sys.exit(f"{arguments.count} guests want {wanted >> 20} MiB, {available_bytes() >> 20} are available")
    with tempfile.TemporaryDirectory(prefix="soak", dir="/tmp") as name:
        directory = Path(name)
        paths = replace(default_paths(), state=directory / "s", runtime=directory / "r")
        config = directory / "rayos.toml"
        config.write_text('[service]\nbridge = "raysoak"\n')
        soak = Soak(paths, config, *small_guest(directory), arguments.count)
        try:
            trio.run(soak.run, arguments.at_once)
        except BaseException:
            if log_path(paths).exists():
                shutil.copy(log_path(paths), "/tmp/soak-daemon.log")
                words = Counter(log_path(paths).read_text().splitlines()[-20:])
                print(*words, sep="\n", file=sys.stderr)
            raise
    publish(
        f"{arguments.count} guests at once",
        table(["what", "figure"], soak.rows),
        append=not arguments.no_append,
    )


if __name__ == "__main__":
    main()
