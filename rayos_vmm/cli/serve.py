"""`rayos serve`: the daemon."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Final

import trio

from rayos_vmm.api.prometheus import parse_address, serve_prometheus
from rayos_vmm.api.server import serve_api
from rayos_vmm.cli.output import Output
from rayos_vmm.client.daemon import KEEP, report_error, report_ready
from rayos_vmm.config.load import Config, load
from rayos_vmm.errors import RayosError, one_error
from rayos_vmm.host.process import close_inherited
from rayos_vmm.paths import default_paths
from rayos_vmm.service.service import Service, open_service

#: The daemon may have so many open; with 64 guests it had 1115.
DESCRIPTORS: Final = 65536


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "environment: RAYOS_STATE_DIR (disks, records, logs), RAYOS_RUNTIME_DIR (sockets), RAYOS_CACHE_DIR (kernels,\n"
        "QEMU); docs/config.md has the keys of the file."
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file with a [service] table")
    parser.add_argument(
        "--exit-when-idle", action="store_true", help="end when no machine runs and nobody asks"
    )
    parser.add_argument(
        "--metrics-listen",
        metavar="ADDRESS:PORT",
        help="also serve /metrics (Prometheus) there, such as 127.0.0.1:9100; everybody on this host may read it",
    )
    parser.add_argument("--report-fd", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--owner-fd", type=int, default=-1, help=argparse.SUPPRESS)


class Owner:
    """Whoever this daemon lives for: the writers of a pipe."""

    def __init__(self, fd: int) -> None:
        os.set_inheritable(fd, False)
        os.set_blocking(fd, False)
        self._fd = fd
        self.is_gone = False

    async def wait_gone(self) -> None:
        """Returns when the last writer is gone; never when it said that the daemon is to stay."""
        await trio.lowlevel.wait_readable(self._fd)
        if os.read(self._fd, 1) == KEEP:
            await trio.sleep_forever()
        self.is_gone = True


async def _wait_for_the_end(service: Service, idle_s: float | None, owner: Owner | None) -> None:
    async with trio.open_nursery() as nursery:

        async def until_alone(owner: Owner) -> None:
            await owner.wait_gone()
            await service.machines.end_all()
            nursery.cancel_scope.cancel()

        if owner is not None:
            nursery.start_soon(until_alone, owner)

        async def until_idle(seconds: float) -> None:
            await service.wait_idle(seconds)
            nursery.cancel_scope.cancel()

        if idle_s is not None:
            nursery.start_soon(until_idle, idle_s)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break


async def _serve(args: argparse.Namespace, out: Output) -> None:
    config = load(args.config) if args.config is not None else Config()
    paths = default_paths()
    metrics = parse_address(args.metrics_listen) if args.metrics_listen else None
    idle_s = config.service.idle_exit_s if args.exit_when_idle else None
    owner = Owner(args.owner_fd) if args.owner_fd >= 0 else None
    if args.report_fd >= 0:
        # Whoever waits for its end must not wait for the processes that we start.
        os.set_inheritable(args.report_fd, False)
    with one_error():
        async with (
            open_service(config.service, paths, audit=config.audit) as service,
            trio.open_nursery() as nursery,
        ):
            shutdown = partial(_wait_for_the_end, service, idle_s, owner)
            shared = Path(config.service.shared_socket) if config.service.shared_socket else None

            async def api(task_status: trio.TaskStatus[None]) -> None:
                await serve_api(
                    service, paths.api_socket, shared=shared, shutdown=shutdown, task_status=task_status
                )
                nursery.cancel_scope.cancel()

            await nursery.start(api)
            if metrics is not None:
                port = await nursery.start(serve_prometheus, service, *metrics)
                out.note(f"metrics on http://{args.metrics_listen.rpartition(':')[0]}:{port}/metrics")
            out.note(f"rayos serves on {paths.api_socket} (Ctrl-C ends it; guests go on)")
            if args.report_fd >= 0:
                report_ready(args.report_fd)
    if owner is not None and owner.is_gone:
        shutil.rmtree(paths.state.parent, ignore_errors=True)


def _allow_descriptors() -> None:
    """A running machine takes up to 18 of ours, and many systems start programs with room for 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


async def run_serve(args: argparse.Namespace, out: Output) -> None:
    close_inherited(*(fd for fd in (args.report_fd, args.owner_fd) if fd >= 0))
    os.umask(0o077)  # whatever it or a process of it makes is its owner's alone
    _allow_descriptors()
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if args.report_fd >= 0:
        os.set_inheritable(args.report_fd, False)
    try:
        await _serve(args, out)
    except RayosError as error:
        if args.report_fd >= 0:
            report_error(args.report_fd, error)
        raise
