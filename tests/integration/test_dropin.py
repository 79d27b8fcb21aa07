"""`rayos-qemu` in the place of QEMU: a script cannot tell the difference, except that it gets more."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.kernel import build_case
from tests.integration.cli_lab import Lab, open_lab

pytestmark = [pytest.mark.guest, pytest.mark.root]

LIMIT_S = 120
PROGRAM = str(Path(sys.executable).with_name("rayos-qemu-system-i386"))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with open_lab() as opened:
        # The drop-in takes no configuration: a daemon of this lab's runs before.
        daemon = opened.start("serve", "--config", opened.config, stderr=subprocess.PIPE)
        assert daemon.stderr is not None
        while b"serves on" not in daemon.stderr.readline():
            assert daemon.poll() is None
        yield opened
        daemon.send_signal(signal.SIGTERM)
        daemon.communicate(timeout=LIMIT_S)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def start(lab: Lab, *words: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [PROGRAM, *words],
        env=lab.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(
    lab: Lab, case: str, kernels: Path, *words: str, text: bytes = b""
) -> subprocess.CompletedProcess[bytes]:
    command = [PROGRAM, "-kernel", str(build_case(case, kernels)), *words]
    return subprocess.run(
        command, input=text, env=lab.environment, capture_output=True, timeout=LIMIT_S, check=False
    )


@pytest.mark.parametrize(
    ("case", "words", "status", "said"),
    [
        ("hello", ["-nographic"], 0, b"HELLO\r\n"),
        (
            "debug_exit",
            ["-serial", "stdio", "-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"],
            33,
            b"DEBUG EXIT",
        ),
        ("reset_once", ["-nographic", "-no-reboot"], 0, b"RESET\r\n"),
        ("fault", ["-nographic", "-no-reboot"], 0, b"FAULT\r\n"),
        ("ten_resets", ["-nographic"], 0, b"BOOT 10\r\n"),
        ("panic_off", ["-nographic"], 0, b"KERNEL PANIC"),
        ("memory", ["-nographic", "-m", "16"], 0, b"UPPER 15"),
        ("processors", ["-nographic", "-smp", "4"], 0, b"CPUS 4\r\n"),
        ("cpuid", ["-nographic", "-cpu", "max"], 0, b"RDRAND XSAVE SMEP"),
        ("debugcon", ["-display", "none", "-debugcon", "stdio"], 0, b"ON DEBUGCON\n"),
        ("com2", ["-serial", "null", "-serial", "stdio"], 0, b"ON COM2\r\n"),
        ("hello", ["-nographic", "-device", "no-such-device"], 1, b""),
        ("hello", ["-nographic", "-loadvm", "x"], 1, b""),
    ],
)
def test_status_and_bytes_are_those_of_qemu(
    lab: Lab, kernels: Path, case: str, words: list[str], status: int, said: bytes
) -> None:
    """Every end of QEMU's has its status, and standard output has the guest's bytes and nothing else."""
    done = run(lab, case, kernels, *words)
    assert (done.returncode, said in done.stdout) == (status, True), (done.stdout, done.stderr)
    assert done.stderr.count(b"\n") >= 1
    if not said:
        assert words[-1].encode() in done.stderr


def test_q_is_silent_and_explain_is_a_table(lab: Lab, kernels: Path) -> None:
    assert run(lab, "hello", kernels, "-nographic", "-q").stderr == b""
    table = run(lab, "hello", kernels, "-m", "64", "-explain").stdout.decode()
    assert "memory = '64MiB'" in table


def test_keys_reach_the_serial_line_and_ctrl_a_x_ends_it(lab: Lab, kernels: Path) -> None:
    """`mon:stdio`, as `make qemu` of a teaching system has it."""
    with start(lab, "-kernel", str(build_case("echo", kernels)), "-serial", "mon:stdio", "-q") as one:
        assert one.stdin is not None and one.stdout is not None
        assert one.stdout.readline() == b"ECHO\r\n"
        one.stdin.write(b"a\x01\x01")
        one.stdin.flush()
        assert [one.stdout.readline() for _ in range(2)] == [b"GOT 0x00000061\r\n", b"GOT 0x00000001\r\n"]
        one.stdin.write(b"\x01cinfo status\n\x01x")
        one.stdin.flush()
        rest, _ = one.communicate(timeout=LIMIT_S)
        assert b"VM status: running" in rest and b"QEMU: Terminated" in rest
        assert one.returncode == 0


def connected(path: Path) -> socket.socket:
    """The client of a monitor's socket, as soon as it is there."""
    deadline = time.monotonic() + LIMIT_S
    while True:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(LIMIT_S)
        try:
            client.connect(str(path))
            return client
        except OSError:
            client.close()
            assert time.monotonic() < deadline
            time.sleep(0.05)  # a socket that is not there yet tells nobody


