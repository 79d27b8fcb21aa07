"""The states of a DHCP client and its moves, as data (RFC 2131, figure 5).

Invariant: a move that is not in TRANSITIONS does not happen. INIT-REBOOT and REBOOTING of the figure are
REQUESTING with a flag.
"""

from collections.abc import Mapping
from enum import Enum
from typing import Final


class ClientState(Enum):
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


class ClientEvent(Enum):
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


TRANSITIONS: Final[Mapping[tuple[ClientState, ClientEvent], ClientState]] = {
    (ClientState.INIT, ClientEvent.START): ClientState.SELECTING,
    (ClientState.INIT, ClientEvent.REBOOT): ClientState.REQUESTING,
    (ClientState.SELECTING, ClientEvent.CHOOSE): ClientState.REQUESTING,
    (ClientState.SELECTING, ClientEvent.GIVE_UP): ClientState.ERROR,
    (ClientState.REQUESTING, ClientEvent.BIND): ClientState.BOUND,
    (ClientState.REQUESTING, ClientEvent.FALL_BACK): ClientState.REQUESTING,
    (ClientState.REQUESTING, ClientEvent.NAK): ClientState.INIT,
    (ClientState.REQUESTING, ClientEvent.GIVE_UP): ClientState.INIT,
    (ClientState.REQUESTING, ClientEvent.CONFLICT): ClientState.DECLINED,
    (ClientState.BOUND, ClientEvent.T1): ClientState.RENEWING,
    (
        ClientState.BOUND,
        ClientEvent.T2,
    ): ClientState.REBINDING,  # after a suspend, later ones may be due at once
    (ClientState.BOUND, ClientEvent.EXPIRE): ClientState.INIT,
    (ClientState.BOUND, ClientEvent.CONFLICT): ClientState.DECLINED,
    (ClientState.BOUND, ClientEvent.RELEASE): ClientState.RELEASED,
    (ClientState.RENEWING, ClientEvent.BIND): ClientState.BOUND,
    (ClientState.RENEWING, ClientEvent.NAK): ClientState.INIT,
    (ClientState.RENEWING, ClientEvent.T2): ClientState.REBINDING,
    (ClientState.RENEWING, ClientEvent.EXPIRE): ClientState.INIT,
    (ClientState.RENEWING, ClientEvent.CONFLICT): ClientState.DECLINED,
    (ClientState.RENEWING, ClientEvent.RELEASE): ClientState.RELEASED,
    (ClientState.REBINDING, ClientEvent.BIND): ClientState.BOUND,
    (ClientState.REBINDING, ClientEvent.NAK): ClientState.INIT,
    (ClientState.REBINDING, ClientEvent.EXPIRE): ClientState.INIT,
    (ClientState.REBINDING, ClientEvent.CONFLICT): ClientState.DECLINED,
    (ClientState.REBINDING, ClientEvent.RELEASE): ClientState.RELEASED,
    (ClientState.DECLINED, ClientEvent.START): ClientState.INIT,
    (ClientState.ERROR, ClientEvent.START): ClientState.INIT,
    (ClientState.RELEASED, ClientEvent.START): ClientState.INIT,
}

HAVE_ADDRESS: Final = frozenset((ClientState.BOUND, ClientState.RENEWING, ClientState.REBINDING))
