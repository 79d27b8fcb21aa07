"""Faults strike where their rules say, again the same with the same seed, and rules that make no sense are refused."""

from __future__ import annotations

from typing import Any

import pytest

from rayos_devices.faults import ACTIONS, MAX_RULES, Fault, Faults


def struck(faults: Faults, op: str, count: int, **where: int) -> list[int]:
    """Which of `count` operations (from 1) were hit."""
    return [number for number in range(1, count + 1) if faults.decide(op, **where)]


def test_a_rule_is_about_its_operation_and_its_sectors() -> None:
    """A request is hit when it touches one of them, at either end."""
    faults = Faults([Fault(op="read", action="error", sector=100, sectors=4)])
    assert not faults.decide("write", 100, 1)
    assert not faults.decide("read", 92, 8)
    assert not faults.decide("read", 104, 8)
    assert faults.decide("read", 93, 8)
    assert faults.decide("read", 103, 1)
    assert faults.decide("read", 0, 1000)
    (told,) = faults.snapshot()
    assert (told["matched"], told["done"]) == (3, 3)


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"nth": 3}, [3]),
        ({"every": 2}, [2, 4, 6]),
        ({"count": 2}, [1, 2]),
        ({"every": 2, "count": 2}, [2, 4]),
    ],
)
def test_when_it_strikes(when: dict[str, int], expected: list[int]) -> None:
    assert struck(Faults([Fault(op="tx", action="drop", **when)]), "tx", 6) == expected


def test_the_first_rule_that_is_due_answers() -> None:
    first = Fault(op="rx", action="full", every=3)
    second = Fault(op="rx", action="drop")
    faults = Faults([first, second])
    assert [faults.decide("rx") for _ in range(3)] == [second, second, first]


def test_the_same_seed_is_the_same_luck() -> None:
    """About as often as asked, and the same ones again; another seed, others."""
    rule = Fault(op="write", action="error", probability=0.25)
    one = struck(Faults([rule], seed=7), "write", 4000)
    assert one == struck(Faults([rule], seed=7), "write", 4000)
    assert one != struck(Faults([rule], seed=8), "write", 4000)
    assert 800 < len(one) < 1200


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"op": "erase", "action": "error"}, "op 'erase'; allowed are read, write, flush, tx, rx"),
        ({"op": "tx", "action": "error"}, "action 'error' of tx; allowed are delay, drop"),
        ({"op": "flush", "action": "error", "sector": 1}, "only read and write have one"),
        ({"op": "read", "action": "error", "nth": -1}, "nth -1"),
        ({"op": "read", "action": "error", "sector": 0, "sectors": 0}, "0 sectors at 0"),
        ({"op": "read", "action": "error", "probability": 0.0}, "above 0 and up to 1"),
        ({"op": "read", "action": "delay"}, "delay 0.0 s with action delay"),
        ({"op": "read", "action": "delay", "delay_s": 61.0}, "up to 60 s"),
        ({"op": "read", "action": "error", "delay_s": 1.0}, "the others 0"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Fault(**wrong)


def test_every_action_can_be_asked_for_and_not_too_many() -> None:
    rules = [
        Fault(op=op, action=action, delay_s=1.0 if action == "delay" else 0.0)
        for op, actions in ACTIONS.items()
        for action in actions
    ]
    assert len(rules) == 10
    with pytest.raises(ValueError, match=f"at most {MAX_RULES}"):
        Faults(rules * 7)
