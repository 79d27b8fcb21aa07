"""The command line: which command lives in which module, and how its outcome becomes an exit status.

Invariant: only the module of the command that was asked for is imported, so that `rayos --help` and the
shell's completion are quick.

Exit statuses are a table in `exit_status.py`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

# Command: (module, what it does). The module has `add_<command>(parser)` and `async def run_<command>(args, out)`.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "run": ("run", "boot a machine and take its console, or run a command in it"),
    "ps": ("machines", "list the machines"),
    "start": ("machines", "start a machine that was defined or stopped"),
    "stop": ("machines", "ask the guest to power down; end it after a time limit"),
    "kill": ("machines", "end a machine at once"),
    "pause": ("machines", "stop a guest's processors"),
    "resume": ("machines", "let a paused guest go on"),
    "reset": ("machines", "press the reset button"),
    "rm": ("machines", "remove a machine with its disks, TPM and logs"),
    "wait": ("machines", "wait until a machine is ready, running or stopped"),
    "console": ("console", "take a guest's console (Ctrl-] detaches)"),
    "logs": ("console", "show what a console has said"),
    "exec": ("agent", "run a command in the guest"),
    "cp": ("agent", "copy a file into or out of the guest"),
    "type": ("input", "type text on the guest's keyboard"),
    "input": ("input", "use mouse, tablet and touch screen; record and replay"),
    "key": ("input", "press keys together, such as ctrl-alt-delete"),
    "screenshot": ("display", "save what a monitor shows as a PNG"),
    "display": ("display", "show the monitors, resize one, wait for a change"),
    "events": ("events", "follow what happens"),
    "stats": ("stats", "show what the devices counted"),
    "leases": ("dhcp", "show the addresses that our DHCP gave out"),
    "qmp": ("qmp", "send QEMU a QMP command"),
    "grant": ("grant", "give a machine rights, for a time or until they are revoked"),
    "revoke": ("grant", "take a grant or rights away, from the running devices too"),
    "grants": ("grant", "show which machine may do what, by whose leave, until when"),
    "delegate": ("grant", "let a machine pass rights on to another"),
    "policy": ("policy", "show or change the rules of host, zones and machines; say what holds for one"),
    "zone": ("zone", "list, create, remove zones; put machines into them"),
    "scalability": (
        "scalability",
        "show how policy changes reach the workers, the machines, the zones; load, and moving workers",
    ),
    "security": ("security", "show grants, delegations, constraints and decisions beside their limits"),
    "token": ("token", "give others a narrow right to ask the daemon; narrow, look into, end it"),
    "audit": ("audit", "show, check or export the record of every decision"),
    "tpm": ("tpm", "show what a machine's TPM measured; write and check quotes"),
    "firewall": ("firewall", "show and change a machine's rules, live; explain and trace packets"),
    "dhcp": ("dhcp", "show our DHCP server, take a lease back, serve a link alone"),
    "disk": ("disk", "list a machine's disks; make one larger"),
    "net": ("net", "show a machine's network card, pull its cable or plug it in"),
    "fault": ("fault", "have a device fail on purpose: errors, losses, delays"),
    "doctor": ("doctor", "check this machine and say what to do"),
    "smoke": ("smoke", "boot a guest, check every device, print one JSON object"),
    "serve": ("serve", "run the daemon in the foreground"),
    "device": ("device", "show what devices did, change their limits live; serve one backend alone"),
    "optimize": ("optimize", "show where a machine's time goes, measure the checks, switch its level live"),
    "top": ("top", "watch the machines and their devices"),
    "shell": ("shell", "the same commands on a prompt, completed from what the daemon knows"),
    "completion": ("completion", "print the shell's completion script"),
}


#: The commands as `rayos --help` shows them; each stands in one group.
GROUPS: Final[dict[str, tuple[str, ...]]] = {
    "machines": ("run", "ps", "start", "stop", "kill", "pause", "resume", "reset", "rm", "wait"),
    "inside a guest": ("console", "logs", "exec", "cp", "type", "key", "input", "screenshot", "display"),
    "hardware": ("disk", "net", "device", "tpm", "fault", "qmp"),
    "network": ("firewall", "dhcp", "leases"),
    "rights": ("grant", "revoke", "grants", "delegate", "policy", "zone", "token", "security", "audit"),
    "figures": ("top", "stats", "events", "optimize", "scalability"),
    "this installation": ("doctor", "smoke", "serve", "shell", "completion"),
}


def _grouped() -> str:
    """The commands in their groups, a line each."""
    width = max(map(len, COMMANDS))
    lines = []
    for title, names in GROUPS.items():
        lines += ["", f"{title}:", *(f"  {name:<{width}}  {COMMANDS[name][1]}" for name in names)]
    return "\n".join(lines[1:])


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    """The parser; only the command `wanted` has its arguments (None: all have)."""
    parser = argparse.ArgumentParser(
        prog="rayos",
        description="Virtual machines whose devices are ours.",
        epilog=f"{_grouped()}\n\n`rayos COMMAND --help` says more. Every command takes --json.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON, also for errors")
    parser.add_argument("--token", metavar="TOKEN", help="ask by this token (also: RAYOS_TOKEN)")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help="one of those below")
    for name, (module, summary) in COMMANDS.items():
        # No abbreviations: `--cpu` would be `--cpus` until there is a `--cpu`.
        sub = commands.add_parser(name, description=f"{summary[0].upper()}{summary[1:]}.", allow_abbrev=False)
        sub.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON, also for errors"
        )
        if wanted in (None, name):
            getattr(import_module(f"rayos_vmm.cli.{module}"), f"add_{name}")(sub)
    return parser


def _complete() -> None:
    import argcomplete

    words = os.environ.get("COMP_LINE", "").split()
    wanted = next((word for word in words[1:] if word in COMMANDS), None)
    argcomplete.autocomplete(_parser(wanted or ""))


def _print_version() -> int:
    from importlib.metadata import version

    print(f"rayos {version('rayos-vmm')}")
    return 0


def _translated(words: list[str]) -> list[str]:
    """`vm VERB …` is `VERB …`, and `vm list` is `ps`, for those who look for the noun first."""
    if words[:1] != ["vm"]:
        return words
    return ["ps" if word == "list" else word for word in words[1:2]] + words[2:]


def open_standard_streams() -> None:
    """Opens /dev/null for each closed standard stream (`<&-`), before anything else gets its number."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


