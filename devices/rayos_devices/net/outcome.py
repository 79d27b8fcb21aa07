"""The results of the loops of `rayos_devices.net.ring` beside the head of a chain, and the answers of a judge of
frames.
"""

from __future__ import annotations

import errno
from typing import Final

#: What a path's `receive` returns when no frame waits.
EMPTY: Final = -errno.EAGAIN

#: The budget is used up: there may be more.
SPENT: Final = -2
#: No chain is left, and a kick was asked for.
DRY: Final = -3
#: No frame is left.
QUIET: Final = -4
#: The bucket is empty.
WAIT: Final = -5
#: The port failed; its chain was given back.
FAILED: Final = -6

#: A judge's verdict: an action,
ALLOW: Final = 1
DENY: Final = 2
REJECT: Final = 3
ACTION_MASK: Final = 3
#: DENY for what is no sound frame, which is counted apart from what a rule or the guard refuses,
MALFORMED: Final = DENY | 1 << 16
#: whether it holds for the flow, so that it may be remembered,
HOLDS: Final = 4
#: and above that the number under which it is counted.
SLOT_SHIFT: Final = 3
SLOTS: Final = 8192
