"""Commands and files inside the guest, by its agent."""

from __future__ import annotations

import argparse
import os
import select
import stat
import sys
from pathlib import Path

import trio

from rayos_vmm.cli.arguments import duration
from rayos_vmm.cli.completion import add_name, machine_names
from rayos_vmm.cli.files import read_file, write_file
from rayos_vmm.cli.output import Output
from rayos_vmm.cli.progress import open_progress
from rayos_vmm.client.daemon import the_daemon
from rayos_vmm.errors import Invalid
from rayos_vmm.machine.view import ExecResult


def add_exec(parser: argparse.ArgumentParser) -> None:
    add_name(parser)
    parser.usage = "rayos exec [--timeout TIME] [--json] NAME -- COMMAND [WORD …]"
    parser.epilog = "One COMMAND alone is a line for the guest's shell; with words, no shell touches them."
    parser.add_argument("--timeout", type=duration, default=900.0, help="how long it may run (default: 900s)")


def guest_command(words: list[str]) -> str | list[str]:
    """Returns the command to run: one word is a shell's line, several are a program with its arguments."""
    return words[0] if len(words) == 1 else words


def print_result(result: ExecResult, out: Output) -> int:
    """Shows what the command said; its exit status becomes ours."""
    if out.is_json:
        out.result(
            {
                "exit_status": result.exit_status,
                "stdout": result.stdout.decode(errors="replace"),
                "stderr": result.stderr.decode(errors="replace"),
            }
        )
    else:
        out.write(result.stdout)
        sys.stderr.buffer.write(result.stderr)
        sys.stderr.buffer.flush()
    return result.exit_status


async def run_exec(args: argparse.Namespace, out: Output) -> int:
    if not args.words:
        raise Invalid("no command is given", hint=f"rayos exec {args.name} -- uname -a")
    if not sys.stdin.isatty() and select.select([0], [], [], 0)[0] and stat.S_ISFIFO(os.fstat(0).st_mode):
        out.note("the standard input is not passed to the command: `rayos cp - NAME:/path` brings it there")
    async with open_progress(f"running in {args.name}", out):
        result = await the_daemon().exec(args.name, guest_command(args.words), timeout_s=args.timeout)
    return print_result(result, out)


def add_cp(parser: argparse.ArgumentParser) -> None:
    for name, text in (("source", "what to copy"), ("target", "where to")):
        action = parser.add_argument(
            name, metavar=name.upper(), help=f"{text}: NAME:/path in a guest, a path here, or - for a stream"
        )
        action.completer = lambda **more: [f"{found}:" for found in machine_names(**more)]  # type: ignore[attr-defined]


def split_remote(text: str) -> tuple[str, str] | None:
    """(machine, path) of `NAME:/path`, None for a path here (`./a:b` is one)."""
    name, colon, path = text.partition(":")
    return (name, path) if colon and "/" not in name else None


def _save(target: str, data: bytes, remote_path: str, out: Output) -> Path:
    if target == "-":
        out.write(data)
        return Path(target)
    return write_file(target, data, name_in_folder=Path(remote_path).name)


async def run_cp(args: argparse.Namespace, out: Output) -> None:
    source, target = split_remote(args.source), split_remote(args.target)
    if (source is None) == (target is None):
        raise Invalid(
            f"one of {args.source} and {args.target} must be in a guest, and only one",
            hint="rayos cp ./file dev:/tmp/file",
        )
    client = the_daemon()
    async with open_progress(f"copying {args.source}", out):
        if source is not None:
            data = await client.read_file(*source)
            written = str(_save(args.target, data, source[1], out))
        elif target is not None:
            if await trio.Path(args.source).is_dir():
                raise Invalid(
                    f"{args.source} is a folder, and one file is copied at a time",
                    hint=f"tar c {args.source} | rayos cp - {args.target.rstrip('/')}.tar",
                )
            data, mode = (sys.stdin.buffer.read(), 0o644) if args.source == "-" else read_file(args.source)
            name, path = target
            if path.endswith("/"):
                path += Path(args.source).name
            await client.write_file(name, path, data, mode=mode)
            written = f"{name}:{path}"
    if args.target != "-":
        out.result({"bytes": len(data), "to": written})
