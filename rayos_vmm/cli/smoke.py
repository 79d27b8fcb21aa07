"""`rayos smoke`: does all of it work on this machine? One JSON object; nothing stays behind."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from rayos_vmm.cli.arguments import duration
from rayos_vmm.cli.output import Output
from rayos_vmm.cli.progress import Progress, open_progress
from rayos_vmm.errors import RayosError
from rayos_vmm.testing.checks import CHECKS, Check
from rayos_vmm.testing.daemon import PrivateDaemon, open_daemon
from rayos_vmm.testing.guest import Guest
from rayos_vmm.testing.leftovers import Leftovers
from rayos_vmm.testing.open import open_guest

CHECK_TIMEOUT_S: Final = 60.0


def add_smoke(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--timeout", type=duration, default=300.0, help="for the boot (default: 300s)")
    parser.add_argument(
        "--artifacts", type=Path, metavar="DIR", help="keep consoles and the last frame there"
    )


async def _check(check: Check, guest: Guest, daemon: PrivateDaemon) -> dict[str, Any]:
    started = time.monotonic()
    try:
        with trio.fail_after(CHECK_TIMEOUT_S):
            found = {"ok": True, **await check(guest, daemon)}
    except (AssertionError, RayosError, OSError, trio.TooSlowError) as error:
        found = {"ok": False, "error": str(error) or f"took longer than {CHECK_TIMEOUT_S:g} s"}
    return {**found, "seconds": round(time.monotonic() - started, 3)}


async def _in_the_guest(
    guest: Guest, daemon: PrivateDaemon, report: dict[str, Any], progress: Progress
) -> None:
    view = await guest.view()
    report["boot"] = {"ok": view.is_ready, **view.boot}
    for name, check in CHECKS.items():
        progress.stage(f"checking: {name}")
        report[name] = await _check(check, guest, daemon)
        progress.done(f"{name:<10} {'ok' if report[name]['ok'] else 'FAILED: ' + report[name]['error']}")


async def _with_a_daemon(args: argparse.Namespace, report: dict[str, Any], progress: Progress) -> None:
    async with open_daemon() as daemon:
        info = await daemon.client.info()
        report["qemu"], report["accelerator"] = (
            msgspec.to_builtins(info.qemu),
            msgspec.to_builtins(info.accelerator),
        )
        progress.stage("booting a guest")
        async with open_guest(daemon, disk="64MiB", timeout=args.timeout, name="smoke") as guest:
            await _in_the_guest(guest, daemon, report, progress)
            if args.artifacts is not None:
                await guest.save_artifacts(args.artifacts)


async def run_smoke(args: argparse.Namespace, out: Output) -> int:
    started = time.monotonic()
    report: dict[str, Any] = {"ok": False, "boot": {"ok": False}}
    before = Leftovers.now()
    async with open_progress("starting a daemon", out) as progress:
        try:
            await _with_a_daemon(args, report, progress)
        except (RayosError, AssertionError) as error:
            report["error"] = str(error)
    left = await before.appeared_since()
    report["clean"] = {"ok": not left, "left": left}
    report["seconds"] = round(time.monotonic() - started, 3)
    report["ok"] = "error" not in report and all(
        report.get(name, {}).get("ok") for name in ("boot", *CHECKS, "clean")
    )
    Output(is_json=True).result(report)
    return 0 if report["ok"] else 1
