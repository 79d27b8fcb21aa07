"""Starting a VM's TPM: refused on bad state with a clear sentence, found again by a new service, ended, wiped."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio

from rayos_tpm import state
from rayos_tpm.errors import StateError, TpmError, Unavailable
from rayos_tpm.launch import Tpm
from rayos_tpm.process import Process, start_time
from rayos_tpm.protocol import TpmState
from tests.integration.tpm.machine import UUID, Bench

OpenBench = Callable[..., AbstractAsyncContextManager[Bench]]


async def at_rest(bench: Bench) -> Path:
    """A state directory with a TPM in it, nothing running."""
    tpm = await bench.start_tpm()
    await tpm.stop()
    return bench.directory / "state-a"


async def test_outlives_its_service_and_is_found_again(open_bench: OpenBench) -> None:
    """With the spawner gone the TPM goes on; two numbers and a path attach a new service to it."""
    async with open_bench() as bench:
        tpm = await bench.start_tpm()
    assert os.getsid(tpm.process.pid) == tpm.process.pid
    for descriptor in (1, 2):  # it holds nothing of the service's open
        held = await trio.Path(f"/proc/{tpm.process.pid}/fd/{descriptor}").readlink()
        assert str(held) == str(tpm.run_dir / "tpm.log")
    found = Tpm(Process(tpm.process.pid, tpm.process.started), tpm.run_dir)
    assert found.is_ours()
    assert (await found.client.status()).state is TpmState.WAITING
    assert not Tpm(Process(tpm.process.pid, tpm.process.started + 1), tpm.run_dir).is_ours()
    swtpm = (await found.client.status()).swtpm_pid
    await found.client.stop()
    assert await found.process.wait() == "gone"
    assert start_time(swtpm) is None
    assert not found.is_ours()
    assert (await found.client.status()).state is TpmState.ENDED
    assert sorted(path.name for path in tpm.run_dir.iterdir()) == ["tpm-status.json", "tpm.log"]


async def test_state_in_use_is_refused(open_bench: OpenBench) -> None:
    """A second TPM on the same state is refused, and the sentence names the process that holds it."""
    async with open_bench() as bench:
        tpm = await bench.start_tpm()
        swtpm = (await tpm.client.status()).swtpm_pid
        with pytest.raises(StateError, match=f"in use by process {swtpm}"):
            await bench.start_tpm("b", state_dir=bench.directory / "state-a")
        await tpm.stop()


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped"])
async def test_damaged_state_is_refused(open_bench: OpenBench, damage: str) -> None:
    """State that lost or changed a byte never starts, and nothing is left running."""
    async with open_bench() as bench:
        path = await at_rest(bench) / state.PERMANENT
        whole = path.read_bytes()
        path.write_bytes(
            {"truncated": whole[:-100], "empty": b"", "flipped": whole[:500] + b"!" + whole[501:]}[damage]
        )
        with pytest.raises(StateError, match="damaged, truncated or has another key"):
            await bench.start_tpm()
        assert not (bench.directory / "run-a" / "tpm.sock").exists()


async def test_foreign_state_is_refused(open_bench: OpenBench, tmp_path: Path) -> None:
    """Another VM's state, another installation's, state without a record, and symlinks are each refused."""
    async with open_bench() as bench:
        directory = await at_rest(bench)
        with pytest.raises(StateError, match=f"is the TPM of VM {UUID}, not of other"):
            await bench.start_tpm(vm_uuid="other")
        (tmp_path / "elsewhere").mkdir()
        stranger = Bench(tmp_path / "elsewhere", bench.spawner)
        with pytest.raises(StateError, match="another key"):
            await stranger.start_tpm(state_dir=directory)
        (tmp_path / "link").symlink_to(directory)
        with pytest.raises(StateError, match="symbolic link"):
            await bench.start_tpm(state_dir=tmp_path / "link")
        inner = directory / "tpm2-01.permall"
        inner.symlink_to("/etc/passwd")
        with pytest.raises(StateError, match=r"tpm2-01\.permall is a symbolic link"):
            await bench.start_tpm()
        inner.unlink()
        record = (directory / state.RECORD).read_bytes()
        (directory / state.RECORD).write_bytes(record[:-5])
        with pytest.raises(StateError, match="is damaged"):
            await bench.start_tpm()
        (directory / state.RECORD).unlink()
        with pytest.raises(StateError, match="did not make"):
            await bench.start_tpm()
        (directory / state.RECORD).write_bytes(record)
        await (await bench.start_tpm()).stop()


async def test_interrupted_setup_starts_over(open_bench: OpenBench) -> None:
    """A TPM whose first set-up was cut off is set up anew, not used half done."""
    async with open_bench() as bench:
        directory = bench.directory / "state-a"
        directory.mkdir(mode=0o700)
        state.begin(directory)
        (directory / state.PERMANENT).write_bytes(b"half")
        tpm = await bench.start_tpm()
        assert (await tpm.client.identity()).ek_certificate
        await tpm.stop()


async def test_identity_stays_over_restarts_and_goes_with_a_wipe(open_bench: OpenBench) -> None:
    """Keys and certificate are the same after a restart; after the VM's removal they are gone."""
    async with open_bench() as bench:
        identities = []
        for wiped in (False, True, False):
            tpm = await bench.start_tpm()
            identities.append(await tpm.client.identity())
            await tpm.stop()
            if wiped:
                state.wipe(bench.directory / "state-a")
                assert not (bench.directory / "state-a").exists()
        assert identities[0] == identities[1] != identities[2]
        assert identities[0].ek_public != identities[2].ek_public


