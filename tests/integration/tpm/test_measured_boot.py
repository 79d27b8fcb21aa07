"""Measured boot on real QEMU: what the guest sees is what we logged, boot after boot, and nothing unmeasured runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest
import trio

from rayos_tpm import command, event_log, pcr
from rayos_tpm.artefact import ArtefactStore
from rayos_tpm.command import Code
from rayos_tpm.event_log import Source
from rayos_tpm.phase import Phase
from rayos_tpm.protocol import TpmState
from tests.integration.tpm.machine import APPEND, Bench

pytestmark = pytest.mark.guest
OpenBench = Callable[..., AbstractAsyncContextManager[Bench]]


@pytest.mark.parametrize(
    ("firmware", "profile", "model"),
    [("qboot", "seed", "tpm-crb"), ("seabios", "seed", "tpm-tis"), ("seabios", "host-reserved", "tpm-crb")],
)
async def test_guest_sees_the_replay_over_three_boots(
    open_bench: OpenBench, firmware: str, profile: str, model: str
) -> None:
    """All 24 registers of the guest equal the replay of the log, before and after resets."""
    async with open_bench(firmware) as bench:
        tpm = await bench.start_tpm(profile=profile)
        async with bench.boot(tpm, model=model) as machine:
            seen = []
            for number in range(3):
                if number:
                    await machine.execute("system_reset")
                await machine.ready()
                values = await machine.pcrs()
                log = await tpm.client.log()
                replayed = event_log.replay(log.entries)
                if profile == "seed":  # no D-RTM sequence: registers 17 to 22 stay all ones
                    replayed |= dict.fromkeys(pcr.DYNAMIC, pcr.ONES)
                assert values == replayed
                assert log.missing == 0
                seen.append(values)
            assert seen[0] == seen[1] == seen[2]
            host = [entry for entry in log.entries if entry.source is Source.HOST and entry.phase]
            assert {entry.phase for entry in host} == set(Phase)


async def test_firmware_measures_as_without_us(open_bench: OpenBench) -> None:
    """SeaBIOS takes the rewritten Startup for success: it logs its events, and the platform stays enabled."""
    async with open_bench("seabios") as bench:
        tpm = await bench.start_tpm()
        async with bench.boot(tpm) as machine:
            await machine.ready()
            events = event_log.decode(await machine.firmware_log())
            assert {event.pcr for event in events if event.extends} >= set(range(8))
            replayed = pcr.replay(
                (event.pcr, event.digest) for event in events if event.extends and event.digest
            )
            values = await machine.pcrs()
            for index in (1, 2, 3, 5, 6, 7):  # the registers that are the firmware's alone
                assert values[index] == replayed[index]
            host = [entry for entry in (await tpm.client.log()).entries if entry.source is Source.HOST]
            both = pcr.replay(
                [(entry.pcr, entry.digest) for entry in host]
                + [(event.pcr, event.digest) for event in events if event.extends and event.digest]
            )
            assert all(values[index] == both[index] for index in range(10))
            # And the firmware's log explains what the proxy saw the guest extend.
            log = await tpm.client.log()
            assert any("EV_SEPARATOR" in name for name in event_log.describe_guest(log.entries, events))


async def test_quotes_during_boot_do_not_disturb(open_bench: OpenBench) -> None:
    """Quotes on demand all through the boot succeed, and the guest comes up with the registers of a quiet boot."""
    async with open_bench() as bench:
        tpm = await bench.start_tpm(quote_interval_s=0.05)
        async with bench.boot(tpm) as machine, trio.open_nursery() as nursery:
            taken = 0

            async def quote_on() -> None:
                nonlocal taken
                await tpm.client.wait_change(TpmState.WAITING)
                while True:
                    await tpm.client.quote(b"n")
                    taken += 1
                    await trio.sleep(0.02)

            nursery.start_soon(quote_on)
            await machine.ready()
            nursery.cancel_scope.cancel()
            assert taken > 20
        status = tpm.client.last_status()
        assert status.quote_error == ""


async def test_flipped_byte_is_refused_by_name(open_bench: OpenBench) -> None:
    """A kernel that is not the allowed one never runs an instruction: QEMU exits, and the reason names it."""
    async with open_bench() as bench:
        good = {item.phase: [item.digest] for item in bench.measurements()}
        flipped = bytearray(bench.kernel.read_bytes())
        flipped[-1] ^= 1
        bench.kernel = bench.directory / "flipped"
        bench.kernel.write_bytes(flipped)
        tpm = await bench.start_tpm(allowed=good)
        with pytest.raises((EOFError, BrokenPipeError, ConnectionResetError, trio.BrokenResourceError)):
            async with bench.boot(tpm) as machine:
                await machine.ready()
        status = tpm.client.last_status()
        assert "kernel flipped (kernel) has SHA-256" in status.reason
        assert "TPM result for CMD_INIT: 0x9" in (tpm.run_dir / "qemu.log").read_text()


async def test_qemu_boots_the_sealed_bytes(open_bench: OpenBench) -> None:
    """A file exchanged between measurement and boot changes nothing: QEMU reads the sealed copy."""
    async with open_bench() as bench:
        store = ArtefactStore()
        path = bench.directory / "kernel"
        path.write_bytes(bench.kernel.read_bytes())
        with store.open(path) as kernel, store.open(bench.initrd) as initrd:
            path.write_bytes(b"exchanged")
            tpm = await bench.start_tpm(
                measurements=[kernel.measurement(Phase.KERNEL), initrd.measurement(Phase.INITRD)]
            )
            boot = ["-bios", "qboot.rom", "-kernel", f"/proc/self/fd/{kernel.descriptor}",
                    "-initrd", f"/proc/self/fd/{initrd.descriptor}", "-append", APPEND]  # fmt: skip
            async with bench.boot(tpm, boot=boot, pass_fds=[kernel.descriptor, initrd.descriptor]) as machine:
                await machine.ready()
                assert (await machine.pcrs())[8] == pcr.extend(pcr.ZERO, kernel.digest)
        store.close()


async def test_log_overflow_refuses_the_launch(open_bench: OpenBench) -> None:
    """The 257th event has no room in the log, so nothing runs."""
    async with open_bench() as bench:
        last = bench.measurements()[-1]
        tpm = await bench.start_tpm(measurements=[last] * 257)
        with pytest.raises((EOFError, BrokenPipeError, ConnectionResetError, trio.BrokenResourceError)):
            async with bench.boot(tpm) as machine:
                await machine.ready()
        assert "holds its 256 host entries" in tpm.client.last_status().reason


async def test_migration_to_a_file_and_back_keeps_registers(open_bench: OpenBench) -> None:
    """The restored guest has its registers and its log, nothing was injected; the next reset measures again."""
    async with open_bench() as bench:
        tpm = await bench.start_tpm()
        async with bench.boot(tpm) as machine:
            await machine.ready()
            before = await machine.pcrs()
            await machine.execute("stop")
            await machine.execute("migrate", uri=f"file:{bench.directory}/vm")
            with trio.fail_after(60):
                await machine.until("query-migrate", "completed")
            await machine.execute("quit")
            await tpm.process.wait()
        tpm = await bench.start_tpm()
        async with bench.boot(tpm, extra=["-incoming", f"file:{bench.directory}/vm"]) as machine:
            with trio.fail_after(60):
                await machine.until("query-status", "paused")
            await machine.execute("cont")
            status = await tpm.client.status()
            assert (status.state, status.reason) == (TpmState.RESTORED, "")
            assert await machine.pcrs() == before
            assert event_log.replay((await tpm.client.log()).entries)[8] == before[8]
            await machine.execute("system_reset")
            await machine.ready()
            assert await machine.pcrs() == before
            assert (await tpm.client.status()).state is TpmState.MEASURED


async def test_death_of_swtpm_is_noticed(open_bench: OpenBench) -> None:
    """A killed swtpm marks the VM, attestation is unavailable, and a reset does not run unmeasured."""
    async with open_bench() as bench:
        tpm = await bench.start_tpm()
        async with bench.boot(tpm) as machine:
            await machine.ready()
            status = await tpm.client.status()
            await trio.run_process(["kill", "-9", str(status.swtpm_pid)])
            status = await tpm.client.wait_change(TpmState.MEASURED)
            assert status.state is TpmState.FAILED
            assert "ended with signal 9" in status.reason
            with pytest.raises(Exception, match="attestation unavailable: the TPM is failed"):
                await tpm.client.quote(b"")
            answer = await machine.command(command.command(Code.GetRandom, parameters=b"\0\x08"))
            assert answer == command.error_response(command.RC_FAILURE)
            with contextlib.suppress(trio.BrokenResourceError):  # QEMU may be gone before it answers
                await machine.execute("system_reset")
            with trio.fail_after(30):
                assert await machine.process.wait() != 0


async def test_death_of_the_proxy_takes_swtpm_along(open_bench: OpenBench) -> None:
    """No swtpm outlives the process that watches it, and its state opens again."""
    async with open_bench() as bench:
        tpm = await bench.start_tpm()
        await trio.run_process(["kill", "-9", str(tpm.process.pid)])
        await tpm.process.wait()
        assert (await tpm.client.wait_change(TpmState.WAITING)).state is TpmState.ENDED
        with trio.fail_after(5):
            again = await bench.start_tpm()
        await again.stop()
