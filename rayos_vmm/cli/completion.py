"""Tab completion: the shell's script, and the names of the machines."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any, Final

from rayos_vmm.cli.output import Output

DAEMON_TIMEOUT_S: Final = 1.0


def machine_names(**_arguments: Any) -> list[str]:
    """The machines that a daemon knows; none when none answers."""
    import trio

    from rayos_vmm.client.daemon import the_daemon
    from rayos_vmm.errors import RayosError

    async def names() -> list[str]:
        with trio.move_on_after(DAEMON_TIMEOUT_S):
            return [view.spec.name for view in await the_daemon().machines()]
        return []

    try:
        return trio.run(partial(names))
    except RayosError:
        return []


def add_name(parser: argparse.ArgumentParser, **options: Any) -> None:
    """The argument that names a machine, completed by the shell."""
    action = parser.add_argument("name", metavar="NAME", help="the machine's name", **options)
    action.completer = machine_names  # type: ignore[attr-defined]  # argcomplete's convention


def add_completion(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help='use: eval "$(rayos completion bash)"')


async def run_completion(args: argparse.Namespace, out: Output) -> None:
    from argcomplete.shell_integration import shellcode

    code = shellcode(["rayos"], shell=args.shell)
    out.result({"shell": args.shell, "script": code}, code)
