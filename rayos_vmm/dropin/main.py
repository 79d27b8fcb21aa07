"""`rayos-qemu`: QEMU's command line, and a process whose life, exit status, signals and bytes are QEMU's.

Invariant: the machine lives as long as this process and no longer. What QEMU would say on standard error is said there;
one line more tells what became of the options.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Final

import trio

from rayos_vmm.cli.attended import Interrupted, Life, clean_up, raise_signals
from rayos_vmm.cli.main import open_standard_streams
from rayos_vmm.client.client import Client
from rayos_vmm.client.daemon import ensure_daemon
from rayos_vmm.config.load import resolve_paths, to_spec
from rayos_vmm.dropin.command_line import Unreadable
from rayos_vmm.dropin.ends import raw_input
from rayos_vmm.dropin.plan import Plan
from rayos_vmm.dropin.session import Session
from rayos_vmm.dropin.translate import translate
from rayos_vmm.errors import RayosError, one_error
from rayos_vmm.machine.view import ExitReason, VmView

FAILED: Final = 1
#: Ends that QEMU does not call a failure: the guest, a signal or a monitor asked for them.
_GOOD: Final = frozenset(
    {
        ExitReason.POWERED_OFF,
        ExitReason.RESET,
        ExitReason.TRIPLE_FAULT,
        ExitReason.STOPPED,
        ExitReason.KILLED,
        ExitReason.PASSED,
        ExitReason.PANIC,
    }
)
_HELP: Final = """\
usage: {program} [QEMU's options] [disk_image]

QEMU's own command line (qemu-system-x86_64(1)) for a machine of RayOS VMM: what it knows becomes our devices, what it
does not know goes to QEMU as it is.

  -explain   print which option became what, and exit
  -q         do not print the line on standard error that says so in short

docs/migrating.md has the table, option by option. Ours are, among others:

-machine -cpu -smp -m -rtc -icount -kernel -initrd -append -bios -pflash -drive -hda -cdrom -fda -blockdev -device
-netdev -nic -net -serial -debugcon -chardev -nographic -vga -monitor -qmp -mon -no-reboot -no-shutdown -action
-snapshot -daemonize -pidfile -d -D -S -watchdog
"""


def status_of(view: VmView) -> int:
    """QEMU's exit status for an end."""
    if view.guest_exit_code is not None:
        return view.guest_exit_code
    return 0 if view.exit_reason in _GOOD else FAILED


def _say(program: str, text: str) -> None:
    print(f"{program}: {text}", file=sys.stderr, flush=True)


async def _until_end(client: Client, plan: Plan, program: str, ready_fd: int) -> int:
    name = f"qemu-{os.getpid()}"
    spec = resolve_paths(to_spec(name, {**plan.table, "name": name}, prefix=program), Path.cwd())
    await client.create(spec)
    try:
        async with client.hold(name) as views, trio.open_nursery() as nursery:
            nursery.start_soon(raise_signals)
            life = Life(views, await anext(aiter(views)))
            nursery.start_soon(life.follow)
            session = Session(client, name, plan, life)
            await session.open(nursery)
            await client.act(name, "start")
            if plan.starts_paused:
                await client.act(name, "pause")
            if ready_fd >= 0:
                _let_go(ready_fd)
            view = await life.end()
            await session.close()
            if plan.log_path is not None:
                await _copy_log(client, name, plan.log_path)
            nursery.cancel_scope.cancel()
    finally:
        await clean_up(client, name, is_removed=True)
    status = status_of(view)
    is_news = status or view.exit_reason in (ExitReason.TRIPLE_FAULT, ExitReason.PANIC)
    if is_news and view.guest_exit_code is None and not plan.is_quiet:
        _say(program, view.reason)
    return status


def _let_go(ready_fd: int) -> None:
    """The parent ends, and whoever reads its output is done."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.write(ready_fd, b"\0")
    os.close(ready_fd)


async def _copy_log(client: Client, name: str, path: str) -> None:
    """QEMU's log, which is the service's until the machine is forgotten."""
    source = Path((await client.info()).state) / "vm" / name / "qemu.log"
    with suppress(FileNotFoundError):
        await trio.to_thread.run_sync(shutil.copyfile, source, path)


async def _run(plan: Plan, program: str, ready_fd: int) -> int:
    client = await ensure_daemon([])
    with ExitStack() as stack:
        if any(where.kind == "stdio" for where in plan.lines.values()):
            is_mux = any(where.is_mux for where in plan.lines.values())
            stack.enter_context(raw_input(has_signals=not is_mux))
        if plan.pid_file is not None:
            Path(plan.pid_file).write_text(f"{os.getpid()}\n")  # noqa: ASYNC240 (a few bytes, before anything runs)
            stack.callback(Path(plan.pid_file).unlink, missing_ok=True)
        try:
            with one_error():
                return await _until_end(client, plan, program, ready_fd)
        except* Interrupted as group:
            number = _number(group)
            _say(program, f"terminating on signal {number}")
    return 0


def _number(error: BaseException) -> int:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error.number if isinstance(error, Interrupted) else 0


def _in_background() -> int:
    """Forks, and returns in the child; the parent ends once something is written to what this returns."""
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        os._exit(0 if os.read(reader, 1) else FAILED)
    os.close(reader)
    os.setsid()
    return writer


def main(argv: Sequence[str] | None = None) -> int:
    """The drop-in; `argv` without the program's name. Returns QEMU's exit status."""
    open_standard_streams()
    program = Path(sys.argv[0]).name
    words = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "-help", "--help"} & set(words):
        print(_HELP.format(program=program), end="")
        return 0
    if {"-version", "--version"} & set(words):
        print("QEMU emulator version 11.1.3 (rayos-qemu)")
        return 0
    try:
        plan = translate(words, can_network=os.geteuid() == 0)
        if plan.is_explained:
            print(plan.explain())
            return 0
        if not plan.is_quiet:
            _say(program, plan.in_one_line())
        ready_fd = _in_background() if plan.is_daemon else -1
        return trio.run(partial(_run, plan, program, ready_fd))
    except Unreadable as error:
        _say(program, str(error))
    except RayosError as error:
        _say(program, error.message + (f" (try: {error.hint})" if error.hint else ""))
    except KeyboardInterrupt:
        return 0
    return FAILED
