"""The kernel's guards: one transaction for all that changed, and a host without nft is said to be one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rayos_net import nft
from rayos_vmm.network.taps import TapGuards

MAC = b"\x52\x59\0\0\0\1"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Records the scripts that nft was given; it refuses those that name `gone`."""
    given: list[str] = []

    def run(script: str) -> None:
        if '"gone"' in script:
            raise nft.NftError("nft: no such device")
        given.append(script)

    monkeypatch.setattr(nft, "run", run)
    yield given


async def test_changes_are_one_transaction_and_only_what_changed(scripts: list[str]) -> None:
    guards = TapGuards()
    guards.set("a", MAC, [])
    guards.set("b", MAC, [1])
    await guards.commit()
    assert len(scripts) == 1 and all(f'device "{tap}"' in scripts[0] for tap in "ab")
    guards.set("a", MAC, [2])
    guards.set("b", MAC, [1])
    await guards.commit()
    assert scripts[1:] == ["flush set netdev rayos a.ip4\nadd element netdev rayos a.ip4 { 0.0.0.2 }\n"]
    guards.remove("a")
    await guards.commit()
    assert "delete chain netdev rayos a" in scripts[2]
    await guards.commit()
    assert len(scripts) == 3 and not guards.trouble


async def test_a_tap_that_is_gone_does_not_hold_up_the_others(scripts: list[str]) -> None:
    """And is tried anew when it comes back."""
    guards = TapGuards()
    guards.set("gone", MAC, [1])
    guards.set("here", MAC, [1])
    await guards.commit()
    assert [script.count('device "here"') for script in scripts] == [1]
    assert guards.trouble == "nft: no such device"
    guards.set("here", MAC, [2])
    await guards.commit()
    assert not guards.trouble