async def test_waits_for_qemu_only_so_long(open_bench: OpenBench) -> None:
    """A TPM that no QEMU ever comes to ends by itself: a service that died in between leaves nothing."""
    async with open_bench() as bench:
        tpm = await bench.start_tpm(connect_limit_s=0.05)
        with trio.fail_after(10):
            await tpm.process.wait()
        with pytest.raises(Unavailable, match="gone"):
            await tpm.client.pcrs()


async def test_bad_arguments_are_refused_before_anything_starts(
    open_bench: OpenBench, tmp_path: Path
) -> None:
    """Profile, policy size, socket path and comma in the state path."""
    async with open_bench() as bench:
        with pytest.raises(TpmError, match="profile 'x' is unknown"):
            await bench.start_tpm(profile="x")
        with pytest.raises(TpmError, match="257 bytes"):
            await bench.start_tpm(nv_policy=bytes(257))
        long = tmp_path / ("n" * 120)
        long.mkdir()
        with pytest.raises(ValueError, match="the kernel takes 107"):
            await bench.start_tpm(run_dir=long)
        with pytest.raises(StateError, match="comma"):
            await bench.start_tpm(state_dir=tmp_path / "a,b")


@pytest.mark.parametrize(
    "line",
    [b"\xff\n", b"{}\n", b'{"type":"nothing"}\n', b"[" * 100000 + b"\n", b'{"type":"quote","nonce":5}\n'],
)
async def test_nonsense_at_the_control_socket_is_answered(open_bench: OpenBench, line: bytes) -> None:
    """Each gets an error; the process goes on."""
    async with open_bench() as bench:
        tpm = await bench.start_tpm()
        async with await trio.open_unix_socket(tpm.run_dir / "tpm-control.sock") as stream:
            await stream.send_all(line)
            assert b'"error":{"kind":"TpmError"' in await stream.receive_some()
        assert (await tpm.client.status()).state is TpmState.WAITING
        await tpm.stop()


async def test_a_spawner_that_died_is_replaced(open_bench: OpenBench) -> None:
    """The next start finds another, and no zombie stays."""
    async with open_bench() as bench:
        killed = bench.spawner.process
        killed.send_signal(signal.SIGKILL)
        with trio.fail_after(30):
            tpm = await bench.start_tpm()
        assert (await tpm.client.status()).state is TpmState.WAITING
        assert bench.spawner.process != killed and start_time(killed.pid) != killed.started
        await tpm.stop()
