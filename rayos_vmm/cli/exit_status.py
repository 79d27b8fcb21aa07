"""The exit statuses of `rayos`: one table, from which the help and docs/exit-status.md are made.

Invariant: a status never changes its meaning. The reasons of a run that ended have even numbers, since QEMU's
isa-debug-exit gives odd ones, `(value << 1) | 1`, which `--debug-exit` hands on as they are.
"""

from __future__ import annotations

from typing import Final

from rayos_vmm.errors import Busy, Conflict, GuestGone, Invalid, NotFound, RayosError, Timeout_
from rayos_vmm.machine.view import ExitReason, VmView

FAILED: Final = 1
USAGE: Final = 2
TIMED_OUT: Final = 124
HANGUP: Final = 129
INTERRUPTED: Final = 130
TERMINATED: Final = 143

#: status: (word, meaning)
TABLE: Final[dict[int, tuple[str, str]]] = {
    0: (
        "done",
        "the guest powered off, reset where that ends it, passed, or was stopped; the command did its work",
    ),
    FAILED: ("failed", "the command failed for a reason of its own"),
    USAGE: ("usage", "the command line, a file or a configuration is wrong"),
    3: ("not_found", "there is no such machine or thing"),
    4: ("conflict", "something is in use, or in the wrong state"),
    5: ("start_failed", "the machine never ran, or does not answer"),
    10: ("panic", "the guest's kernel panicked"),
    12: ("triple_fault", "the guest's processor triple-faulted"),
    14: ("reset_loop", "the guest reset itself again and again"),
    16: ("hang", "no progress for as long as the watchdog allows"),
    18: ("qemu_crashed", "QEMU died of a signal or an error of its own"),
    20: ("lost", "the machine ended and nobody saw how"),
    22: ("failed", "a console printed what --fail-on asks for"),
    24: ("tests_failed", "a test that the guest reported (TAP, KTAP) failed"),
    TIMED_OUT: ("timed_out", "the time limit is over"),
    HANGUP: ("hangup", "the terminal was closed (SIGHUP)"),
    INTERRUPTED: ("interrupted", "Ctrl-C (SIGINT)"),
    137: ("killed", "somebody killed the machine"),
    TERMINATED: ("terminated", "SIGTERM"),
}
OTHERS: Final = (
    "`run -- COMMAND` and `exec` give COMMAND's own status; `run --debug-exit` that of QEMU, (value << 1) | 1, "
    "or 0 for the one that --success names."
)

_BY_ERROR: Final[tuple[tuple[type[RayosError], int], ...]] = (
    (Invalid, USAGE),
    (NotFound, 3),
    (Conflict, 4),
    (Busy, 4),
    (GuestGone, 5),
    (Timeout_, TIMED_OUT),
)
_BY_REASON: Final[dict[ExitReason, int]] = {
    ExitReason.POWERED_OFF: 0,
    ExitReason.STOPPED: 0,
    ExitReason.PASSED: 0,
    ExitReason.RESET: 0,
    ExitReason.START_FAILED: 5,
    ExitReason.PANIC: 10,
    ExitReason.TRIPLE_FAULT: 12,
    ExitReason.RESET_LOOP: 14,
    ExitReason.HANG: 16,
    ExitReason.QEMU_CRASHED: 18,
    ExitReason.LOST: 20,
    ExitReason.FAILED: 22,
    ExitReason.TIMED_OUT: TIMED_OUT,
    ExitReason.KILLED: 137,
}


def of_error(error: RayosError) -> int:
    """The exit status for an error."""
    return next((status for class_, status in _BY_ERROR if isinstance(error, class_)), FAILED)


def of_end(view: VmView) -> int:
    """The exit status for a machine that has ended."""
    if view.guest_exit_code is not None and view.exit_reason is not ExitReason.PASSED:
        return view.guest_exit_code
    return FAILED if view.exit_reason is None else _BY_REASON[view.exit_reason]


def in_words() -> str:
    """The table as the help shows it."""
    lines = [f"  {status:>3}  {word:<12}  {meaning}" for status, (word, meaning) in TABLE.items()]
    return "\n".join(["exit status:", *lines, f"  {OTHERS}"])
