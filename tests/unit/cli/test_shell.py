"""`rayos shell`: the commands as they are, line after line, and completion from the live state."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio

from rayos_vmm.cli import shell
from rayos_vmm.cli.main import COMMANDS, _parser
from rayos_vmm.config.spec import VmSpec
from tests.unit.api.serving import open_api

LIMIT_S = 30


def complete(before: str) -> set[str]:
    return {before[: len(before) - length] + word for word, length in shell.completions(before, _parser)}


def environment(directory: Path) -> dict[str, str]:
    return {**os.environ, "RAYOS_RUNTIME_DIR": str(directory), "RAYOS_STATE_DIR": str(directory)}


async def test_lines_run_as_the_commands_do_and_the_first_failure_ends(tmp_path: Path) -> None:
    """Output, remarks and exit status are those of the commands; what stands behind the failure is not run."""
    async with open_api(tmp_path) as (client, _):
        await client.create(VmSpec(name="dev"))
        lines = "# a remark\nvm list --json\n\nps  # again\nstart nobody\nps\n"
        run = partial(subprocess.run, capture_output=True, text=True, timeout=60, env=environment(tmp_path))
        done = await trio.to_thread.run_sync(
            partial(run, [sys.executable, "-P", "-m", "rayos_vmm.cli", "shell"], input=lines)
        )
        (tmp_path / "lines").write_text("ps\nexit\nstart nobody\n")
        words = [sys.executable, "-P", "-m", "rayos_vmm.cli", "shell", str(tmp_path / "lines")]
        from_file = await trio.to_thread.run_sync(partial(run, words))
    assert (done.returncode, "nobody" in done.stderr) == (3, True)
    assert done.stdout.count('"name": "dev"') == 1 and done.stdout.count("NAME") == 1
    assert (from_file.returncode, "dev" in from_file.stdout) == (0, True)


@pytest.mark.parametrize(
    ("line", "status", "complaint"),
    [
        ("ps 'no end", 2, "No closing quotation"),
        ("nonsense", 2, "invalid choice: 'nonsense'"),
        ("shell", 2, "this is the shell"),
        ("help", 0, ""),
        ("   # nothing", 0, ""),
    ],
)
def test_what_is_no_command(
    line: str, status: int, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from rayos_vmm.cli.main import main

    assert shell.run_line(line, main) == status
    assert complaint in capsys.readouterr().err


def test_the_prompt_has_the_status_and_the_end_is_the_last_one() -> None:
    """Ctrl-C at the prompt only drops the line; Ctrl-D ends."""
    asked: list[int] = []
    answers: list[Callable[[], str]] = [lambda: "three", _interrupt, lambda: "four", _end]

    def ask(status: int) -> str:
        asked.append(status)
        return answers[len(asked) - 1]()

    assert shell.talk(ask, lambda words: {"three": 3, "four": 4}[words[0]]) == 4
    assert asked == [0, 3, 130, 4]


def _interrupt() -> str:
    raise KeyboardInterrupt


def _end() -> str:
    raise EOFError


async def test_tab_completes_commands_verbs_options_and_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYOS_RUNTIME_DIR", str(tmp_path))
    assert complete("") == set(COMMANDS)
    assert complete("tpm q") == {"tpm quote"}
    assert complete("tpm quote --no") == {"tpm quote --nonce"}
    async with open_api(tmp_path) as (client, _):
        await client.create(VmSpec(name="dev"))
        await client.create(VmSpec(name="other"))
        assert await trio.to_thread.run_sync(complete, "stop ") == {"stop dev", "stop other"}
        assert await trio.to_thread.run_sync(complete, "tpm quote d") == {"tpm quote dev"}


async def test_on_a_terminal_it_prompts_completes_and_remembers(tmp_path: Path) -> None:
    """A person's session: Tab finishes the machine's name, the history is kept, Ctrl-D ends with the status."""
    async with open_api(tmp_path) as (client, _):
        await client.create(VmSpec(name="development"))
        leader, follower = os.openpty()
        process = await trio.lowlevel.open_process(
            [sys.executable, "-P", "-m", "rayos_vmm.cli", "shell"],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            env={**environment(tmp_path), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
        )
        os.close(follower)
        seen = b""

        async def until(wanted: bytes) -> None:
            nonlocal seen
            with trio.fail_after(LIMIT_S):
                while wanted not in seen:
                    await trio.lowlevel.wait_readable(leader)
                    seen += os.read(leader, 4096)
            seen = seen.partition(wanted)[2]

        try:
            await until(b"rayos>")
            os.write(leader, b"stop dev\t")
            await until(b"elopment")
            os.write(leader, b" \x03")
            await until(b"rayos [130]>")
            os.write(leader, b"start nobody\r")
            await until(b"rayos [3]>")
            os.write(leader, b"\x04")
            with trio.fail_after(LIMIT_S):
                assert await process.wait() == 3
        finally:
            process.kill()
            os.close(leader)
    history = tmp_path / shell.HISTORY
    assert "+start nobody" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
