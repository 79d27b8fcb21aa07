"""The launcher: a program has what was named, nothing else, and nothing of root's. Needs root."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from pathlib import Path
from typing import Final

import pytest

from rayos_vmm.host import identity
from rayos_vmm.host.confine import EXIT_REFUSED, Reach, confined, program_directories
from rayos_vmm.host.identity import user

UID: Final = user("qemu", 4001)
#: Starting an interpreter and building the root; measured 35 to 60 ms.
START_LIMIT_S: Final = 0.5


def run(script: str, reach: Reach, *, uid: int = UID) -> subprocess.CompletedProcess[str]:
    """A shell script as the confined program; /usr is there."""
    argv = ["/usr/bin/bash", "-c", script]
    whole = Reach([*program_directories(argv), *reach.read], reach.write, reach.sockets, reach.devices)
    return subprocess.run(
        confined(argv, whole, uid=uid), capture_output=True, text=True, timeout=20, check=False
    )


def test_only_what_was_named_is_there(tmp_path: Path) -> None:
    """Below a directory that others may not enter, one file is shown; beside it and elsewhere is nothing."""
    shown, hidden = tmp_path / "shown", tmp_path / "hidden"
    for path in (shown, hidden):
        path.write_text(path.name)
        path.chmod(0o644)
    done = run(f"cat {shown}; ls {tmp_path}; cat {hidden}; ls /; ls /proc | grep -c .", Reach(read=[shown]))
    first, *names, processes = done.stdout.split()
    assert first == "shownshown"
    assert set(names) == {"etc", "lib", "lib64", "proc", "tmp", "usr"}
    assert int(processes) < 6  # its own, not the host's
    assert "hidden: No such file" in done.stderr


def test_a_private_file_is_copied_for_it(tmp_path: Path) -> None:
    """A kernel that only its owner may read boots all the same; the original stays as it is."""
    private = tmp_path / "private"
    private.write_text("kernel")
    private.chmod(0o600)
    assert run(f"cat {private}", Reach(read=[private])).stdout == "kernel"
    assert private.stat().st_uid == 0 and private.stat().st_mode & 0o777 == 0o600


def test_it_writes_what_it_may_and_no_more(tmp_path: Path) -> None:
    """The named file takes writes; a file to read, /tmp and the root do not."""
    own, other = tmp_path / "own", tmp_path / "other"
    own.touch(0o600)
    other.write_text("as it was")
    other.chmod(0o666)
    done = run(
        f"echo new >{own}; echo no >{other}; echo no >/tmp/x; echo no >/x; mkdir /y; rm {own}",
        Reach(read=[other], write=[own]),
    )
    assert own.read_text() == "new\n" and own.stat().st_uid == UID
    assert other.read_text() == "as it was"
    assert done.stderr.count("Read-only file system") >= 3


def test_a_directory_of_its_own_without_another_user(tmp_path: Path) -> None:
    """As swtpm has it: user 0 in name, no capability, its directory and nothing else of root's."""
    (tmp_path / "state").mkdir()
    done = run(
        f"echo x >{tmp_path}/state/file; grep -E 'CapEff|CapBnd' /proc/self/status; cat /etc/shadow",
        Reach(write=[tmp_path / "state"]),
        uid=0,
    )
    assert (tmp_path / "state/file").read_text() == "x\n"
    assert done.stdout.split() == ["CapEff:", "0" * 16, "CapBnd:", "0" * 16]
    assert "No such file" in done.stderr


def test_a_named_socket_is_reached_and_no_other(tmp_path: Path) -> None:
    """Sockets of root's keeper: the one that was handed over connects."""
    with socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as other:
        for sock, name in ((named, "named"), (other, "other")):
            sock.bind(str(tmp_path / name))
            (tmp_path / name).chmod(0o600)
            sock.listen(1)
        code = (
            "import socket, sys\nfor name in sys.argv[1:]:\n  s = socket.socket(socket.AF_UNIX)\n"
            "  print(s.connect_ex(name))"
        )
        argv = ["/usr/bin/python3", "-c", code, str(tmp_path / "named"), str(tmp_path / "other")]
        reach = Reach(read=program_directories(argv[:1]), sockets=[tmp_path / "named"])
        done = subprocess.run(confined(argv, reach, uid=UID), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "2"]


def test_what_cannot_be_is_said(tmp_path: Path) -> None:
    """A program that is not there, and a file that is not: a sentence and 126, and no program runs."""
    missing = run("true", Reach(read=[tmp_path / "none"]))
    assert missing.returncode == EXIT_REFUSED and "none" in missing.stderr
    done = subprocess.run(
        confined(["/usr/none"], Reach(read=[Path("/usr")]), uid=UID),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_REFUSED and "/usr/none does not start" in done.stderr


def test_without_root_landlock_alone_holds(tmp_path: Path) -> None:
    """A user's own guests: among that user's files, only the named ones."""
    shown, hidden = tmp_path / "shown", tmp_path / "hidden"
    for path in (shown, hidden):
        path.write_text(path.name)
        path.chmod(0o644)
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    argv = ["/usr/bin/cat", str(shown), str(hidden)]
    reach = Reach(read=[*program_directories(argv[:1]), shown])
    command = ["/usr/bin/setpriv", "--reuid=65534", "--clear-groups", *confined(argv, reach, uid=0)]
    command[command.index("-I") - 1] = "/usr/bin/python3"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "shown"
    assert "hidden: Permission denied" in done.stderr and "that needs root" in done.stderr


def test_it_starts_quickly() -> None:
    """Each start of QEMU pays this little."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        assert run("exit 7", Reach()).returncode == 7
        times.append(time.perf_counter() - started)
    print(f"the launcher and a shell: {min(times) * 1000:.0f} ms")
    assert min(times) < START_LIMIT_S


def test_two_machines_never_share_a_user() -> None:
    """A claim is one machine's while anybody holds it, also in another process, and free again after."""
    with identity.claim() as one, identity.claim() as two:
        assert one.slot != two.slot
        users = {user(kind, slot) for kind in ("worker", "qemu") for slot in (one.slot, two.slot)}
        assert len(users) == 4
        held = os.dup(one.fds[0])
    with identity.claim() as three:
        assert three.slot != one.slot
    os.close(held)


@pytest.mark.parametrize("kind", ["worker", "qemu"])
def test_nobody_has_no_user(kind: str) -> None:
    """Without root, or without devices, processes stay who they are."""
    assert identity.user(kind, identity.NOBODY.slot) == 0
