"""Any damage to the audit file is found, and at its record."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayos_vmm.policy.audit import Anchor, Chain, Damage, Entry, Operation, verify

COUNT = 20


def chained() -> tuple[list[bytes], Anchor]:
    chain = Chain()
    lines = [
        chain.add(Entry(seq=seq, time=1.0 * seq, steady=0.5, op=Operation.GRANT, vm="a", data={"n": seq}))
        for seq in range(1, COUNT + 1)
    ]
    return lines, chain.anchor


LINES, END = chained()
WHOLE = b"".join(LINES)


def record_at(offset: int) -> int:
    """The number of the record that holds a byte."""
    return WHOLE[:offset].count(b"\n") + 1


@given(offset=st.integers(0, len(WHOLE) - 1), flip=st.integers(1, 255))
def test_a_changed_byte_is_found_at_its_record(offset: int, flip: int) -> None:
    data = bytearray(WHOLE)
    data[offset] ^= flip
    with pytest.raises(Damage) as caught:
        verify(_lines(bytes(data)), [END])
    assert caught.value.seq == record_at(offset)


@given(start=st.integers(0, len(WHOLE) - 1), size=st.integers(1, 400))
def test_a_cut_is_found_not_after_its_record(start: int, size: int) -> None:
    data = WHOLE[:start] + WHOLE[start + size :]
    with pytest.raises(Damage) as caught:
        verify(_lines(data), [END])
    assert caught.value.seq == record_at(start)


@given(one=st.integers(0, len(WHOLE) - 1), other=st.integers(0, len(WHOLE) - 1))
def test_swapped_bytes_are_found_at_the_first(one: int, other: int) -> None:
    data = bytearray(WHOLE)
    data[one], data[other] = data[other], data[one]
    if bytes(data) == WHOLE:
        return
    with pytest.raises(Damage) as caught:
        verify(_lines(bytes(data)), [END])
    assert caught.value.seq == record_at(min(one, other))


@given(order=st.permutations(range(COUNT)))
@settings(max_examples=30)
def test_records_in_another_order_are_found(order: list[int]) -> None:
    if order == sorted(order):
        return
    with pytest.raises(Damage) as caught:
        verify([LINES[index] for index in order], [END])
    assert caught.value.seq == next(at for at, index in enumerate(order) if at != index) + 1


def test_a_whole_file_passes_and_anchors_find_a_missing_tail() -> None:
    assert verify(LINES, [END]).anchor == END
    assert verify(LINES[:-1]).anchor.seq == COUNT - 1
    with pytest.raises(Damage, match="cut off"):
        verify(LINES[:-1], [END])


@given(data=st.binary(max_size=300))
def test_junk_is_damage_and_nothing_else(data: bytes) -> None:
    if data:
        with pytest.raises(Damage):
            verify(_lines(data))


def _lines(data: bytes) -> list[bytes]:
    """As a file gives them: an end is a newline alone."""
    parts = data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + ([parts[-1]] if parts[-1] else [])
