"""Faults as text."""

from __future__ import annotations

import pytest

from rayos_devices.faults import Fault
from rayos_vmm.config.fault import parse_fault
from rayos_vmm.errors import Invalid


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("read:error,sector=128,count=1", Fault(op="read", action="error", sector=128, count=1)),
        ("tx:drop,every=3", Fault(op="tx", action="drop", every=3)),
        (
            "write:delay,delay=200ms,probability=0.5",
            Fault(op="write", action="delay", delay_s=0.2, probability=0.5),
        ),
    ],
)
def test_a_rule_is_read(text: str, fault: Fault) -> None:
    assert parse_fault(text).fault() == fault


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("read", "does not start with OP:ACTION"),
        ("read:error,sector", "'sector' in fault .* is not KEY=VALUE"),
        ("read:error,sector=1,sector=2", "once each"),
        ("read:error,sector=x", "sector=x"),
        ("read:error,colour=red", "colour"),
        ("tx:delay,delay=5", "delay=5"),
        ("rx:delay,delay=1s", "action 'delay' of rx"),
    ],
)
def test_a_wrong_rule_says_what_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(Invalid, match=complaint):
        parse_fault(text)
