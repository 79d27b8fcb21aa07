"""`guest_factory`, as a project that uses it has it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from rayos_vmm.errors import Invalid, NotFound
from rayos_vmm.machine.view import ExitReason
from rayos_vmm.testing import CommandFailed, PrivateDaemon, open_guest
from rayos_vmm.testing.console import NotSeen
from rayos_vmm.testing.picture import Picture
from rayos_vmm.testing.pytest_plugin import GuestFactory
from rayos_vmm.testing.screen import PictureNotSeen
from tests.framework.kernel import build_case

pytestmark = [pytest.mark.guest, pytest.mark.root]


async def test_disk(guest_factory: GuestFactory) -> None:
    """The example of the README."""
    async with guest_factory(disk="64MiB") as guest:
        await guest.succeed("dd if=/dev/urandom of=/dev/vda bs=1M count=8 conv=fsync")
        await guest.console.send("echo done-$((6*7))\n")
        await guest.console.expect("done-42")


async def test_the_verbs_of_a_tester(guest_factory: GuestFactory) -> None:
    """Each does what it says, and a failure shows what the guest said."""
    async with guest_factory(memory="192MiB") as guest:
        assert await guest.succeed("echo one", "echo two") == "one\ntwo\n"
        with pytest.raises(CommandFailed, match="gave status 3, wanted 0; it said:\nwhy"):
            await guest.succeed("echo why; exit 3")
        assert await guest.fail("false") == ""
        with pytest.raises(CommandFailed, match="wanted another"):
            await guest.fail("true")
        assert await guest.execute("echo x; exit 4") == (4, "x\n")
        await guest.succeed("{ usleep 300000; touch /tmp/there; } >/dev/null 2>&1 &")
        await guest.wait_until_succeeds("test -e /tmp/there", timeout=20)
        await guest.write_file("/tmp/data", b"\0\xff")
        assert await guest.read_file("/tmp/data") == b"\0\xff"
        await guest.wait_for_file("/tmp/data", timeout=20)
        await guest.succeed("nc -l -p 7 >/dev/null 2>&1 &")
        await guest.wait_for_open_port(7, timeout=20)
        match = await guest.wait_for_console_text(re.compile(r"RAYOS-READY boot=([0-9.]+)"))
        assert float(match[1]) > 0
        with pytest.raises(NotSeen, match="not within"):
            await guest.console.expect("what nobody says", timeout=0.5)
        await guest.pause()
        assert (await guest.qmp("query-status"))["status"] == "paused"
        await guest.resume()
        await guest.stop()
        await guest.start()
        assert (await guest.view()).is_ready
        await guest.send_key("ctrl-l")
        await guest.crash()
        assert (await guest.wait_for_shutdown()).exit_reason is ExitReason.KILLED


async def test_a_picture_is_waited_for(guest_factory: GuestFactory) -> None:
    """A colour somewhere, a hash, a whole picture; and the cable out and in again."""
    square = (8, 8, 32, 16)

    def is_red(seen: Picture) -> bool:
        return seen.rgb == b"\xff\0\0" * (32 * 16)

    async with guest_factory(tpm=False) as guest:
        await guest.succeed("printf '\\033[2J\\033[?25l' >/dev/tty0")
        with pytest.raises(PictureNotSeen, match=r"within 0\.3 s; its region \(8, 8, 32, 16\) has SHA-256"):
            await guest.wait_for_screen(is_red, region=square, timeout=0.3)
        row = "printf '\\000\\000\\377\\000%.0s' $(seq 64) >/tmp/row"
        lines = (
            "for y in $(seq 0 31); do dd if=/tmp/row of=/dev/fb0 bs=256 seek=$((y * 20)) conv=notrunc; done"
        )
        await guest.succeed(row)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.succeed, f"sleep 1; {lines} 2>/dev/null")
            seen = await guest.wait_for_screen(is_red, region=square)
        assert (await guest.wait_for_screen(seen.sha256, region=square)) == seen
        assert (await guest.wait_for_screen(seen, region=square)) == seen
        await guest.block()
        await guest.wait_until_succeeds("grep 0 /sys/class/net/eth0/carrier", timeout=20)
        await guest.unblock()
        await guest.wait_until_succeeds("grep 1 /sys/class/net/eth0/carrier", timeout=20)


def _shell(line: str) -> subprocess.CompletedProcess[str]:
    """Runs a person's command line with this checkout's `rayos`."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    words = ["sh", "-c", line]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": path}, timeout=60)


