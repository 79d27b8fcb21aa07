"""The life of a virtual machine as data.

Theory of operation: a machine is *defined* until somebody starts it; *starting* spans everything from the
first socket to QEMU's `cont`; *running* and *paused* follow what QEMU says; *stopping* lasts from the
request until QEMU is gone; *stopped* is an end that was meant (by the guest or by us), *failed* one that
was not, always with a reason. Stopped and failed machines can be started again.

A machine that runs while no service is there is *adopting* from the start of the next one until its QEMU answers. It
may stay so: a QEMU that is silent is not ended for that.

Invariant: the state changes through `advance` alone, and a pair that is not in the table does not happen.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from rayos_vmm.machine.view import ExitReason, VmState


class LifeEvent(enum.StrEnum):
    """An event in the life of a machine."""

    START = "start"  # somebody asked for it
    RUN = "run"  # QEMU executes guest code
    PAUSE = "pause"  # QEMU stopped executing
    ADOPT = "adopt"  # a new service found it alive
    STOP = "stop"  # somebody asked for the end
    EXIT = "exit"  # QEMU is gone, as was meant
    FAIL = "fail"  # QEMU is gone, or never was, and nobody meant it


S, E = VmState, LifeEvent

TRANSITIONS: Final[Mapping[tuple[VmState, LifeEvent], VmState]] = {
    (S.DEFINED, E.START): S.STARTING,
    (S.STARTING, E.RUN): S.RUNNING,
    (S.STARTING, E.STOP): S.STOPPING,
    (S.STARTING, E.EXIT): S.STOPPED,
    (S.STARTING, E.FAIL): S.FAILED,
    (S.ADOPTING, E.ADOPT): S.ADOPTING,  # the service before this one did not finish it
    (S.ADOPTING, E.RUN): S.RUNNING,
    (S.ADOPTING, E.PAUSE): S.PAUSED,
    (S.ADOPTING, E.STOP): S.STOPPING,
    (S.ADOPTING, E.EXIT): S.STOPPED,
    (S.ADOPTING, E.FAIL): S.FAILED,
    (S.RUNNING, E.ADOPT): S.ADOPTING,
    (S.RUNNING, E.RUN): S.RUNNING,
    (S.RUNNING, E.PAUSE): S.PAUSED,
    (S.RUNNING, E.STOP): S.STOPPING,
    (S.RUNNING, E.EXIT): S.STOPPED,
    (S.RUNNING, E.FAIL): S.FAILED,
    (S.PAUSED, E.ADOPT): S.ADOPTING,
    (S.PAUSED, E.RUN): S.RUNNING,
    (S.PAUSED, E.PAUSE): S.PAUSED,
    (S.PAUSED, E.STOP): S.STOPPING,
    (S.PAUSED, E.EXIT): S.STOPPED,
    (S.PAUSED, E.FAIL): S.FAILED,
    (S.STOPPING, E.ADOPT): S.STOPPING,
    (S.STOPPING, E.RUN): S.STOPPING,  # a paused guest has to run to power itself down
    (S.STOPPING, E.PAUSE): S.STOPPING,
    (S.STOPPING, E.STOP): S.STOPPING,
    (S.STOPPING, E.EXIT): S.STOPPED,
    (S.STOPPING, E.FAIL): S.FAILED,
    (S.STOPPED, E.START): S.STARTING,
    (S.FAILED, E.START): S.STARTING,
}

# States in which there are processes to look after.
LIVE: Final = frozenset({S.STARTING, S.ADOPTING, S.RUNNING, S.PAUSED, S.STOPPING})
# States in which QEMU answers QMP and the guest's devices are there.
REACHABLE: Final = frozenset({S.RUNNING, S.PAUSED, S.STOPPING})

# Whether an end was meant: decides between stopped and failed.
MEANT: Final[Mapping[ExitReason, bool]] = {
    ExitReason.POWERED_OFF: True,
    ExitReason.STOPPED: True,
    ExitReason.KILLED: True,
    ExitReason.PANIC: False,
    ExitReason.TRIPLE_FAULT: False,
    ExitReason.RESET_LOOP: False,
    ExitReason.HANG: False,
    ExitReason.TIMED_OUT: False,
    ExitReason.DEBUG_EXIT: True,
    ExitReason.RESET: True,
    ExitReason.PASSED: True,
    ExitReason.FAILED: False,
    ExitReason.QEMU_CRASHED: False,
    ExitReason.DEVICES_LOST: False,
    ExitReason.START_FAILED: False,
    ExitReason.LOST: False,
}


class WrongState(Exception):
    """The event cannot happen in this state."""

    def __init__(self, state: VmState, event: LifeEvent) -> None:
        allowed = sorted(s.value for s, e in TRANSITIONS if e is event)
        super().__init__(f"cannot {event.value} while {state.value}: allowed while {', '.join(allowed)}")
        self.state = state
        self.event = event


def advance(state: VmState, event: LifeEvent) -> VmState:
    """The state after `event`.

    Raises:
        WrongState: the pair is not in the table.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise WrongState(state, event) from None
