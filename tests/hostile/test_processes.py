"""The service's own processes: what each may still do, who owns the state, and what happens when one dies.

The rows P of the threat model.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import trio

from rayos_tpm.client import TpmClient
from rayos_tpm.protocol import Config
from rayos_vmm.cli.verify import processes, verify
from rayos_vmm.client.client import Client
from rayos_vmm.config.spec import Disk, VmSpec
from rayos_vmm.errors import Busy, GuestGone
from rayos_vmm.events import Event
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.host.probe import seen, shortfalls
from rayos_vmm.host.process import stat_fields
from rayos_vmm.machine.view import ExitReason, VmState
from rayos_vmm.paths import Paths, default_paths
from rayos_vmm.testing.daemon import PrivateDaemon
from rayos_vmm.testing.guest import Guest
from rayos_vmm.testing.leftovers import session_mark, unique_name
from rayos_vmm.testing.pytest_plugin import GuestFactory
from rayos_vmm.worker import tpm_process
from tests.framework.probe import attempt
from tests.integration.service_lab import home, lab

pytestmark = [pytest.mark.guest, pytest.mark.root]

#: Seconds in which a death is known; it takes some 20 ms where nobody else is at work.
DEATH_LIMIT_S: Final = 3.0
#: A user that no machine has: past the slots.
UID: Final = 1_900_090_001
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


# -- P1: what a careless shell leaves to the daemon that it starts ------------------------------------------------


@asynccontextmanager
async def careless_daemon() -> AsyncIterator[Paths]:
    """A daemon of a shell with a umask of nothing and a secret file open, twice."""
    directory = Path("/tmp") / unique_name(session_mark())
    directory.mkdir(mode=0o700)
    paths = replace(default_paths(), state=directory / "state", runtime=directory / "run")
    (directory / "rayos.toml").write_text(f'[service]\nbridge = "{directory.name}"\n')
    script = 'umask 000; exec 9</etc/shadow 200</etc/shadow; exec "$@"'
    serve = [sys.executable, "-P", "-m", "rayos_vmm.cli", "serve", "--config", str(directory / "rayos.toml")]
    places = {"RAYOS_STATE_DIR": str(paths.state), "RAYOS_RUNTIME_DIR": str(paths.runtime)}
    process = await trio.lowlevel.open_process(
        ["/bin/bash", "-c", script, "bash", *serve],
        env={**os.environ, **places},
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with process.stderr:
            said = b""
            with trio.fail_after(60):
                while b"rayos serves on" not in said:
                    said += await process.stderr.receive_some() or pytest.fail(f"it ended: {said!r}")
            yield paths
            for view in await Client(paths.api_socket).machines():
                await Client(paths.api_socket).act(view.spec.name, "kill")
            process.send_signal(signal.SIGTERM)
            with trio.fail_after(20):
                assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        shutil.rmtree(directory)


def family(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [each for child in children.read_text().split() for each in family(int(child))]
    return found


def loose(directory: Path) -> list[str]:
    """Paths that somebody else may read, write or look into."""
    return [
        f"{path} {path.lstat().st_mode:o}"
        for path in (directory, *directory.rglob("*"))
        if not path.is_symlink() and path.lstat().st_mode & 0o077
    ]


async def test_P1_a_careless_shell_gives_nothing_away(tmp_path: Path) -> None:
    """Descriptors, umask: no process of the service has the secret, no file is anybody else's; no fault is found."""
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", str(image), "64M")
    async with careless_daemon() as paths:
        client = Client(paths.api_socket)
        disks = [Disk(size="8MiB"), Disk(path=str(image), format="qcow2")]
        await client.create(VmSpec(name="p", disks=disks), start=True)
        view = await client.wait("p", "ready")
        daemon = int((paths.runtime / "daemon.lock").read_text())
        everybody = {*family(daemon), *(pid for _, pid in await processes(view, paths))}
        kinds = [kind for kind, _ in await processes(view, paths)]
        assert sorted(set(kinds)) == ["keeper", "qemu", "reader", "swtpm", "tpm", "worker"]
        holders = [pid for pid in everybody if "/etc/shadow" in seen(pid).files]
        assert holders == []
        assert loose(paths.state) + loose(paths.runtime) == []
        looked = await verify(client, paths)
        assert [entry for entry in looked if entry[2]] == []
        assert len(looked) >= len(kinds)


def test_P1_what_falls_short_is_named() -> None:
    """A process without any confinement, which is this one, has a sentence for each layer."""
    faults = "; ".join(shortfalls("worker", seen(os.getpid()), []))
    for word in (
        "user 0",
        "capabilities",
        "can gain",
        "gain privileges",
        "no filter",
        "host's network",
        "root",
    ):
        assert word in faults


# -- P2: a TPM process that was taken over ------------------------------------------------------------------------


def read_another(other: Path, _pid: int) -> None:
    (other / "secret").read_bytes()


def write_another(other: Path, _pid: int) -> None:
    (other / "new").write_bytes(b"here")