def test_a_kept_guest_outlives_its_session(pytester: pytest.Pytester) -> None:
    """`--rayos-keep`: the summary's own commands reach the guest of the failed test, and end everything."""
    pytester.makepyfile(
        """
        async def test_fails(guest_factory):
            async with guest_factory(name="kept", gpu={"enabled": False}, net={"enabled": False}) as guest:
                assert (await guest.succeed("echo here")) == "there"
        """
    )
    done = pytester.runpytest_subprocess("--rayos-keep", "--rayos-artifacts=left", "-p", "no:cacheprovider")
    done.assert_outcomes(failed=1)
    lines = done.outlines
    console = next(line for line in lines if line.endswith("rayos console kept"))
    end = next(line for line in lines if line.startswith("to end them: ")).removeprefix("to end them: ")
    try:
        assert [path.name for path in pytester.path.glob("left/*/kept/attach.txt")] == ["attach.txt"]
        run = _shell(console.replace("console kept", "exec kept -- echo alive"))
        assert run.stdout == "alive\n", run.stderr
    finally:
        ended = _shell(end)
    assert ended.returncode == 0, ended.stderr


async def test_a_worker_dies_under_a_test(guest_factory: GuestFactory) -> None:
    async with guest_factory(disk="64MiB") as guest:
        await guest.kill_worker()
        await guest.succeed("dd if=/dev/urandom of=/dev/vda bs=1M count=4 conv=fsync", timeout=30)


async def test_two_guests_reach_each_other_when_a_rule_says_so(guest_factory: GuestFactory) -> None:
    """By default guests are strangers: each needs a rule for the other."""
    rule = {"name": "friends", "action": "allow", "protocol": "icmp", "priority": 1}
    async with guest_factory() as one, guest_factory(firewall={"rules": [rule]}) as two:
        address = (await two.view()).address
        await one.fail(f"ping -c 1 -W 2 {address}")
        await one.client.request("PUT", f"/vms/{one.name}/firewall", body={"rules": [rule]})
        await one.succeed(f"ping -c 1 -W 5 {address}")


async def test_a_failure_leaves_its_artifacts(rayos_daemon: PrivateDaemon, tmp_path: Path) -> None:
    """Consoles, state and the last frame; and the guest is gone all the same."""
    with pytest.raises(RuntimeError, match="the test failed"):
        async with open_guest(rayos_daemon, name="broken", artifacts=tmp_path) as guest:
            await guest.console.send("echo last words\n")
            await guest.console.expect("last words")
            raise RuntimeError("the test failed")
    left = {path.name for path in (tmp_path / "broken").iterdir()}
    consoles = {"shell.txt", "log.txt", "serial.txt"}
    assert left == consoles | {"last-frame.png", "state.json", "stats.json", "qmp.jsonl", "attach.txt"}
    said = [json.loads(line) for line in (tmp_path / "broken" / "qmp.jsonl").read_text().splitlines()]
    assert {"command": "cont", "arguments": {}} in [line.get("execute") for line in said]
    runtime = f"RAYOS_RUNTIME_DIR={rayos_daemon.paths.runtime}"
    assert f"{runtime} rayos console broken\n" in (tmp_path / "broken" / "attach.txt").read_text()
    assert "last words" in (tmp_path / "broken" / "shell.txt").read_text()
    with pytest.raises(NotFound):
        await rayos_daemon.client.get("broken")


async def test_a_wrong_key_is_refused_before_anything_starts(guest_factory: GuestFactory) -> None:
    with pytest.raises(Invalid, match="memroy: there is no such key"):
        async with guest_factory(memroy="1GiB"):
            pass


async def test_a_mark_is_found_however_much_came_after_it(
    guest_factory: GuestFactory, tmp_path: Path
) -> None:
    """The console's past is in a file: 700 KiB later, more than memory holds, the first mark is still there."""
    kernel = str(build_case("marks", tmp_path, kib=700))
    bare = {"tpm": False, "net": {"enabled": False}, "gpu": {"enabled": False}}
    async with guest_factory(kernel=kernel, wait="running", **bare) as guest:
        await guest.wait_for_console_text("MARK2", timeout=120)
        await guest.wait_for_console_text("MARK1", timeout=60)


async def test_results_of_the_guest_are_subtests(guest_factory: GuestFactory, tmp_path: Path) -> None:
    """TAP on the serial line: each result is told to pytest by its name, the failed one with its message."""
    told: list[tuple[str, str]] = []

    class Subtests:
        @contextmanager
        def test(self, msg: str | None = None) -> Iterator[None]:
            try:
                yield
                told.append((str(msg), ""))
            except AssertionError as error:
                told.append((str(msg), str(error).partition("\n")[0]))

    bare = {"tpm": False, "net": {"enabled": False}, "gpu": {"enabled": False}}
    async with guest_factory(kernel=str(build_case("tap", tmp_path)), wait="running", **bare) as guest:
        await guest.wait_for_shutdown()
        await guest.report_results(Subtests())
    assert told == [("memory", ""), ("timer", "expected 4, got 5"), ("disk", "")]
