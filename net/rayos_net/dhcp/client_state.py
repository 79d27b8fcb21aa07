"""The states of a DHCP client and its moves, as data (RFC 2131, figure 5).

Invariant: a move that is not in TRANSITIONS does not happen. INIT-REBOOT and REBOOTING of the figure are
REQUESTING with a flag.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Final


class State(Enum):
    """Where the client is."""

    INIT = "init"
    SELECTING = "selecting"
    REQUESTING = "requesting"
    BOUND = "bound"
    RENEWING = "renewing"
    REBINDING = "rebinding"
    RELEASED = "released"
    DECLINED = "declined"
    ERROR = "error"


class Event(Enum):
    """An event that moves the client."""

    START = "start"  # begin, or begin again after a pause
    REBOOT = "reboot"  # begin with a stored lease
    CHOOSE = "choose"  # an offer was chosen
    FALL_BACK = "fall back"  # refused or unanswered: the next offer
    GIVE_UP = "give up"  # nobody answers
    BIND = "bind"  # ACK, and the address is free
    NAK = "nak"
    CONFLICT = "conflict"
    T1 = "T1"
    T2 = "T2"
    EXPIRE = "expire"
    RELEASE = "release"


TRANSITIONS: Final[Mapping[tuple[State, Event], State]] = {
    (State.INIT, Event.START): State.SELECTING,
    (State.INIT, Event.REBOOT): State.REQUESTING,
    (State.SELECTING, Event.CHOOSE): State.REQUESTING,
    (State.SELECTING, Event.GIVE_UP): State.ERROR,
    (State.REQUESTING, Event.BIND): State.BOUND,
    (State.REQUESTING, Event.FALL_BACK): State.REQUESTING,
    (State.REQUESTING, Event.NAK): State.INIT,
    (State.REQUESTING, Event.GIVE_UP): State.INIT,
    (State.REQUESTING, Event.CONFLICT): State.DECLINED,
    (State.BOUND, Event.T1): State.RENEWING,
    (State.BOUND, Event.T2): State.REBINDING,  # after a suspend, later ones may be due at once
    (State.BOUND, Event.EXPIRE): State.INIT,
    (State.BOUND, Event.CONFLICT): State.DECLINED,
    (State.BOUND, Event.RELEASE): State.RELEASED,
    (State.RENEWING, Event.BIND): State.BOUND,
    (State.RENEWING, Event.NAK): State.INIT,
    (State.RENEWING, Event.T2): State.REBINDING,
    (State.RENEWING, Event.EXPIRE): State.INIT,
    (State.RENEWING, Event.CONFLICT): State.DECLINED,
    (State.RENEWING, Event.RELEASE): State.RELEASED,
    (State.REBINDING, Event.BIND): State.BOUND,
    (State.REBINDING, Event.NAK): State.INIT,
    (State.REBINDING, Event.EXPIRE): State.INIT,
    (State.REBINDING, Event.CONFLICT): State.DECLINED,
    (State.REBINDING, Event.RELEASE): State.RELEASED,
    (State.DECLINED, Event.START): State.INIT,
    (State.ERROR, Event.START): State.INIT,
    (State.RELEASED, Event.START): State.INIT,
}

HAVE_ADDRESS: Final = frozenset((State.BOUND, State.RENEWING, State.REBINDING))