def main(argv: Sequence[str] | None = None) -> int:
    """The command of `argv` (without the program's name); returns the exit status."""
    open_standard_streams()
    if "_ARGCOMPLETE" in os.environ:
        _complete()
    words = _translated(list(sys.argv[1:] if argv is None else argv))
    plain = [word for word in words if word != "--json"]
    if plain[:2] == ["device", "serve"]:  # has its own parser: see `rayos device serve --help`
        from rayos_devices.serve import main as serve_device

        return serve_device(plain[2:])
    if plain[:2] == ["dhcp", "serve"]:  # likewise; its events are JSON lines in any case
        from rayos_vmm.cli.dhcp import serve

        return serve(plain[2:])
    wanted = next((word for word in words if not word.startswith("-")), "")
    parser = _parser(wanted)
    # What stands behind `--` belongs to the guest.
    cut = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:cut])
    if args.version:
        return _print_version()
    if args.token is not None:
        os.environ["RAYOS_TOKEN"] = args.token
    if args.command is None:
        parser.print_help()
        return 0
    if args.command == "shell":
        from rayos_vmm.cli.shell import main as shell

        return shell(args, main, _parser)
    args.words = words[cut + 1 :] if cut < len(words) else None

    from rayos_vmm.cli.outcome import run_command

    module, _ = COMMANDS[args.command]
    return run_command(getattr(import_module(f"rayos_vmm.cli.{module}"), f"run_{args.command}"), args)
