"""Captured frames as pcapng, judged by scapy's reader; and a worker's records, which may be anything."""

from __future__ import annotations

import io
import os
import random
import struct
from typing import Any

import pytest
from scapy.layers.l2 import Ether
from scapy.utils import RawPcapNgReader

from rayos_vmm.guest import pcapng

NOW_NS = 1_790_000_000_123_456_789


def record(time_ns: int, data: bytes, length: int, direction: int) -> bytes:
    return struct.pack("<QIIQ", time_ns, len(data), length, direction) + data + bytes(-len(data) % 8)


def test_scapy_reads_what_we_write() -> None:
    """Every frame with its bytes, its full length, its nanosecond, its direction and what was lost before it."""
    chance = random.Random(3)
    frames = [
        pcapng.CapturedFrame(NOW_NS + turn * 1001, size + 7 * (turn % 2), 1 + turn % 2, os.urandom(size))
        for turn, size in enumerate(
            [1, 2, 3, 4, 60, 1514, 65_488, *(chance.randrange(1, 2000) for _ in range(50))]
        )
    ]
    losses = [turn % 3 for turn in range(len(frames))]
    written = pcapng.header("dev-net", 65_488)
    written += b"".join(map(pcapng.packet, frames, losses)) + pcapng.statistics(NOW_NS, 60, 3)
    reader: Any = RawPcapNgReader(io.BytesIO(written))  # type: ignore[arg-type]  # it takes files, too
    read = list(reader)
    assert [data for data, _ in read] == [frame.data for frame in frames]
    for frame, (_, meta) in zip(frames, read, strict=True):
        assert (meta.tshigh << 32 | meta.tslow, meta.wirelen) == (frame.time_ns, frame.length)
        assert (meta.tsresol, meta.linktype) == (10**9, 1)
        assert meta.direction == frame.direction
    assert Ether(read[5][0]).original == frames[5].data
    tally = pcapng.Tally()
    at = 0
    while at < len(written):
        size = chance.randrange(1, 3000)
        tally.add(written[at : at + size])
        at += size
    assert (tally.frames, tally.lost, tally.size) == (len(frames), sum(losses), len(written))


def test_records_become_frames() -> None:
    data = record(5, b"12345", 1500, 2) + record(6, b"", 60, 1) + record(7, b"12345678", 8, 1)
    assert list(pcapng.unpack_records(data, 100)) == [
        pcapng.CapturedFrame(105, 1500, 2, b"12345"),
        pcapng.CapturedFrame(106, 60, 1, b""),
        pcapng.CapturedFrame(107, 8, 1, b"12345678"),
    ]


@pytest.mark.parametrize(
    "data",
    [
        b"\0" * 23,
        record(1, b"x" * 8, 8, 1)[:-1],
        record(1, b"x" * 8, 7, 1),
        record(1, b"x" * 8, 8, 0),
        record(1, b"x" * 8, 8, 3),
        struct.pack("<QIIQ", 1, 0xFFFFFFFF, 0xFFFFFFFF, 1),
    ],
)
def test_what_is_no_record_is_refused(data: bytes) -> None:
    """A worker that was taken over may say anything."""
    with pytest.raises(ValueError, match="record"):
        list(pcapng.unpack_records(data, 0))


def test_random_bytes_are_refused_or_frames() -> None:
    chance = random.Random(4)
    for _ in range(2000):
        data = chance.randbytes(chance.randrange(100))
        try:
            frames = list(pcapng.unpack_records(data, 0))
        except ValueError:
            continue
        assert sum(len(frame.data) for frame in frames) <= len(data)
        for frame in frames:
            pcapng.packet(frame, 0)