def test_a_monitor_types_keys_takes_a_picture_and_quits(lab: Lab, kernels: Path, tmp_path: Path) -> None:
    """`sendkey` reaches the PS/2 keyboard, `screendump` writes a PPM; serial to a file, monitors on sockets."""
    serial, picture = tmp_path / "serial.log", tmp_path / "screen.ppm"
    words = ["-display", "none", "-serial", f"file:{serial}", "-q"]
    words += ["-monitor", f"unix:{tmp_path}/mon,server,nowait", "-qmp", f"unix:{tmp_path}/qmp,server,nowait"]
    with start(lab, "-kernel", str(build_case("keyboard", kernels)), *words) as one:
        with connected(tmp_path / "mon") as human:
            monitor = human.makefile("rwb", buffering=0)
            lab.rayos("wait", f"qemu-{one.pid}", "--for-text", "KEYS", "--timeout", "60s")
            monitor.write(f"sendkey a\nscreendump {picture}\n".encode())
            lab.rayos("wait", f"qemu-{one.pid}", "--for-text", "KEY 0x0000001e", "--timeout", "60s")
            while monitor.read(64).count(b"(qemu)") == 0 or not picture.exists():
                pass
        with connected(tmp_path / "qmp") as machine:
            qmp = machine.makefile("rwb", buffering=0)
            assert "QMP" in json.loads(qmp.readline())
            qmp.write(b'{"execute": "qmp_capabilities"}{"execute": "query-status", "id": 7}')
            assert json.loads(qmp.readline()) == {"return": {}}
            assert json.loads(qmp.readline())["return"]["status"] == "running"
            qmp.write(b'{"execute": "no-such"}{"execute": "quit"}')
            assert json.loads(qmp.readline())["error"]["class"] == "GenericError"
        one.communicate(timeout=LIMIT_S)
        assert one.returncode == 0
    assert b"KEY 0x0000001e" in serial.read_bytes()
    assert picture.read_bytes().startswith(b"P6\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_as_it_ends_qemu(lab: Lab, kernels: Path, number: signal.Signals) -> None:
    """Status 0, a line about it, and no machine is left."""
    with start(lab, "-kernel", str(build_case("spin", kernels)), "-nographic") as one:
        assert one.stdout is not None
        assert one.stdout.readline() == b"SPINNING\r\n"
        one.send_signal(number)
        _, errors = one.communicate(timeout=LIMIT_S)
    assert (one.returncode, f"terminating on signal {number:d}".encode() in errors) == (0, True)
    assert lab.json("ps") == []


def test_daemonize_goes_on_and_its_pidfile_ends_it(lab: Lab, kernels: Path, tmp_path: Path) -> None:
    pid_file, serial = tmp_path / "pid", tmp_path / "serial.log"
    words = ("-daemonize", "-pidfile", str(pid_file), "-serial", f"file:{serial}", "-d", "guest_errors", "-D")
    done = run(lab, "spin", kernels, *words, str(tmp_path / "qemu.log"))
    assert done.returncode == 0, done.stderr
    pid = int(pid_file.read_text())
    lab.rayos("wait", f"qemu-{pid}", "--for-text", "SPINNING", "--timeout", "60s")
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + LIMIT_S
    while pid_file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert serial.read_bytes() == b"SPINNING\r\n"
