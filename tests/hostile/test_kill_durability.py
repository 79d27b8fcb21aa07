"""Kill -9 of the worker under verified writes, full and failing disks: what was acknowledged is on the disk.

`make soak` kills 1,000 times (RAYOS_KILLS); the harness is itself tested with a worker that acknowledges too early.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from rayos_devices.blk.wire import WRITEBACK_OFFSET, BlkFeature
from rayos_vmm.shared.spec import Device
from rayos_vmm.worker.sandbox import Mode
from tests.framework.durable_disk import BETWEEN_KILLS, BLOCK, kill_under_load, stamp
from tests.framework.kept import Kept, Link, Parent
from tests.framework.target import Rig

KILLS: Final = int(os.environ.get("RAYOS_KILLS", "100"))
IMAGE_BYTES: Final = 16 << 20
IOERR: Final = 1


@contextmanager
def disk(
    directory: Path,
    image: Path,
    *,
    command: Sequence[str | Path] | None = None,
    sandbox: Mode = "on",
    queues: int = 1,
    quota_bytes: int | None = None,
) -> Iterator[Kept]:
    """A keeper with a disk; of another parent, interpreted, with a `command`."""
    fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    parent = Parent(command, {"RAYOS_PURE": "1"}) if command is not None else None
    try:
        devices = [Device(kind="blk", name="disk", fd=fd, queues=queues, quota_bytes=quota_bytes)]
        with Kept(directory, devices, sandbox=sandbox, parent=parent) as kept:
            os.close(fd)
            fd = -1
            yield kept
    finally:
        if fd >= 0:
            os.close(fd)
        if parent is not None:
            parent.close()


def make_image(directory: Path, size: int = IMAGE_BYTES) -> Path:
    path = directory / "image"
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize("queues", [1, 3])
def test_X_no_acknowledged_write_is_lost_in_kills(tmp_path: Path, queues: int) -> None:
    """Killed at any moment: every acknowledged block is in the image, no request fails, none is left unanswered."""
    kills = KILLS if queues == 1 else KILLS // 4
    image = make_image(tmp_path)
    with disk(tmp_path, image, queues=queues) as kept:
        tally = kill_under_load(kept, image, kills, queues=queues)
        assert kept.status()["restarts"] == kills
    print(f"{tally.kills} kills, {tally.acknowledged} acknowledged writes, {len(tally.lost)} lost")
    assert tally.lost == []
    assert tally.errors == 0
    assert tally.acknowledged > kills * BETWEEN_KILLS


def test_X_the_harness_catches_an_early_acknowledgement(tmp_path: Path) -> None:
    """A worker that answers before it writes loses writes, and the check sees it."""
    image = make_image(tmp_path)
    mutant = (sys.executable, "-P", "-m", "tests.framework.mutant")
    with disk(tmp_path, image, command=mutant) as kept:
        tally = kill_under_load(kept, image, 20)
    assert tally.lost, f"{tally.kills} kills of a broken worker, and nothing was noticed"


@pytest.fixture(params=["tmpfs", "ext4"])
def full(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A small file system that will be full."""
    path = tmp_path / "full"
    path.mkdir()
    if request.param == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", path], check=True)
    else:
        small = tmp_path / "ext4"
        subprocess.run(["truncate", "-s", "4M", small], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", small], check=True)
        subprocess.run(["mount", "-o", "loop", small, path], check=True)
        (path / "ballast").write_bytes(bytes(5 << 19))
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def write(rig: Rig, block: int, generation: int) -> int:
    """One write; its status."""
    request = struct.pack("<IIQ", 1, 0, block * BLOCK // 512) + stamp(block, generation)
    return rig.request(request, 1)[0]


def told_of(kept: Kept) -> dict[str, Any]:
    """The one event of a full disk."""
    deadline = time.monotonic() + 10
    while not (told := [event for event in kept.events if event["event"] == "disk_full"]):
        assert time.monotonic() < deadline, "nobody was told"
        kept.ask("status")
    (event,) = told
    return event


def fill(rig: Rig, image: Path) -> list[int]:
    """Write 400 blocks, more than there is room for, and retry 200 times; returns what was taken and is there."""
    outcomes = [write(rig, block, block + 1) for block in range(400)]
    assert {write(rig, 399, 1) for _ in range(200)} == {IOERR}
    good = [block for block, status in enumerate(outcomes) if status == 0]
    assert set(outcomes) == {0, IOERR} and 0 < len(good) < 400
    data = image.read_bytes()
    assert all(data[block * BLOCK : (block + 1) * BLOCK] == stamp(block, block + 1) for block in good)
    return good


def test_X_a_full_disk_acknowledges_nothing_it_has_not(tmp_path: Path, full: Path) -> None:
    """ENOSPC: an I/O error for the guest, no false acknowledgement, one event, and it goes on when there is room."""
    image = make_image(full, 4 << 20)
    with disk(tmp_path, image) as kept, Rig(Link(kept, "disk")) as rig:
        fill(rig, image)
        event = told_of(kept)
        assert (event["device"], event["why"], event["quota_bytes"]) == ("disk", "host", None)
        if (full / "ballast").exists():
            (full / "ballast").unlink()
        else:
            subprocess.run(["mount", "-o", "remount,size=8m", full], check=True)
        assert write(rig, 399, 1) == 0
        assert told_of(kept) == event


def test_X_a_full_quota_acknowledges_nothing_it_has_not(tmp_path: Path) -> None:
    """As a full disk; what was written stays writable, and the image is never larger than the quota."""
    image = make_image(tmp_path, 4 << 20)
    with disk(tmp_path, image, quota_bytes=1 << 20) as kept, Rig(Link(kept, "disk")) as rig:
        good = fill(rig, image)
        event = told_of(kept)
        assert (event["device"], event["why"], event["quota_bytes"]) == ("disk", "quota", 1 << 20)
        assert 0 < event["used_bytes"] <= 1 << 20
        assert image.stat().st_blocks * 512 <= 1 << 20
        assert write(rig, good[0], 7) == 0
        discard = struct.pack("<IIQQII", 11, 0, 0, good[1] * BLOCK // 512, 8, 0)
        assert rig.request(discard, 1) == b"\0"
        assert write(rig, 399, 1) == 0
        assert told_of(kept) == event


@pytest.mark.parametrize("nth", [1, 2, 5])
@pytest.mark.parametrize("call", ["pwritev2", "fdatasync"])
def test_X_an_io_error_is_never_success(tmp_path: Path, nth: int, call: str) -> None:
    """EIO on every n-th call of the real worker (strace): what was answered with 0 is in the image.

    A failed sync latches: no later flush claims that anything is durable. The worker is not sandboxed: strace makes
    a call fail by changing its number to -1, which the filter kills.
    """
    assert shutil.which("strace"), "apt-get install strace"
    image = make_image(tmp_path, 1 << 20)
    calls = (
        f"{call},pwritev" if call == "pwritev2" else call
    )  # the C library takes the older one without flags
    strace = ("strace", "-f", "-qqq", "-o", "/dev/null", "-e", f"trace={calls}")
    command = (*strace, "-e", f"inject={calls}:error=EIO:when={nth}+{nth}", sys.executable, "-P", "-m")
    traced = (*command, "tests.framework.synchronous")
    with (
        disk(tmp_path, image, command=traced, sandbox="off") as kept,
        Rig(Link(kept, "disk")) as rig,
    ):
        flush = struct.pack("<IIQ", 4, 0, 0)
        outcomes = []
        flushes = []
        for block in range(20):
            outcomes.append(write(rig, block, block + 1))
            flushes.append(rig.request(flush, 1)[0])
        data = image.read_bytes()
    for block, status in enumerate(outcomes):
        if status == 0:
            assert data[block * BLOCK : (block + 1) * BLOCK] == stamp(block, block + 1), block
    if call == "fdatasync":
        assert IOERR not in outcomes
        first = flushes.index(IOERR)
        assert first == nth - 1 and set(flushes[first:]) == {IOERR}
    else:
        assert IOERR in outcomes and (nth == 1) == (0 not in outcomes)
        assert set(flushes) == {0}


@pytest.mark.parametrize("mode", ["no flush", "write through", "write back"])
def test_X_write_through_answers_what_is_durable(tmp_path: Path, mode: str) -> None:
    """A driver that cannot flush, or chose not to need it: each write is durable (strace) before it is answered."""
    image = make_image(tmp_path, 1 << 20)
    trace = tmp_path / "trace"
    strace = ("strace", "-f", "-qqq", "-o", trace, "-e", "trace=pwritev2,fdatasync,fallocate")
    command = (*strace, sys.executable, "-P", "-m", "tests.framework.synchronous")
    features = (1 << 64) - 1
    if mode == "no flush":
        features &= ~int(BlkFeature.FLUSH)
    with (
        disk(tmp_path, image, command=command, sandbox="off") as kept,
        Rig(Link(kept, "disk"), features=features) as rig,
    ):
        if mode == "write through":
            rig.frontend.set_config(WRITEBACK_OFFSET, b"\0")
        for _ in range(2):
            assert write(rig, 3, 1) == 0
            discard = struct.pack("<IIQQII", 11, 0, 0, 0, 8, 0)
            assert rig.request(discard, 1) == b"\0"
            kept.ask("kill_worker")
    calls = [line.split()[1].partition("(")[0] for line in trace.read_text().splitlines() if "(" in line]
    writes = [line for line in trace.read_text().splitlines() if "pwritev2" in line]
    is_durable = mode != "write back"
    assert len(writes) == 2 and all(("RWF_DSYNC" in line) == is_durable for line in writes)
    assert calls.count("fdatasync") >= 2 if is_durable else "fdatasync" not in calls


def test_X_an_image_has_one_writer(tmp_path: Path) -> None:
    """A second worker on the same image does not serve it, and the first is not disturbed."""
    image = make_image(tmp_path, 1 << 20)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with disk(tmp_path / "one", image) as first, Rig(Link(first, "disk")) as rig:
        with disk(tmp_path / "two", image) as second:
            deadline = time.monotonic() + 10
            while "in use by another writer" not in second.log.read_text():
                assert time.monotonic() < deadline, "the second worker serves the image too"
                time.sleep(0.01)
        assert write(rig, 3, 1) == 0