def read_the_host(_other: Path, _pid: int) -> None:
    Path("/etc/passwd").read_bytes()


def end_another(_other: Path, pid: int) -> None:
    os.kill(pid, 0)


def use_the_network(_other: Path, _pid: int) -> None:
    socket.socket(socket.AF_INET).close()


def start_a_program(_other: Path, _pid: int) -> None:
    os.posix_spawn("/bin/true", ["true"], {})


def become_root(_other: Path, _pid: int) -> None:
    os.setuid(0)


@pytest.mark.parametrize(
    "probe",
    [read_another, write_another, read_the_host, end_another, use_the_network, start_a_program, become_root],
    ids=lambda probe: probe.__name__,
)
def test_P2_a_tpm_process_reaches_its_state_alone(probe: Callable[[Path, int], None], tmp_path: Path) -> None:
    """Each works outside; inside it fails, or is the end of the process."""
    own, other = tmp_path / "own", tmp_path / "other"
    for directory in (own, other):
        directory.mkdir(mode=0o700)
    (other / "secret").write_bytes(b"secret")
    config = Config("uuid", str(own), str(tmp_path), str(tmp_path / "log"), "seed", [], uid=UID)

    def inside() -> None:
        tpm_process.confine(config)
        (own / "file").write_bytes(b"may")
        (own / "file").rename(own / "record")
        probe(other, os.getppid())

    assert attempt(lambda: probe(other, os.getpid()), None).succeeded
    outcome = attempt(inside, None)
    assert not outcome.succeeded and outcome.signal in (0, signal.SIGSYS), outcome
    assert (own / "record").read_bytes() == b"may" and (own / "record").stat().st_uid == UID


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
    guest_factory: GuestFactory, rayos_daemon: PrivateDaemon, tmp_path: Path
) -> None:
    """Its devices are gone for good; whoever waits for it learns which process died, and of what."""
    image = tmp_path / "image.qcow2"  # its reader ends with the keeper, and is not to blame
    qemu_img("create", "-q", "-f", "qcow2", str(image), "64M")
    disk = {"path": str(image), "format": "qcow2"}
    async with guest_factory(disks=[disk], net={"enabled": False}, tpm=False) as guest:
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


# -- P9, P10: workers that stop, disks that grow ------------------------------------------------------------------

#: Writes blocks with their number in them, again and again, and counts the rounds in /tmp/rounds.
WRITER: Final = """
n=0
while :; do
  n=$((n+1))
  dd if=/tmp/pattern of=/dev/vda bs=64k count=16 seek=16 oflag=direct 2>/dev/null || echo bad >>/tmp/bad
  dd if=/dev/vda bs=64k count=16 skip=16 iflag=direct 2>/dev/null | cmp -s - /tmp/pattern || echo bad >>/tmp/bad
  echo $n >/tmp/rounds
done
"""


async def rounds(guest: Guest) -> int:
    return int(await guest.succeed("cat /tmp/rounds"))


async def worker_of(runtime: Path) -> int:
    client = KeeperClient(runtime)
    try:
        return int((await client.status())["worker_pid"])
    finally:
        client.close()


async def test_P9_P10_a_stopped_worker_is_replaced_and_a_disk_grows_under_all_of_that(
    guest_factory: GuestFactory, rayos_daemon: PrivateDaemon
) -> None:
    """Under writes that are read back: a SIGSTOP, which its keeper notices; new sizes while workers are killed."""
    async with guest_factory(
        disk="64MiB", gpu={"enabled": False}, net={"enabled": False}, tpm=False
    ) as guest:
        await guest.write_file("/tmp/writer", WRITER.encode())
        await guest.succeed(
            "dd if=/dev/urandom of=/tmp/pattern bs=64k count=16 2>/dev/null; echo 0 >/tmp/rounds"
        )
        await guest.succeed("sh /tmp/writer >/dev/null 2>&1 &")
        await guest.wait_until_succeeds("[ $(cat /tmp/rounds) -gt 0 ]")
        runtime = rayos_daemon.paths.vm_runtime(guest.name)
        stopped = await worker_of(runtime)
        os.kill(stopped, signal.SIGSTOP)
        with trio.fail_after(60):
            async with guest.client.events(since=0) as events:
                async for event in events:
                    if event.type == "devices.worker_silent" and event.data["pid"] == stopped:
                        break
        before = await rounds(guest)
        assert await worker_of(runtime) != stopped
        await guest.wait_until_succeeds(f"[ $(cat /tmp/rounds) -gt {before + 1} ]")

        async with trio.open_nursery() as nursery:
            for mebibytes in range(65, 85):
                if mebibytes % 4 == 0:
                    nursery.start_soon(guest.kill_worker)
                await guest.client.resize_disk(guest.name, f"{mebibytes}MiB")
        await guest.wait_until_succeeds(f"[ $(blockdev --getsize64 /dev/vda) -eq {84 << 20} ]")
        last = await rounds(guest)
        await guest.wait_until_succeeds(f"[ $(cat /tmp/rounds) -gt {last + 1} ]")
        await guest.fail("cat /tmp/bad")
