"""Measured boot under UEFI: OVMF and the kernel's EFI stub measure beside us, and everything replays."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

import pytest

from rayos_tpm import event_log, pcr
from tests.integration.tpm import uefi
from tests.integration.tpm.machine import APPEND, CACHE, Bench

pytestmark = pytest.mark.guest
OpenBench = Callable[..., AbstractAsyncContextManager[Bench]]


@pytest.mark.parametrize(("profile", "boots"), [("host-reserved", 3), ("seed", 1)])
async def test_uefi_guest_sees_the_replay(open_bench: OpenBench, profile: str, boots: int) -> None:
    """All registers equal the replay over resets, and with host-reserved the firmware's own log replays alone."""
    files = uefi.build(CACHE)
    async with open_bench("ovmf") as bench:
        bench.kernel = files.kernel
        shutil.copy(files.variables, bench.directory / "vars")
        tpm = await bench.start_tpm(profile=profile)
        boot = [
            "-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={files.code}",
            "-drive", f"if=pflash,format=raw,unit=1,file={bench.directory / 'vars'}",
            "-kernel", str(files.kernel), "-initrd", str(bench.initrd), "-append", APPEND,
        ]  # fmt: skip
        async with bench.boot(tpm, boot=boot, extra=["-m", "512M"]) as machine:
            seen = []
            for number in range(boots):
                if number:
                    await machine.execute("system_reset")
                await machine.ready()
                values, log = await machine.pcrs(), await tpm.client.log()
                replayed = event_log.replay(log.entries)
                if profile == "seed":
                    replayed |= dict.fromkeys(pcr.DYNAMIC, pcr.ONES)
                assert values == replayed
                assert log.missing == 0
                seen.append(values)
            assert all(values == seen[0] for values in seen)
            events = event_log.decode(await machine.firmware_log())
            if profile == "host-reserved":
                own = pcr.replay(
                    (event.pcr, event.digest) for event in events if event.extends and event.digest
                )
                assert all(values[index] == own[index] for index in range(10))
            names = event_log.describe_guest(log.entries, events)
            assert any("EV_EFI" in name for name in names)
            assert (await tpm.client.quote(b"n")).values[7] == values[7]
