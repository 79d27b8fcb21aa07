"""`rayos doctor`: what this machine has, what it lacks, and what to do about it. Changes
nothing but the cache (the accelerator is tried with a kernel).

A finding is `ok` (as good as it gets), `limited` (works, with less) or `missing` (does not work).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Final, Literal

import msgspec
import trio

from rayos_images import accel, qemu
from rayos_images.cache import Cache
from rayos_images.errors import ImageError
from rayos_images.qemu_probe import VHOST_USER_DEVICES
from rayos_vmm.cli.output import Output
from rayos_vmm.cli.progress import open_progress
from rayos_vmm.cli.verify import verify
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.config.units import format_size
from rayos_vmm.errors import RayosError
from rayos_vmm.host import cgroup, landlock
from rayos_vmm.host.system_calls import system_calls
from rayos_vmm.paths import Paths, default_paths
from rayos_vmm.worker import seccomp

PYTHON_MINIMUM: Final = (3, 11)
# The cache holds QEMU, kernels and initramfs (250 MiB); a guest's disks are sparse.
SPACE_MINIMUM_BYTES: Final = 1 << 30
_MARK: Final = {"ok": "ok     ", "limited": "limited", "missing": "MISSING"}


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at: what it is like, and what to do (empty when nothing)."""

    name: str
    state: Literal["ok", "limited", "missing"]
    found: str
    advice: str = ""


def add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Ends with status 1 if something is missing."
    parser.add_argument(
        "--verify",
        action="store_true",
        help="also look at every process of the running machines, and name what its confinement lacks",
    )


def _python() -> Iterator[Finding]:
    seen = ".".join(str(part) for part in sys.version_info[:3])
    is_new = sys.version_info[:2] >= PYTHON_MINIMUM
    wanted = ".".join(str(part) for part in PYTHON_MINIMUM)
    yield Finding(
        name="python",
        state="ok" if is_new else "missing",
        found=f"{seen} at {sys.executable}",
        advice="" if is_new else f"install Python {wanted} or newer",
    )


def _packages() -> Iterator[Finding]:
    missing = []
    for requirement in requires("rayos-vmm") or []:
        if "extra ==" in requirement:
            continue
        name = requirement.split(";")[0].split(">")[0].split("=")[0].split("[")[0].strip()
        try:
            version(name)
        except PackageNotFoundError:
            missing.append(name)
    yield Finding(
        name="python packages",
        state="missing" if missing else "ok",
        found=f"without {', '.join(missing)}" if missing else "all there",
        advice="run `make setup`" if missing else "",
    )


def _qemu(cache: Cache) -> Iterator[Finding]:
    try:
        found = qemu.find(cache, provision=False)
    except ImageError as error:
        advice = "the first `rayos run` fetches one (28 MB), or do it now: `make images`"
        yield Finding(name="qemu", state="limited", found=str(error), advice=advice)
        return
    yield Finding(
        name="qemu",
        state="limited" if found.missing else "ok",
        found=f"{found.version} ({found.source})",
        advice="the first `rayos run` fetches one that can do all" if found.missing else "",
    )
    for kind in VHOST_USER_DEVICES:
        has = found.has(kind)
        yield Finding(
            name=f"  {kind}",
            state="ok" if has else "limited",
            found="can be started" if has else "cannot be started by this QEMU",
        )
    try:
        accelerator = accel.probe(cache, found)
    except ImageError as error:
        yield Finding(
            name="accelerator", state="limited", found=f"not known yet: {error}", advice="run `make images`"
        )
        return
    is_fast = accelerator.name == "kvm"
    yield Finding(
        name="accelerator",
        state="ok" if is_fast else "limited",
        found=f"{accelerator.name}: {accelerator.reason}",
        advice="" if is_fast else "nothing to do: guests run under TCG, slower",
    )


def _privileges() -> Iterator[Finding]:
    is_root = os.geteuid() == 0
    yield Finding(
        name="root",
        state="ok" if is_root else "limited",
        found=f"uid {os.geteuid()}",
        advice="" if is_root else "guests need --no-net: taps and bridges want root",
    )
    tun = Path("/dev/net/tun")
    try:
        os.close(os.open(tun, os.O_RDWR | os.O_CLOEXEC))
        yield Finding(name="tun", state="ok", found=f"{tun} can be opened")
    except OSError as error:
        advice = "`modprobe tun`" if not tun.exists() else "run as root, or guests need --no-net"
        yield Finding(name="tun", state="limited", found=f"{tun}: {error.strerror}", advice=advice)


