"""The life cycle's table: every pair of state and event, walked."""

from __future__ import annotations

from itertools import product

import pytest

from rayos_vmm.machine.lifecycle import LIVE, MEANT, REACHABLE, TRANSITIONS, LifeEvent, WrongState, advance
from rayos_vmm.machine.view import ExitReason, VmState

PAIRS = list(product(VmState, LifeEvent))


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_every_pair_is_a_transition_or_a_clear_refusal(state: VmState, event: LifeEvent) -> None:
    """A pair outside of the table changes nothing and says where it is allowed."""
    if (state, event) in TRANSITIONS:
        assert advance(state, event) is TRANSITIONS[state, event]
        return
    with pytest.raises(WrongState) as refused:
        advance(state, event)
    assert f"cannot {event.value} while {state.value}: allowed while " in str(refused.value)


def test_every_live_machine_can_end_both_ways_and_be_stopped() -> None:
    """Nothing can get stuck: whatever lives can be stopped, exit and fail."""
    for state in LIVE:
        assert advance(state, LifeEvent.STOP) is VmState.STOPPING
        assert advance(state, LifeEvent.EXIT) is VmState.STOPPED
        assert advance(state, LifeEvent.FAIL) is VmState.FAILED


def test_whatever_does_not_live_can_be_started_and_nothing_else() -> None:
    """Defined, stopped and failed machines start; a live one does not start twice."""
    for state in VmState:
        assert ((state, LifeEvent.START) in TRANSITIONS) is (state not in LIVE)
    assert REACHABLE < LIVE


def test_every_exit_reason_is_meant_or_not() -> None:
    """The closed list of reasons decides between stopped and failed."""
    assert set(MEANT) == set(ExitReason)
