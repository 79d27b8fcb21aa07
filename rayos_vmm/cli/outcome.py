"""Runs a command under trio and turns what it raised into words and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from rayos_vmm.cli import exit_status
from rayos_vmm.cli.output import Output
from rayos_vmm.errors import RayosError, one_error


def run_command(
    command: Callable[[argparse.Namespace, Output], Awaitable[int | None]], args: argparse.Namespace
) -> int:
    """The command's exit status; errors are printed, an interrupt (Ctrl-C) is quiet."""
    out = Output(is_json=args.json)
    try:
        with one_error():
            return trio.run(partial(command, args, out)) or 0
    except RayosError as error:
        out.error(error.code, error.message, error.hint)
        return exit_status.of_error(error)
    except KeyboardInterrupt:
        return exit_status.INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output left (`rayos events | head -1`); keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_status.FAILED