def _sandbox() -> Iterator[Finding]:
    """Checks the layers that hold a worker or QEMU which a guest has taken over, and names each that is missing."""
    is_root = os.geteuid() == 0
    yield Finding(
        name="sandbox: user, namespaces",
        state="ok" if is_root else "limited",
        found="each machine gets its own" if is_root else "machines run as you, among your processes",
        advice="" if is_root else "run the service as root to separate machines from each other",
    )
    version = landlock.abi()
    is_whole = version >= landlock.WHOLE_ABI
    yield Finding(
        name="sandbox: Landlock",
        state="ok" if is_whole else "limited",
        found=f"ABI {version}" if version else "not in this kernel",
        advice="" if is_whole else f"Linux 6.12 has ABI {landlock.WHOLE_ABI}, which also scopes signals",
    )
    try:
        system_calls()
        yield Finding(name="sandbox: system calls", state="ok", found=f"{seccomp.COUNT} allowed")
    except OSError as error:
        yield Finding(name="sandbox: system calls", state="limited", found=f"not filtered: {error.strerror}")


def _groups() -> Iterator[Finding]:
    trouble = cgroup.missing()
    yield Finding(
        name="control groups",
        state="limited" if trouble else "ok",
        found=trouble or "weight, processors, memory and tasks of each machine",
        advice="machines share processors by the scheduler alone; quota.cpus and quota.host_memory are refused"
        if trouble
        else "",
    )


def _programs() -> Iterator[Finding]:
    for program, package, what in (
        ("swtpm", "swtpm", "guests need --no-tpm"),
        ("nft", "nftables", "the kernel guards no tap against forged frames, the device workers alone do"),
        ("dpkg-deb", "dpkg", "the guest's kernel cannot be unpacked"),
    ):
        path = shutil.which(program)
        yield Finding(
            name=program,
            state="ok" if path else "limited",
            found=path or f"not installed: {what}",
            advice="" if path else f"apt-get install {package}",
        )


def _space(paths: Paths) -> Iterator[Finding]:
    for name, path in (("cache", paths.cache), ("state", paths.state), ("runtime", paths.runtime)):
        there = next(one for one in (path, *path.parents) if one.exists())
        free = shutil.disk_usage(there).free
        is_writable = os.access(there, os.W_OK)
        is_enough = name == "runtime" or free >= SPACE_MINIMUM_BYTES
        yield Finding(
            name=f"{name} folder",
            state="ok" if is_writable and is_enough else "missing",
            found=f"{path}, {free / (1 << 30):.1f} GiB free" + ("" if is_writable else ", not writable"),
            advice=""
            if is_writable and is_enough
            else f"make room ({format_size(SPACE_MINIMUM_BYTES)}), or set RAYOS_{name.upper()}_DIR",
        )


async def _daemon(paths: Paths) -> Finding:
    try:
        count = len(await the_daemon().machines())
    except RayosError:
        return Finding(name="daemon", state="ok", found=f"none on {paths.api_socket}; `rayos run` starts one")
    return Finding(name="daemon", state="ok", found=f"answers on {paths.api_socket}, {count} machines")


async def _verified(paths: Paths) -> list[Finding]:
    """The processes of running machines. Without root their confinement is what it can be, and no fault of theirs."""
    short: Literal["limited", "missing"] = "missing" if os.geteuid() == 0 else "limited"
    try:
        looked = await verify(the_daemon(), paths)
    except RayosError:  # no daemon, no machines
        return []
    return [
        Finding(
            name=name,
            state=short if faults else "ok",
            found="; ".join(faults) or found,
            advice="end that machine, and look at its logs: RAYOS_SANDBOX=off switches the sandbox off"
            if faults
            else "",
        )
        for name, found, faults in looked
    ]


async def run_doctor(args: argparse.Namespace, out: Output) -> int:
    paths = default_paths()
    cache = Cache(paths.cache)
    looks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _packages,
        lambda: _qemu(cache),
        _privileges,
        _sandbox,
        _groups,
        _programs,
        lambda: _space(paths),
    ]
    findings: list[Finding] = []
    async with open_progress("looking at this machine", out):
        for look in looks:
            findings += await trio.to_thread.run_sync(list, look())
        findings.append(await _daemon(paths))
        if args.verify:
            findings += await _verified(paths)
    is_usable = all(finding.state != "missing" for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{_MARK[finding.state]}  {finding.name:<32} {finding.found}")
        if finding.advice:
            lines.append(f"{'':<9}{'':<32} → {finding.advice}")
    out.result({"ok": is_usable, "findings": findings}, "\n".join(lines))
    return 0 if is_usable else 1
