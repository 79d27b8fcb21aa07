"""The six boot phases: every pair of the table, and the registers of both profiles."""

from __future__ import annotations

import itertools

import pytest

from rayos_tpm.errors import TpmError
from rayos_tpm.phase import ORDER, PROFILES, RESET, TRANSITIONS, Phase, advance, profile_named


@pytest.mark.parametrize(("now", "event"), list(itertools.product(ORDER, [*ORDER, RESET])))
def test_every_pair(now: Phase, event: Phase | str) -> None:
    """A phase may repeat or be skipped, never come back; reset starts over from anywhere."""
    if event == RESET:
        assert advance(now, event) is Phase.FIRMWARE
    elif ORDER.index(Phase(event)) >= ORDER.index(now):
        assert advance(now, event) is event
    else:
        assert (now, event) not in TRANSITIONS
        with pytest.raises(TpmError, match=f"{event} came in phase {now}"):
            advance(now, event)


def test_seed_profile_has_the_source_reports_registers() -> None:
    """0 firmware, 4 configuration, 8 kernel, 9 initrd, 10 policy, 11 launch; 16 registers exposed."""
    profile = profile_named("seed")
    assert [profile.registers[phase] for phase in ORDER] == [0, 4, 8, 9, 10, 11]
    assert profile.exposed == tuple(range(16))


def test_host_reserved_leaves_the_static_registers_to_the_guest() -> None:
    """All phases share the dynamic register that a guest at locality 0 cannot extend."""
    profile = profile_named("host-reserved")
    assert set(profile.registers.values()) == {17}
    assert profile.exposed == (*range(16), 17)


def test_unknown_profile_names_the_known() -> None:
    """A typo in a configuration gets the list of what exists."""
    with pytest.raises(TpmError, match=", ".join(PROFILES)):
        profile_named("sead")
