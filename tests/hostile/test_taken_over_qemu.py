"""A QEMU that was taken over, played by its own monitor: nothing it can be told to do reaches the host.

Each attack is first told to a QEMU that is started as a shell script would start it (root, no sandbox), where it must
work; then to one that our launcher started with our `-sandbox`. Needs root.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from rayos_images import qemu
from rayos_images.cache import Cache
from rayos_vmm.host.confine import Reach, confined, program_directories
from rayos_vmm.host.identity import user
from rayos_vmm.paths import default_paths
from rayos_vmm.qemu.arguments import SANDBOX
from rayos_vmm.testing.pytest_plugin import GuestFactory

UID: Final = user("qemu", 4000)
TIMEOUT_S: Final = 20.0


class Refused(Exception):
    """QEMU answered with an error."""


class Monitor:
    """QMP, one command at a time."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(TIMEOUT_S)
        self._file = sock.makefile("rw")
        self._file.readline()
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._file.flush()
        while line := self._file.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise Refused(answer["error"]["desc"])
            if "return" in answer:
                return answer["return"]
        raise Refused("QEMU is gone")


@contextmanager
def running(directory: Path, *, is_confined: bool) -> Iterator[Monitor]:
    """A QEMU without a guest, which is enough for its monitor."""
    found = qemu.find(Cache(default_paths().cache))
    ours, theirs = socket.socketpair()
    argv = [*found.argv, "-machine", "q35", "-m", "64M", "-nodefaults", "-no-user-config", "-display", "none"]
    argv += ["-S", "-chardev", f"socket,id=qmp,fd={theirs.fileno()}", "-mon", "chardev=qmp,mode=control"]
    if is_confined:
        argv = confined([*argv, "-sandbox", SANDBOX], Reach(read=program_directories(found.argv)), uid=UID)
    with (directory / "qemu.log").open("ab") as log:
        process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], stdout=log, stderr=log)
    theirs.close()
    try:
        with ours:
            yield Monitor(ours)
    finally:
        process.kill()
        process.wait()


#: An attack gets the monitor and a file of the host's that is there, one that is not, and a listening socket's path.
Attack = Callable[[Monitor, Path, Path, Path], None]


def evidence(path: Path) -> None:
    """Errors: AssertionError when the file that the attack should have made does not come."""
    deadline = time.monotonic() + 2
    while not path.exists():
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(0.01)


def migrated(run: Monitor, uri: str) -> None:
    run("migrate", uri=uri)
    deadline = time.monotonic() + TIMEOUT_S
    while (status := run("query-migrate").get("status")) not in ("completed", "failed"):
        assert time.monotonic() < deadline, status
        time.sleep(0.01)
    if status == "failed":
        raise Refused("the migration failed")


def blockdev_of_a_host_file(run: Monitor, there: Path, _new: Path, _sock: Path) -> None:
    run("blockdev-add", driver="raw", **{"node-name": "x"}, file={"driver": "file", "filename": str(there)})


def blockdev_create(run: Monitor, _there: Path, new: Path, _sock: Path) -> None:
    options = {"driver": "file", "filename": str(new), "size": 512}
    run("blockdev-create", **{"job-id": "x"}, options=options)
    evidence(new)


def migrate_to_a_program(run: Monitor, _there: Path, new: Path, _sock: Path) -> None:
    migrated(run, f"exec:cat >{new}")
    evidence(new)


def migrate_to_a_file(run: Monitor, _there: Path, new: Path, _sock: Path) -> None:
    migrated(run, f"file:{new}")
    evidence(new)


def save_memory(run: Monitor, _there: Path, new: Path, _sock: Path) -> None:
    run("pmemsave", val=0, size=4096, filename=str(new))
    evidence(new)


def dump_memory(run: Monitor, _there: Path, new: Path, _sock: Path) -> None:
    run("dump-guest-memory", paging=False, protocol=f"file:{new}")
    evidence(new)


def secret_of_a_file(run: Monitor, there: Path, _new: Path, _sock: Path) -> None:
    run("object-add", **{"qom-type": "secret", "id": "s", "file": str(there)})


def random_of_memory(run: Monitor, _there: Path, _new: Path, _sock: Path) -> None:
    run("object-add", **{"qom-type": "rng-random", "id": "r", "filename": "/dev/zero"})


def memory_in_a_file(run: Monitor, _there: Path, new: Path, _sock: Path) -> None:
    options = {"qom-type": "memory-backend-file", "id": "f", "size": 1 << 20, "share": True}
    run("object-add", **options, **{"mem-path": str(new)})
    evidence(new)


