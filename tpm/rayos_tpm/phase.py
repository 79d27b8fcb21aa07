"""The six boot phases, and which register takes the events of each.

Theory of operation: a launch measures what it is made of in one order, and may leave phases out but
never go back. FIRMWARE (firmware and boot loader) comes first, then CONFIGURATION (boot configuration and
command line), KERNEL, INITRD, POLICY (security policy) and LAUNCH (what VM this is), where a running VM
stays. Each measurement is an event that names its phase; reset starts over. A pair that is not in
TRANSITIONS is refused, so a log cannot show a kernel after the initrd that it loaded.

A profile maps phases to registers. `seed` is the layout for direct kernel boot: 0, 4, 8, 9, 10, 11. Its
registers are shared with the guest: firmware extends 0 to 7, an EFI stub 9, IMA 10, systemd 11. The guests'
events come after ours, so the journal replays, but tools in the guest that expect those registers to
start from zero (BitLocker, a signed PCR 11 policy) do not work. `host-reserved` leaves 0 to 15 to the guest
and puts all six phases in register 17, which the guest can neither extend nor reset at locality 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from rayos_tpm import pcr
from rayos_tpm.errors import TpmError


class Phase(StrEnum):
    """A phase of a launch, in order."""

    FIRMWARE = "firmware"
    CONFIGURATION = "configuration"
    KERNEL = "kernel"
    INITRD = "initrd"
    POLICY = "policy"
    LAUNCH = "launch"


ORDER: Final = tuple(Phase)
RESET: Final = "reset"

TRANSITIONS: Final[Mapping[tuple[Phase, Phase | str], Phase]] = {
    **{(now, seen): seen for i, now in enumerate(ORDER) for seen in ORDER[i:]},
    **{(now, RESET): ORDER[0] for now in ORDER},
}


def advance(now: Phase, event: Phase | str) -> Phase:
    """The phase after an event: a measurement of some phase, or RESET.

    TpmError: the measurement belongs to a phase that is over.
    """
    try:
        return TRANSITIONS[now, event]
    except KeyError:
        raise TpmError(
            f"a measurement of phase {event} came in phase {now}; the order is {', '.join(ORDER)}"
        ) from None


@dataclass(frozen=True, slots=True)
class Profile:
    """Where a VM's host events go.

    registers: the register of each phase.
    is_dynamic: registers 17 to 22 are started by a D-RTM sequence before the first event.
    """

    name: str
    registers: Mapping[Phase, int]
    is_dynamic: bool = False

    @property
    def exposed(self) -> tuple[int, ...]:
        """The registers that quotes and reports of this VM cover by default."""
        return (*range(pcr.EXPOSED), 17) if self.is_dynamic else tuple(range(pcr.EXPOSED))


PROFILES: Final[Mapping[str, Profile]] = {
    profile.name: profile
    for profile in (
        Profile("seed", dict(zip(ORDER, (0, 4, 8, 9, 10, 11), strict=True))),
        Profile("host-reserved", dict.fromkeys(ORDER, 17), is_dynamic=True),
    )
}


def profile_named(name: str) -> Profile:
    """The profile of this name; TpmError names the known ones."""
    try:
        return PROFILES[name]
    except KeyError:
        raise TpmError(f"PCR profile {name!r} is unknown; known are {', '.join(PROFILES)}") from None
