"""The verdict of `rayos run` on a kernel is true: every byte that it printed, and an exit status for each end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.framework.kernel import build_case
from tests.integration.cli_lab import Lab, open_lab

pytestmark = [pytest.mark.guest, pytest.mark.root]

BARE = ("--no-tpm", "--no-net", "--no-gpu")


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with open_lab() as opened:
        yield opened


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


def run(lab: Lab, kernel: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return lab.finish("run", "--config", lab.config, "--rm", *BARE, "--kernel", str(kernel), *words)


def test_a_quick_kernel_is_heard_to_its_last_byte_every_time(lab: Lab, kernels: Path) -> None:
    """It has printed and powered off before the client looks: 20 of 20 give its words and status 0."""
    words = ("run", "--config", lab.config, "--rm", *BARE, "--kernel", str(build_case("hello", kernels)))
    for _ in range(5):
        quartet = [
            lab.start(*words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for _ in range(4)
        ]
        for one in quartet:
            said, noted = one.communicate(timeout=120)
            assert (said, one.returncode) == (b"HELLO\r\n", 0), noted.decode()
    assert lab.json("ps") == []


@pytest.mark.parametrize("redirection", ["</dev/null", "<&-"])
def test_the_end_of_the_input_is_not_the_end_of_the_run(lab: Lab, kernels: Path, redirection: str) -> None:
    """A kernel that is silent for three seconds is waited for without any input, and with a closed one."""
    kernel = build_case("late", kernels)
    options = f"--config {lab.config} --rm {' '.join(BARE)} --kernel {kernel}"
    line = f'"$0" -P -m rayos_vmm.cli run {options} {redirection}'
    done = subprocess.run(
        ["sh", "-c", line, sys.executable], capture_output=True, env=lab.environment, timeout=120, check=False
    )
    assert (done.stdout, done.returncode) == (b"HELLO\r\n", 0), done.stderr.decode()


@pytest.mark.parametrize(
    ("case", "words", "status", "sentence"),
    [
        ("panic_off", [], 10, "panicked: KERNEL PANIC: page fault at 0xdeadbeef"),
        ("panic_off", ["--no-fail-patterns"], 0, "powered itself off"),
        ("panic_halt", [], 10, "panicked: thread 'main' panicked at src/main.rs:12"),
        ("spin", ["--timeout", "2s"], 124, "it ran for the 2 s"),
        ("spin", ["--pass-on", "^SPIN"], 0, "'SPINNING', which pass_on '^SPIN' asks for"),
        ("spin", ["--fail-on", "NING$"], 22, "'SPINNING', which fail_on 'NING$' asks for"),
        ("colours", ["--pass-on", "^OK$", "--timeout", "20s"], 0, "pass_on"),
        ("colours", ["--pass-on", "é\nlogin: ", "--timeout", "20s"], 0, "pass_on"),
        ("fault", [], 12, "triple-faulted"),
        ("echo", ["--silence", "1s"], 16, "hangs"),
        ("debug_exit", ["--debug-exit"], 33, "wrote 16 to its debug exit port: exit status 33"),
        ("debug_exit", ["--debug-exit", "0x501", "--success", "33"], 0, "which is the success"),
        ("debug_exit", ["--debug-exit", "--success", "35"], 33, "the success is 35"),
        ("reset_once", ["--on-reset", "stop"], 0, "the guest reset itself"),
        ("ten_resets", ["--on-reset", "reset"], 0, "powered itself off"),
        ("ten_resets", ["--on-reset", "count=3"], 0, "reset itself 3 times"),
        ("three_faults", ["--on-triple-fault", "reset"], 0, "powered itself off"),
        ("pvpanic_isa", ["--pvpanic", "isa"], 10, "panicked"),
    ],
)
def test_each_end_has_its_own_status(
    lab: Lab, kernels: Path, case: str, words: list[str], status: int, sentence: str
) -> None:
    done = run(lab, build_case(case, kernels), *words)
    assert (done.returncode, sentence in done.stderr) == (status, True), done.stderr
    if case.startswith("panic"):
        assert "back trace" in done.stdout


def test_until_text_leaves_at_the_text(lab: Lab, kernels: Path) -> None:
    """An ephemeral machine ends then, another goes on and can be waited on from outside."""
    assert run(lab, build_case("spin", kernels), "--until-text", "SPINNING").returncode == 0
    assert lab.json("ps") == []
    kernel = str(build_case("spin", kernels))
    words = ("run", "--config", lab.config, "--name", "kept", *BARE, "--kernel", kernel)
    lab.rayos(*words, "--until-text", "SPIN")
    assert [one["state"] for one in lab.json("ps")] == ["running"]
    found = lab.json("wait", "kept", "--for-text", "SPIN+ING", "--timeout", "20s")
    assert found["match"] == "SPINNING"
    lab.rayos("wait", "kept", "--for-text", "never", "--timeout", "1s", status=124)
    lab.rayos("rm", "-f", "kept")


def test_results_that_the_guest_prints_are_cases(lab: Lab, kernels: Path, tmp_path: Path) -> None:
    """TAP on the console: JUnit for CI, JSON for programs, and a failed test is a failed run."""
    junit = tmp_path / "results.xml"
    done = run(lab, build_case("tap", kernels), "--junit", str(junit), "--json")
    said = json.loads(done.stdout)
    assert (done.returncode, said["status"], said["exit_reason"]) == (24, 24, "powered_off")
    assert [(one["name"], one["ok"]) for one in said["cases"]] == [
        ("memory", True),
        ("timer", False),
        ("disk", True),
    ]
    suite = ET.parse(junit).getroot()[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "1", "1")
    assert suite.findtext("testcase[@name='timer']/failure") == "expected 4, got 5"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_whatever_ends_the_client_ends_its_machine(lab: Lab, kernels: Path, number: signal.Signals) -> None:
    """Ctrl-C, `timeout`, a closed terminal and `kill -9` leave no machine."""
    name, kernel = f"signal-{number}", str(build_case("spin", kernels))
    words = ("run", "--config", lab.config, "--rm", "--name", name, *BARE, "--kernel", kernel)
    client = lab.start(*words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert client.stdout is not None
    assert client.stdout.readline() == b"SPINNING\r\n"
    following = lab.start("events", "--since", "0", "--json", stdout=subprocess.PIPE)
    assert following.stdout is not None
    events = (one for line in following.stdout if (one := json.loads(line))["vm"] == name)
    assert next(one for one in events if one["data"].get("state") == "running")
    client.send_signal(number)
    client.communicate(timeout=60)
    assert client.returncode == (-9 if number is signal.SIGKILL else 128 + number)
    assert next(one for one in events if one["type"] == "vm.removed")
    following.kill()
    following.communicate()
    assert lab.json("ps") == []


def test_a_machine_that_ended_is_read_as_well(lab: Lab, kernels: Path) -> None:
    """Its logs are there, also without a daemon and with another; `ps` without one lists what the last left."""
    kernel = str(build_case("fault", kernels))
    done = lab.finish("run", "--config", lab.config, "--name", "ended", *BARE, "--kernel", kernel)
    assert (done.returncode, "triple-faulted" in done.stderr) == (12, True)
    assert lab.rayos("logs", "ended") == "FAULT\n"
    lab.rayos("rm", "ended")


def test_an_early_death_of_qemu_and_an_abbreviation_are_told(lab: Lab, kernels: Path) -> None:
    """QEMU's own last line is in the error, and an abbreviation is no option."""
    done = run(lab, build_case("hello", kernels), "--timeou", "2")
    assert (done.returncode, "--timeou" in done.stderr) == (2, True)
    done = run(lab, build_case("hello", kernels), "--qemu=-device", "--qemu=no-such-device")
    assert (done.returncode, "no-such-device" in done.stderr) == (5, True), done.stderr