def chardev_to_a_file(run: Monitor, _there: Path, new: Path, _sock: Path) -> None:
    run("chardev-add", id="c", backend={"type": "file", "data": {"out": str(new)}})
    evidence(new)


def chardev_of_a_terminal(run: Monitor, _there: Path, _new: Path, _sock: Path) -> None:
    run("chardev-add", id="p", backend={"type": "pty", "data": {}})


def chardev_to_tcp(run: Monitor, _there: Path, _new: Path, _sock: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        address = {"type": "inet", "data": {"host": "127.0.0.1", "port": port}}
        data = {"addr": address, "server": False}
        run("chardev-add", id="t", backend={"type": "socket", "data": data})


def listen_on_tcp(run: Monitor, _there: Path, _new: Path, _sock: Path) -> None:
    address = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
    run("nbd-server-start", addr=address)


def unix(path: Path) -> dict[str, Any]:
    return {"addr": {"type": "unix", "data": {"path": str(path)}}, "server": False}


def chardev_to_a_unix_socket(run: Monitor, _there: Path, _new: Path, sock: Path) -> None:
    run("chardev-add", id="u", backend={"type": "socket", "data": unix(sock)})


def listen_on_a_unix_socket(run: Monitor, _there: Path, new: Path, _sock: Path) -> None:
    run("nbd-server-start", addr={"type": "unix", "data": {"path": str(new)}})
    evidence(new)


def network_with_a_script(run: Monitor, _there: Path, new: Path, _sock: Path) -> None:
    script = new.with_suffix(".sh")
    script.write_text(f"#!/bin/sh\necho here >{new}\n")
    script.chmod(0o755)
    run("netdev_add", type="tap", id="n", ifname="raytest%d", script=str(script), downscript="no")
    evidence(new)


def log_into_a_file(run: Monitor, _there: Path, new: Path, _sock: Path) -> None:
    run("human-monitor-command", **{"command-line": f"logfile {new}"})
    run("human-monitor-command", **{"command-line": "log guest_errors"})
    evidence(new)


def debug_server(run: Monitor, _there: Path, new: Path, _sock: Path) -> None:
    said = run("human-monitor-command", **{"command-line": f"gdbserver unix:{new},server=on,wait=off"})
    assert "Could not" not in said and "Failed" not in said, said
    evidence(new)


ATTACKS: Final[list[Attack]] = [
    blockdev_of_a_host_file,
    blockdev_create,
    migrate_to_a_program,
    migrate_to_a_file,
    save_memory,
    dump_memory,
    secret_of_a_file,
    random_of_memory,
    memory_in_a_file,
    chardev_to_a_file,
    chardev_of_a_terminal,
    chardev_to_tcp,
    listen_on_tcp,
    chardev_to_a_unix_socket,
    listen_on_a_unix_socket,
    network_with_a_script,
    log_into_a_file,
    debug_server,
]


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "host.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
        sock.listen(4)
        yield path


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_Q2_the_monitor_reaches_nothing_of_the_host(attack: Attack, tmp_path: Path, listening: Path) -> None:
    """It works on a QEMU that root starts; ours refuses, or nothing comes of it."""
    there = tmp_path / "secret"
    there.write_text("x" * 512)
    there.chmod(0o644)
    with running(tmp_path, is_confined=False) as monitor:
        attack(monitor, there, tmp_path / "outside", listening)
    escaped = False
    with running(tmp_path, is_confined=True) as monitor:
        try:
            attack(monitor, there, tmp_path / "inside", listening)
            escaped = True
        except (Refused, AssertionError, OSError):
            pass
    assert not escaped
    assert not (tmp_path / "inside").exists()


async def test_Q2_the_service_launches_it_confined(guest_factory: GuestFactory) -> None:
    """A real guest's QEMU: what the kernel says of it, and all the files it has."""
    async with guest_factory(disk="16MiB") as guest:
        pid = (await guest.view()).pid
        assert pid is not None
        check_confined(pid)


def check_confined(pid: int) -> None:
    fields = {
        line.split(":")[0]: line.split(":")[1].split()
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    }
    uid = int(fields["Uid"][0])
    assert uid in range(user("qemu", 0), user("qemu", 4096)) and fields["Uid"] == [str(uid)] * 4
    assert {fields[name][0] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd")} == {"0" * 16}
    assert fields["NoNewPrivs"] == ["1"] and fields["Seccomp"] == ["2"]
    root = Path(f"/proc/{pid}/root")
    assert not (root / "etc/passwd").exists() and not (root / "dev").exists()
    for name in ("net", "ipc", "uts", "mnt"):
        assert Path(f"/proc/{pid}/ns/{name}").readlink() != Path(f"/proc/self/ns/{name}").readlink()
