"""Runs a command under trio and turns what it raised into words and an exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio

from rayos_vmm.cli.output import Output
from rayos_vmm.errors import Busy, Conflict, GuestGone, Invalid, NotFound, RayosError, Timeout_, one_error

FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130
STATUS: Final[tuple[tuple[type[RayosError], int], ...]] = (
    (Invalid, USAGE),
    (NotFound, 3),
    (Conflict, 4),
    (Busy, 4),
    (GuestGone, 5),
    (Timeout_, 124),
)


def exit_status(error: RayosError) -> int:
    """The exit status for an error."""
    return next((status for class_, status in STATUS if isinstance(error, class_)), FAILED)


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
        return exit_status(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output left (`rayos events | head -1`); keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
