"""The command line against real guests: a life from `run` to `rm`, other people's kernels, and every way to fail."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.utils import RawPcapNgReader

from rayos_images import kernel
from rayos_images.cache import Cache
from rayos_images.cpio import Archive
from rayos_images.initramfs import find_busybox
from rayos_vmm.paths import default_paths
from tests.integration.cli_lab import Lab, multiboot_kernel, open_lab

pytestmark = [pytest.mark.guest, pytest.mark.root]


@pytest.fixture
def lab() -> Iterator[Lab]:
    with open_lab() as opened:
        yield opened


def test_run_with_a_command_gives_its_output_and_status(lab: Lab) -> None:
    """`rayos run -- command` is a command of the host as far as a script can tell."""
    done = lab.finish("run", "--config", lab.config, "--rm", "--", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout) == (7, "out\n")
    assert "err" in done.stderr


def test_a_life_by_commands(lab: Lab, tmp_path: Path) -> None:
    """Every command does to a guest what it says."""
    started = lab.json("run", "--config", lab.config, "--name", "one", "--disk", "64MiB", "--detach")
    assert (started["state"], started["is_ready"]) == ("running", True)
    assert "ready" in lab.rayos("ps")
    assert lab.rayos("exec", "one", "--", "uname").strip() == "Linux"

    content = bytes(range(256)) * 1000
    (tmp_path / "in").write_bytes(content)
    lab.rayos("cp", str(tmp_path / "in"), "one:/tmp/")
    lab.rayos("cp", "one:/tmp/in", str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == content

    assert "RAYOS-READY" in lab.rayos("logs", "one")
    assert "said-42" in lab.rayos("console", "one", "--no-replay", text="echo said-$((6*7))\n")
    lab.rayos("type", "one", "hello", "--enter")
    lab.rayos("key", "one", "ctrl-alt-f1", "a")
    lab.rayos("screenshot", "one", str(tmp_path / "shot.png"))
    assert (tmp_path / "shot.png").read_bytes().startswith(b"\x89PNG")

    assert lab.json("qmp", "one", "query-status")["running"] is True
    assert lab.json("pause", "one")["state"] == "paused"
    assert lab.json("resume", "one")["state"] == "running"
    assert started["address"] in lab.rayos("leases")
    assert "down" in lab.rayos("net", "link", "one", "down")
    assert lab.json("net", "show", "one")["is_up"] is False
    assert lab.json("net", "link", "one", "up")["mtu"] == 1500
    lab.rayos("net", "announce", "one")
    capturing = lab.start("net", "capture", "one", "-o", str(tmp_path / "net.pcapng"), stderr=subprocess.PIPE)
    while not (tmp_path / "net.pcapng").exists() or not (tmp_path / "net.pcapng").stat().st_size:
        assert capturing.poll() is None
        time.sleep(0.05)
    lab.rayos("exec", "one", "--", f"ping -c 3 -W 10 {started['address'].rpartition('.')[0]}.1")
    capturing.send_signal(signal.SIGINT)
    _, words = capturing.communicate(timeout=20)
    assert capturing.returncode == 0 and "0 lost" in str(words)
    with RawPcapNgReader(str(tmp_path / "net.pcapng")) as frames:
        assert sum(1 for _ in frames) >= 6
    assert lab.json("stats", "one")["disk0"]
    with pytest.raises(AssertionError, match="4\n"):
        lab.rayos("rm", "one")

    waiting = lab.start("wait", "one", "--for", "stopped", stdout=subprocess.DEVNULL)
    stopped = lab.json("stop", "one")
    assert (stopped["state"], stopped["exit_reason"]) == ("stopped", "stopped")
    assert waiting.wait(20) == 0
    assert lab.json("start", "one")["state"] == "running"
    assert lab.json("wait", "one", "--timeout", "2min")["is_ready"] is True
    assert lab.json("rm", "--force", "one") == {"removed": ["one"]}
    assert lab.json("ps") == []


def test_events_are_followed_and_resumed(lab: Lab) -> None:
    lab.rayos("run", "--config", lab.config, "--name", "one", "--detach")
    following = lab.start("events", "--since", "0", "--json", stdout=subprocess.PIPE)
    assert following.stdout is not None
    seen: list[dict[str, Any]] = []
    while "vm.ready" not in [event["type"] for event in seen]:
        seen.append(json.loads(following.stdout.readline()))
    following.send_signal(signal.SIGINT)
    following.stdout.close()
    assert following.wait(10) == 130
    assert [event["seq"] for event in seen] == list(range(1, len(seen) + 1))


def test_a_client_keeps_the_daemon(lab: Lab) -> None:
    """It ends a second after nobody needs it; a request that is still open is a need."""
    lab.rayos("run", "--config", lab.config, "--rm", "--", "true")
    following = lab.start("events")
    time.sleep(2)
    lab.rayos("ps")
    following.send_signal(signal.SIGINT)
    assert following.wait(10) == 130


def test_run_on_a_terminal_ends_in_the_guests_shell(lab: Lab) -> None:
    """A person sees where the time went, works in the shell, and powers off from there: status 0."""
    leader, follower = pty.openpty()
    running = lab.start(
        "run", "--config", lab.config, "--rm", stdin=follower, stdout=follower, stderr=follower
    )
    os.close(follower)
    seen = b""

    def until(wanted: bytes) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while wanted not in seen:
            assert time.monotonic() < deadline, seen.decode(errors="replace")
            seen += os.read(leader, 4096)

    try:
        until(b"# ")
        assert b"where the time went" in seen
        os.write(leader, b"echo shell-$((6*7))\n")
        until(b"shell-42")
        os.write(leader, b"poweroff\n")
        until(b"ended: ")
        assert running.wait(30) == 0
    finally:
        running.kill()
        running.wait()
        os.close(leader)


def test_a_kernel_of_a_hobby_boots(lab: Lab, tmp_path: Path) -> None:
    """Multiboot, no Linux: its words are on the serial console."""
    (tmp_path / "kernel").write_bytes(multiboot_kernel("HELLO FROM A HOBBY"))
    lab.rayos(
        "run", "--config", lab.config, "--name", "hobby", "--kernel", str(tmp_path / "kernel"), "--detach"
    )
    following = lab.start("logs", "hobby", "--port", "serial", "--follow", stdout=subprocess.PIPE)
    assert following.stdout is not None
    said = b""
    while b"HELLO FROM A HOBBY" not in said:
        said += following.stdout.read(1)
    following.kill()
    following.wait()
    following.stdout.close()


def test_a_kernel_with_an_initramfs_of_its_own_boots(lab: Lab, tmp_path: Path) -> None:
    """Nothing of ours inside: the console is the serial line, and its end is the command's end."""
    cache = Cache(default_paths().cache)
    archive = Archive()
    for directory in ("bin", "dev"):
        archive.directory(directory)
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", find_busybox(cache).read_bytes(), 0o755)
    archive.file("init", b"#!/bin/busybox sh\necho FOREIGN INIT\nexec /bin/busybox poweroff -f\n", 0o755)
    (tmp_path / "initrd").write_bytes(archive.finish())
    vmlinux = str(kernel.build(cache).vmlinux)
    words = ["--kernel", vmlinux, "--initrd", str(tmp_path / "initrd"), "--append", "console=ttyS0 quiet"]
    running = lab.start(
        *("run", "--config", lab.config, "--rm", *words), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert running.stdout is not None
    assert b"FOREIGN INIT" in running.stdout.read()
    running.communicate()
    assert running.returncode == 0


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        (["--kernel", "/nowhere/vmlinux"], 2, "/nowhere/vmlinux"),
        (["--disk", "/nowhere/disk.img"], 2, "/nowhere/disk.img"),
        (["--memory", "1TiB"], 2, "exceeds"),
        (["--cpus", "256"], 2, "<= 255"),
        (["--name", "Not_a_name"], 2, "name"),
        (["--config", "bad.toml"], 2, "vm.one.memroy: there is no such key"),
    ],
)
def test_what_cannot_run_is_one_sentence_and_a_status(
    lab: Lab, tmp_path: Path, words: list[str], status: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leaves nothing behind: no machine, process, tap, socket or file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text('[vm.one]\nmemroy = "1GiB"\n')
    config = [] if "--config" in words else ["--config", lab.config]
    done = lab.finish("run", *config, *words)
    lines = [line for line in done.stderr.splitlines() if line.startswith("rayos: ")]
    assert (done.returncode, len(lines)) == (status, 1), done.stderr
    assert sentence in lines[0]
    assert "Traceback" not in done.stderr
    assert lab.finish("ps", "--quiet").stdout.strip() == ""


def test_a_busy_tap_is_a_conflict(lab: Lab) -> None:
    """The name of a guest's tap is somebody else's link."""
    subprocess.run(["ip", "tuntap", "add", "ray-busy-0", "mode", "tap"], check=True)
    try:
        done = lab.finish("run", "--config", lab.config, "--name", "busy")
    finally:
        subprocess.run(["ip", "link", "delete", "ray-busy-0"], check=True)
    assert (done.returncode, "ray-busy-0" in done.stderr) == (4, True), done.stderr


def test_a_qemu_that_dies_ends_the_command_with_a_reason(lab: Lab) -> None:
    """Killed from outside while its console is in use: status 18, and the sentence says what happened."""
    running = lab.start(
        *("run", "--config", lab.config, "--name", "one", "--rm"),
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert running.stderr is not None
    said = b""
    while b"where the time went" not in said:
        line = running.stderr.readline()
        assert line, said.decode()
        said += line
    os.kill(lab.json("ps")[0]["pid"], signal.SIGKILL)
    _, rest = running.communicate()
    assert (running.returncode, b"SIGKILL" in rest) == (18, True), rest.decode()


def test_an_interrupt_during_the_boot_leaves_nothing(lab: Lab) -> None:
    running = lab.start("run", "--config", lab.config, "--name", "one", stderr=subprocess.PIPE)
    while not lab.finish("ps", "--quiet").stdout.strip():
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    running.communicate()
    assert running.returncode == 130
    assert lab.json("ps") == []


def test_smoke_holds(lab: Lab) -> None:
    """All checks of `make smoke` hold, and the object says with what."""
    report = lab.json("smoke")
    assert report["ok"] is True
    assert {"boot", "disk", "lease", "network", "keyboard", "display", "console", "tpm", "clean"} <= set(
        report
    )
    assert report["qemu"]["version"]


def test_doctor_finds_this_machine_usable(lab: Lab) -> None:
    report = lab.json("doctor")
    assert report["ok"] is True
    assert {"python", "qemu", "accelerator", "tun", "swtpm"} <= {
        finding["name"] for finding in report["findings"]
    }
