"""Why a machine ended, from the evidence alone."""

from __future__ import annotations

import pytest

from rayos_vmm.machine.outcome import (
    RESET_LOOP_COUNT,
    RESET_LOOP_INTERVAL_S,
    Evidence,
    count_of,
    judge,
    note_reset,
    parse_panic,
    parse_ready,
)
from rayos_vmm.machine.view import ExitReason as R

CASES = [
    (Evidence(shutdown_cause="guest-shutdown", exit_status=0), R.POWERED_OFF, "powered itself off"),
    (Evidence(asked=R.STOPPED, shutdown_cause="guest-shutdown", exit_status=0), R.STOPPED, "stopped"),
    (Evidence(asked=R.KILLED, exit_status=-9), R.KILLED, "killed"),
    (Evidence(exit_status=-9), R.QEMU_CRASHED, "SIGKILL, which did not come from the service"),
    (Evidence(exit_status=-6, last_log_line="assert"), R.QEMU_CRASHED, "SIGABRT"),
    (Evidence(exit_status=1, last_log_line="no such device"), R.QEMU_CRASHED, "status 1: no such device"),
    (Evidence(shutdown_cause="host-qmp-quit", exit_status=0), R.STOPPED, "over QMP"),
    (Evidence(shutdown_cause="host-signal", exit_status=0), R.KILLED, "signal from outside"),
    (Evidence(), R.LOST, "nobody saw how"),
    (Evidence(has_panicked=True, panic="VFS", shutdown_cause="host-qmp-quit"), R.PANIC, "panicked: VFS"),
    (Evidence(shutdown_cause="guest-panic"), R.PANIC, "gave no reason"),
    (Evidence(has_triple_faulted=True), R.TRIPLE_FAULT, "triple-faulted"),
    (Evidence(is_reset_loop=True), R.RESET_LOOP, "reset itself"),
    (Evidence(expired=(R.HANG, "it hangs"), shutdown_cause="host-qmp-quit"), R.HANG, "it hangs"),
]


@pytest.mark.parametrize(("evidence", "reason", "text"), CASES)
def test_the_end_is_judged_from_the_evidence(evidence: Evidence, reason: R, text: str) -> None:
    """One word for programs, one sentence for people."""
    word, sentence = judge(evidence)
    assert word is reason
    assert text in sentence


def test_resets_close_together_are_a_loop_and_others_are_not() -> None:
    """Five in a row are a loop; a pause between them starts the count again."""
    evidence = Evidence()
    for count in range(RESET_LOOP_COUNT - 1):
        note_reset(evidence, float(count))
        assert not evidence.is_reset_loop
    note_reset(evidence, RESET_LOOP_COUNT + RESET_LOOP_INTERVAL_S)
    assert not evidence.is_reset_loop
    for count in range(RESET_LOOP_COUNT):
        note_reset(evidence, RESET_LOOP_COUNT + RESET_LOOP_INTERVAL_S + count)
    assert evidence.is_reset_loop


def test_the_ready_line_is_recognised_with_and_without_an_address() -> None:
    """Exactly the prefix of the contract, also behind a time stamp."""
    ready = parse_ready("RAYOS-READY boot=1.73 ip=10.86.0.5")
    assert ready is not None
    assert (ready.boot_s, ready.address) == (1.73, "10.86.0.5")
    without = parse_ready("[    1.7] RAYOS-READY boot=2.00 ip=-")
    assert without is not None and without.address is None
    assert parse_ready("root@rayos:/# \x1b[6nRAYOS-READY boot=2.00 ip=-") is not None
    assert parse_ready("RAYOS-READY boot=x ip=-") is None
    assert parse_ready("cut offRAYOS-READY boot=1.00 ip=-") is not None


def test_a_panic_line_is_the_kernels_own() -> None:
    """Only a time stamp may stand before it."""
    assert (
        parse_panic("[    2.2] Kernel panic - not syncing: sysrq triggered crash") == "sysrq triggered crash"
    )
    assert parse_panic("Kernel panic - not syncing: VFS") == "VFS"
    assert parse_panic("$ echo Kernel panic - not syncing: VFS") is None


def test_an_exit_that_the_guest_chose_is_told_with_its_status() -> None:
    """isa-debug-exit: QEMU shuts down as for a power-off, with a status of (V << 1) | 1."""
    evidence = Evidence(shutdown_cause="guest-shutdown", exit_status=33)
    assert evidence.guest_exit_code == 33
    assert judge(evidence) == (
        R.DEBUG_EXIT,
        "the guest wrote 16 to its debug exit port: exit status 33",
    )
    assert Evidence(shutdown_cause="guest-shutdown", exit_status=0).guest_exit_code is None


def test_a_reset_may_be_the_end_that_was_meant() -> None:
    """By QEMU itself, or at the count that was asked for."""
    assert judge(Evidence(shutdown_cause="guest-reset", exit_status=0))[0] is R.RESET
    assert judge(Evidence(has_reset_enough=3)) == (R.RESET, "the guest reset itself 3 times")
    assert [count_of(one) for one in ("auto", "stop", "reset", "count=7")] == [None, 1, None, 7]
