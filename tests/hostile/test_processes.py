"""The service's own processes: what each may still do, who owns the state, and what happens when one dies.

The rows P of the threat model.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import trio

from rayos_tpm.client import TpmClient
from rayos_vmm.errors import Busy, GuestGone
from rayos_vmm.events import Event
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.host.process import stat_fields
from rayos_vmm.machine.view import ExitReason, VmState
from rayos_vmm.testing.daemon import PrivateDaemon
from rayos_vmm.testing.guest import Guest
from rayos_vmm.testing.pytest_plugin import GuestFactory
from tests.integration.service_lab import home, lab

pytestmark = [pytest.mark.guest, pytest.mark.root]

#: Seconds in which a death is known; it takes some 20 ms where nobody else is at work.
DEATH_LIMIT_S: Final = 3.0
_PARENT_FIELD: Final = 4  # proc_pid_stat(5)


def qemu_img(*arguments: str) -> int:
    return subprocess.run(["qemu-img", *arguments], check=False).returncode


def storage_daemon(image: Path) -> int:
    """The process that shows an image which is not raw."""
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"qemu-storage-daemon") and any(bytes(image) in word for word in words):
                return int(process.name)
    raise AssertionError(f"nobody shows {image}")


async def keeper_of(runtime: Path) -> int:
    client = KeeperClient(runtime)
    try:
        return int((await client.status())["pid"])
    finally:
        client.close()


async def tpm_processes(runtime: Path) -> tuple[int, int]:
    """The TPM process and its swtpm."""
    swtpm = (await TpmClient(runtime).status()).swtpm_pid
    return int(stat_fields(swtpm)[_PARENT_FIELD]), swtpm


async def event_of(guest: Guest, kind: str, state: str) -> Event:
    """The machine's first event of a type with that state."""
    with trio.fail_after(DEATH_LIMIT_S):
        async with guest.client.events(since=0) as events:
            async for event in events:
                if (event.type, event.vm, event.data.get("state")) == (kind, guest.name, state):
                    return event
    raise AssertionError("the events ended")


async def test_P3_a_state_directory_has_one_service() -> None:
    """Also where the second one brings a runtime directory of its own: it would take the first one's guests away."""
    async with home() as paths, lab(paths):
        other = replace(paths, runtime=paths.runtime.with_name("other"))
        with pytest.raises(Busy, match=f"another service .* runs on {paths.state}"):
            async with lab(other):
                pass


async def test_P6_a_tpm_that_died_has_failed(
    guest_factory: GuestFactory, rayos_daemon: PrivateDaemon
) -> None:
    """Killed swtpm, killed TPM process: the TPM says which and how, its machine goes on and says it too."""
    for kills_swtpm in (True, False):
        async with guest_factory(gpu={"enabled": False}, net={"enabled": False}) as guest:
            runtime = rayos_daemon.paths.vm_runtime(guest.name)
            process, swtpm = await tpm_processes(runtime)
            os.kill(swtpm if kills_swtpm else process, signal.SIGKILL)
            event = await event_of(guest, "vm.tpm", "failed")
            expected = (
                f"swtpm (process {swtpm}) ended with signal 9"
                if kills_swtpm
                else f"the TPM process (process {process}) died of SIGKILL"
            )
            assert expected in event.data["reason"]
            status = await TpmClient(runtime).status()
            assert (status.state, status.reason) == ("failed", event.data["reason"])
            view = await guest.view()
            assert view.state is VmState.RUNNING and view.reason == f"its TPM failed: {event.data['reason']}"
            assert (await guest.succeed("echo here")).strip() == "here"


async def test_P6_a_machine_whose_keeper_died_has_failed(
    guest_factory: GuestFactory, rayos_daemon: PrivateDaemon
) -> None:
    """Its devices are gone for good; whoever waits for it learns which process died, and of what."""
    async with guest_factory(net={"enabled": False}, tpm=False) as guest:
        keeper = await keeper_of(rayos_daemon.paths.vm_runtime(guest.name))
        os.kill(keeper, signal.SIGKILL)
        event = await event_of(guest, "vm.state", "failed")
        reason = f"its devices' keeper (process {keeper}) died of SIGKILL"
        assert (event.data["reason"], event.data["exit_reason"]) == (reason, "devices_lost")
        view = await guest.client.wait(guest.name, "stopped")
        assert (view.exit_reason, view.reason) == (ExitReason.DEVICES_LOST, reason)
        with pytest.raises(GuestGone, match=str(keeper)):
            await guest.client.wait(guest.name, "ready")


async def test_P6_a_machine_whose_disk_reader_died_has_failed(
    guest_factory: GuestFactory, tmp_path: Path
) -> None:
    """Under writes, by its daemon's death: what the guest had on the disk is not damaged."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", str(image), "64M")
    options = {"gpu": {"enabled": False}, "net": {"enabled": False}, "tpm": False}
    async with guest_factory(disks=[{"path": str(image), "format": "qcow2"}], **options) as guest:
        await guest.succeed("dd if=/dev/urandom of=/dev/vda bs=64k count=64 conv=fsync 2>/dev/null")
        await guest.succeed(
            "sh -c 'while dd if=/dev/zero of=/dev/vda bs=64k seek=128 count=512 oflag=direct; do :; done' "
            ">/dev/null 2>&1 &"
        )
        daemon = storage_daemon(image)
        os.kill(daemon, signal.SIGKILL)
        event = await event_of(guest, "vm.state", "failed")
        reader = int(str(event.data["reason"]).partition("(process ")[2].partition(")")[0])
        assert event.data["reason"] == f"the reader of its disk (process {reader}) died of SIGKILL"
        assert event.data["exit_reason"] == "devices_lost"
    # Clusters that were allocated and not yet named are leaks (status 3); errors would be 2.
    assert qemu_img("check", "-q", str(image)) in (0, 3)
