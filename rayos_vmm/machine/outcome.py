"""Why a machine ended, judged from what was seen: a pure function of the evidence.

Sources of evidence: QMP's SHUTDOWN, RESET and GUEST_PANICKED (QEMU, qapi/run-state.json, ShutdownCause),
the serial log, QEMU's own log, its exit status, and what we had asked for.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field
from typing import Final

from rayos_vmm.host.process import signal_name
from rayos_vmm.machine.view import ExitReason

# So many resets by the guest, each within the interval of the one before and never ready: a loop.
RESET_LOOP_COUNT: Final = 5
RESET_LOOP_INTERVAL_S: Final = 30.0
# Only the printk time stamp may stand before it: a shell that echoes the words is no panic.
_PANIC: Final = re.compile(r"^(?:\[ *\d+\.\d+\] ?)?Kernel panic - not syncing: (.*)$")
# Anything may stand before it: a reset cuts whatever line the guest was writing.
_READY: Final = re.compile(r"RAYOS-READY boot=(\d+(?:\.\d+)?) ip=(\S+)")


_UNEXPLAINED: Final = frozenset({ExitReason.QEMU_CRASHED, ExitReason.DEVICES_LOST, ExitReason.LOST})


@dataclass
class Evidence:
    """The evidence about the end of a machine; filled in while it runs."""

    asked: ExitReason | None = None  # STOPPED or KILLED, when the end was ours
    shutdown_cause: str | None = None  # QMP ShutdownCause
    panic: str | None = None
    has_panicked: bool = False
    has_triple_faulted: bool = False
    is_reset_loop: bool = False
    triple_faults: int = 0
    has_reset_enough: int = 0  # how many resets, when on_reset says that this is the end
    decided: tuple[ExitReason, str] | None = None  # what a console printed decided it (`verdict.py`)
    expired: tuple[ExitReason, str] | None = None  # what the watchdog said
    lost: str = ""  # which process died that its devices need
    memory_kills: int = 0  # of the machine's processes by the kernel, for want of memory of its group
    exit_status: int | None = None  # QEMU's; None when it was not our child
    last_log_line: str = ""
    resets: deque[float] = field(default_factory=lambda: deque(maxlen=RESET_LOOP_COUNT))

    @property
    def guest_exit_code(self) -> int | None:
        """QEMU's exit status when the guest chose it, by its debug exit port: always odd."""
        is_chosen = self.shutdown_cause == "guest-shutdown" and self.exit_status not in (0, None)
        return self.exit_status if is_chosen else None


@dataclass(frozen=True, slots=True)
class Ready:
    """The contents of a guest's ready line: seconds since its kernel started, and its address."""

    boot_s: float
    address: str | None


def parse_ready(line: str) -> Ready | None:
    """The ready line's content, None for any other line."""
    match = _READY.search(line)
    if match is None:
        return None
    return Ready(float(match[1]), None if match[2] == "-" else match[2])


def parse_panic(line: str) -> str | None:
    """Returns the message of a Linux kernel that panics, None for any other line."""
    match = _PANIC.match(line)
    return None if match is None else match[1].strip()


def note_reset(evidence: Evidence, now: float) -> None:
    """Counts a reset that the guest did before it was ready; `now` in seconds of any steady clock."""
    if evidence.resets and now - evidence.resets[-1] > RESET_LOOP_INTERVAL_S:
        evidence.resets.clear()
    evidence.resets.append(now)
    evidence.is_reset_loop = len(evidence.resets) >= RESET_LOOP_COUNT


def count_of(reaction: str) -> int | None:
    """How many times the guest may do it until the machine ends, by `on_reset` or `on_triple_fault`; None: for ever."""
    if reaction == "stop":
        return 1
    return int(reaction.removeprefix("count=")) if reaction.startswith("count=") else None


def judge(evidence: Evidence, *, success: int | None = None) -> tuple[ExitReason, str]:
    """The reason as a word and as a sentence; `success` is the exit status by a debug exit that is a pass."""
    exit_reason, reason = _judge(evidence, success)
    return exit_reason, reason + (memory_note(evidence) if exit_reason in _UNEXPLAINED else "")


def memory_note(evidence: Evidence) -> str:
    """The clause to add where a process died and the kernel says that the machine had used up its memory."""
    if not evidence.memory_kills:
        return ""
    return "; the kernel ended it because the machine had used up its quota.host_memory"


def _judge(evidence: Evidence, success: int | None) -> tuple[ExitReason, str]:
    if evidence.decided is not None:
        return evidence.decided
    if evidence.is_reset_loop:
        count = len(evidence.resets)
        return ExitReason.RESET_LOOP, f"the guest reset itself {count} times without getting ready"
    if evidence.lost:
        return ExitReason.DEVICES_LOST, evidence.lost
    if evidence.expired is not None:
        return evidence.expired
    if evidence.has_triple_faulted:
        times = f" {evidence.triple_faults} times" if evidence.triple_faults > 1 else ""
        return ExitReason.TRIPLE_FAULT, f"the guest's processor triple-faulted{times}"
    if evidence.has_panicked or evidence.shutdown_cause == "guest-panic":
        said = evidence.panic or "it gave no reason"
        return ExitReason.PANIC, f"the guest's kernel panicked: {said}"
    if evidence.asked is ExitReason.KILLED:
        return ExitReason.KILLED, "it was killed"
    if evidence.asked is ExitReason.STOPPED:
        return ExitReason.STOPPED, "it was stopped"
    if evidence.has_reset_enough > 1:
        return ExitReason.RESET, f"the guest reset itself {evidence.has_reset_enough} times"
    if evidence.has_reset_enough or evidence.shutdown_cause == "guest-reset":
        return ExitReason.RESET, "the guest reset itself"
    if evidence.guest_exit_code is not None:
        code = evidence.guest_exit_code
        said = f"the guest wrote {code >> 1} to its debug exit port: exit status {code}"
        if success is None:
            return ExitReason.DEBUG_EXIT, said
        if code == success:
            return ExitReason.PASSED, f"{said}, which is the success"
        return ExitReason.FAILED, f"{said}; the success is {success}"
    if evidence.shutdown_cause == "guest-shutdown":
        return ExitReason.POWERED_OFF, "the guest powered itself off"
    if evidence.shutdown_cause == "host-qmp-quit":
        return ExitReason.STOPPED, "QEMU was told to quit over QMP"
    if evidence.shutdown_cause == "host-signal" and evidence.exit_status in (0, None):
        return ExitReason.KILLED, "QEMU was ended by a signal from outside"
    if evidence.shutdown_cause is not None and evidence.exit_status in (0, None):
        return ExitReason.STOPPED, f"QEMU shut down: {evidence.shutdown_cause}"
    if evidence.exit_status is None:
        return ExitReason.LOST, "QEMU ended, and nobody saw how"
    log = f": {evidence.last_log_line}" if evidence.last_log_line else ""
    if evidence.exit_status < 0:
        name = signal_name(-evidence.exit_status)
        return ExitReason.QEMU_CRASHED, f"QEMU died of {name}, which did not come from the service{log}"
    return ExitReason.QEMU_CRASHED, f"QEMU exited with status {evidence.exit_status}{log}"
