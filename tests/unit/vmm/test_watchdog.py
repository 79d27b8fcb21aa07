"""A watchdog barks at silence and at the end of its time, and never at a guest that gets on."""

from __future__ import annotations

from rayos_vmm.machine.view import ExitReason
from rayos_vmm.machine.watchdog import LOOKS, Watchdog, progress


def test_a_guest_that_gets_on_is_left_alone() -> None:
    """Progress once in every silence is enough, for ever."""
    dog = Watchdog(silence_s=8, run_s=0, now=0)
    for step in range(100):
        assert dog.check(step // 3, dog.deadline()) is None


def test_silence_is_a_hang_within_a_quarter_of_its_length() -> None:
    dog = Watchdog(silence_s=8, run_s=0, now=100)
    looks: list[tuple[float, tuple[ExitReason, str] | None]] = []
    while not looks or looks[-1][1] is None:
        looks.append((dog.deadline(), dog.check("same", dog.deadline())))
    when, verdict = looks[-1]
    assert verdict is not None and verdict[0] is ExitReason.HANG
    assert "8.0 s without console output" in verdict[1]
    assert 108 <= when <= 108 + 2 * 8 / LOOKS


def test_the_end_of_its_time_comes_whatever_it_does() -> None:
    dog = Watchdog(silence_s=0, run_s=5, now=0)
    assert dog.deadline() == 5
    assert dog.check(1, 4.9) is None
    assert dog.check(2, 5.0) == (ExitReason.TIMED_OUT, "it ran for the 5 s that it was given")


def test_no_limit_is_no_deadline() -> None:
    assert Watchdog(silence_s=0, run_s=0, now=0).deadline() == float("inf")


def test_progress_is_what_programs_do() -> None:
    """Frames from others and a blinking cursor are not."""
    one = {"allowed": 1, "denied": 1}
    operations = dict.fromkeys(("console.write", "disk.read", "net.tx", "net.rx", "gpu.render"), one)
    assert progress({"x": {"operations": operations}, "y": {}}) == 6
