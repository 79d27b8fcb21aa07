"""swtpm's life: started quickly, refused on bad state, accepted by QEMU, found again, ended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import trio

from images import qemu
from images.cache import Cache
from tpm import state
from tpm.errors import StateError
from tpm.qemu import qemu_arguments
from tpm.swtpm import SwtpmProcess, is_ours, start_swtpm, stop_swtpm

UUID = "5b0a2f1e-7c55-4a0e-9d7b-0d4c2c1f0001"
KEY = bytes(range(32))


async def _made(directory: Path) -> Path:
    """A state directory with a TPM in it, at rest."""
    swtpm = await start_swtpm(directory / "state", directory / "s", None, vm_uuid=UUID, key=KEY)
    await stop_swtpm(swtpm)
    return directory / "state"


async def test_is_found_again_by_pid_start_time_and_socket(tmp_path: Path) -> None:
    """A record of two numbers and a path is enough for a new service; another start time is not it."""
    swtpm = await start_swtpm(tmp_path / "state", tmp_path / "s", None, vm_uuid=UUID)
    assert is_ours(SwtpmProcess(swtpm.pid, swtpm.started, swtpm.control))
    assert not is_ours(SwtpmProcess(swtpm.pid, swtpm.started + 1, swtpm.control))
    assert os.getsid(swtpm.pid) == swtpm.pid
    await stop_swtpm(swtpm)
    assert not is_ours(swtpm)
    assert not swtpm.control.exists()


async def test_locked_state_is_refused(tmp_path: Path) -> None:
    """A second swtpm on the same state is refused and the sentence names the first."""
    swtpm = await start_swtpm(tmp_path / "state", tmp_path / "s", None, vm_uuid=UUID)
    try:
        with pytest.raises(StateError, match=f"in use by process {swtpm.pid}"):
            await start_swtpm(tmp_path / "state", tmp_path / "t", None, vm_uuid=UUID)
    finally:
        await stop_swtpm(swtpm)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
async def test_damaged_state_is_refused(tmp_path: Path, damage: str) -> None:
    """Encrypted state that lost or changed a byte never starts, and nothing is left running."""
    directory = await _made(tmp_path)
    path = directory / state.PERMANENT
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[:-100], "empty": b"", "flipped": whole[:500] + b"!" + whole[501:]}[damage]
    )
    with pytest.raises(StateError, match="damaged, truncated or has another key"):
        await start_swtpm(directory, tmp_path / "s", tmp_path / "log", vm_uuid=UUID, key=KEY)
    assert not (tmp_path / "s").exists()


async def test_foreign_state_is_refused(tmp_path: Path) -> None:
    """Another VM's state, another key, state without our record and a symlink are each refused."""
    directory = await _made(tmp_path)
    with pytest.raises(StateError, match=f"is the TPM of VM {UUID}"):
        await start_swtpm(directory, tmp_path / "s", None, vm_uuid="other", key=KEY)
    with pytest.raises(StateError, match="another key"):
        await start_swtpm(directory, tmp_path / "s", None, vm_uuid=UUID, key=bytes(32))
    (tmp_path / "link").symlink_to(directory)
    with pytest.raises(StateError, match="symbolic link"):
        await start_swtpm(tmp_path / "link", tmp_path / "s", None, vm_uuid=UUID, key=KEY)
    (directory / state.RECORD).unlink()
    with pytest.raises(StateError, match="did not make"):
        await start_swtpm(directory, tmp_path / "s", None, vm_uuid=UUID, key=KEY)


async def test_wipe_removes_everything(tmp_path: Path) -> None:
    """After a VM's removal nothing of its TPM is on disk."""
    directory = await _made(tmp_path)
    state.wipe(directory)
    assert not directory.exists()
    state.wipe(directory)


@pytest.mark.guest
@pytest.mark.parametrize("model", ["tpm-crb", "tpm-tis"])
async def test_qemu_accepts_it_and_ends_it(tmp_path: Path, model: str) -> None:
    """QEMU starts with both device models, query-tpm answers, and swtpm ends when QEMU does."""
    found = qemu.find(Cache(Path("/var/cache/rayos")))
    swtpm = await start_swtpm(tmp_path / "state", tmp_path / "s", None, vm_uuid=UUID, key=KEY)
    try:
        answer = await trio.run_process(
            [*found.argv, "-accel", "tcg", "-machine", "q35", "-nodefaults", "-display", "none", "-qmp", "stdio",
             *qemu_arguments(swtpm.control, model)],
            stdin=b'{"execute":"qmp_capabilities"}{"execute":"query-tpm"}{"execute":"quit"}',
            capture_stdout=True, capture_stderr=True, check=False,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr.decode()
        assert any(
            reply["return"][0]["model"] == model
            for reply in map(json.loads, answer.stdout.splitlines())
            if isinstance(reply.get("return"), list)
        )
        assert await swtpm.process.wait() == "exit status 0"
    finally:
        await stop_swtpm(swtpm)
