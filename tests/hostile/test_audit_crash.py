"""The record under kill -9 at any moment and on a disk that is full: nothing acknowledged is lost, nothing invented."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rayos_vmm.errors import Conflict
from rayos_vmm.policy.audit import Operation, verify
from rayos_vmm.policy.audit_key import load_private
from rayos_vmm.policy.audit_log import AuditFailed, open_audit
from rayos_vmm.policy.audit_segments import read_lines
from rayos_vmm.policy.authority import open_authority, read_clocks
from rayos_vmm.service.store import open_store

KILLS = int(os.environ.get("RAYOS_KILLS", "12"))
WRITER = """
import sys, trio
from pathlib import Path
from rayos_vmm.policy.audit import Operation
from rayos_vmm.policy.audit_key import load_private
from rayos_vmm.policy.audit_log import open_audit
from rayos_vmm.policy.authority import read_clocks

async def write(audit, lane):
    while True:
        entry = await audit.append(Operation.GRANT, f"vm{lane}", pad="x" * (lane * 37))
        print(entry.seq, flush=True)

async def main(directory):
    key = load_private(directory / "audit.key")
    async with open_audit(directory / "audit.log", read_clocks, key.sign) as audit, trio.open_nursery() as nursery:
        for lane in range(8):
            nursery.start_soon(write, audit, lane)

trio.run(main, Path(sys.argv[1]))
"""


def killed_writer(directory: Path, lines: int, delay_bytes: int) -> list[int]:
    """The numbers that a writer acknowledged until it was killed, somewhere in what it was doing."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", WRITER, str(directory)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    with process:
        seen = b"".join(process.stdout.readline() for _ in range(lines))
        if delay_bytes:
            seen += process.stdout.read(delay_bytes)
        process.send_signal(signal.SIGKILL)
        seen += process.stdout.read()
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
    return [int(line) for line in seen.split(b"\n")[:-1]]


async def test_no_acknowledged_record_is_lost_in_kills(tmp_path: Path) -> None:
    """After each kill the next writer goes on where the chain ends; at the end all of it verifies, by the key."""
    seed = random.Random(8)
    acknowledged: set[int] = set()
    for _ in range(KILLS):
        told = killed_writer(tmp_path, seed.randint(1, 60), seed.randint(0, 12))
        assert not acknowledged & set(told)  # no number twice
        acknowledged |= set(told)
    key = load_private(tmp_path / "audit.key")
    async with open_audit(tmp_path / "audit.log", read_clocks, key.sign) as audit:
        assert audit.trouble == "" and audit.anchor.seq >= max(acknowledged)
    lines = list(read_lines(tmp_path / "audit.log"))
    assert verify(lines, key=key.public_key()).anchor.seq == len(lines)
    assert len(acknowledged) > KILLS


def _cuts(data: bytes) -> Iterator[int]:
    """Every length of the last two records, and the ends of the others."""
    start = data.rindex(b"\n", 0, data.rindex(b"\n", 0, len(data) - 1)) + 1
    yield from range(start, len(data) + 1)


async def test_whatever_part_of_the_last_record_reached_the_disk_the_rest_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    async with open_audit(path, read_clocks) as audit:
        for number in range(4):
            await audit.append(Operation.GRANT, "a", n=number)
    data = path.read_bytes()
    for length in _cuts(data):
        path.write_bytes(data[:length])
        whole = data[:length].count(b"\n")
        async with open_audit(path, read_clocks) as audit:
            assert (audit.trouble, audit.anchor.seq) == ("", whole)
            assert (await audit.append(Operation.GRANT, "a")).seq == whole + 1
        assert verify(read_lines(path)).anchor.seq == whole + 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.root
async def test_a_full_disk_lets_no_right_rise_and_is_told_once_there_is_room(
    tmp_path: Path, small_disk: Path
) -> None:
    """Grants fail, revocations act all the same; the chain stays whole, and says how many records are missing."""
    async with (
        open_store(tmp_path / "db") as store,
        open_authority(store, small_disk / "audit.log") as policy,
    ):
        await policy.define("a", ["net"])
        (small_disk / "ballast").write_bytes(b"x" * (40 << 10))
        granted = 0
        with pytest.raises(AuditFailed, match="No space left"):
            for _ in range(200):
                await policy.grant("a", ["gpu"], 60, "x" * 190)
                granted += 1
        assert 10 < granted < 200
        for size in reversed(range(190)):  # what is left of the last page takes shorter records
            with suppress(AuditFailed):
                await policy.grant("a", ["gpu"], 60, "x" * size)
        with pytest.raises(AuditFailed):
            await policy.grant("a", ["input"], 60, "")
        assert "CAP_INPUT" not in str(policy.grants())
        with pytest.raises(AuditFailed):
            await policy.revoke_rights("a", ["net", "gpu"])
        rights = [right.capability for right in policy.explain("a") if right.allowed]
        assert rights == []
        lost = policy.audit.lost
        assert lost >= 3
        (small_disk / "ballast").unlink()
        await policy.grant("a", ["net"], None, "again")
        assert policy.records(1)[0].lost and sum(one.lost for one in policy.records(1024)) == lost
        assert (await policy.verify()).ok
        with pytest.raises(Conflict):
            await policy.delegate("a", "a", ["net"], None)
