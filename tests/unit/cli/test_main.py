"""The command line before any daemon: help, usage errors, exit statuses, completion."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayos_vmm.cli.exit_status import OTHERS, TABLE, in_words, of_error
from rayos_vmm.cli.main import COMMANDS, GROUPS, main
from rayos_vmm.errors import Busy, Conflict, GuestGone, Invalid, NotFound, RayosError, Timeout_


def rayos(*words: str, directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a process, with directories of its own."""
    paths = {f"RAYOS_{what}_DIR": str(directory / what) for what in ("STATE", "RUNTIME", "CACHE")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "rayos_vmm.cli", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **paths, **environment},
        timeout=60,
        check=False,
    )


def test_help_names_every_command(tmp_path: Path) -> None:
    shown = rayos("--help", directory=tmp_path)
    assert shown.returncode == 0
    assert all(command in shown.stdout for command in COMMANDS)


def test_every_command_is_in_one_group() -> None:
    """`rayos --help` shows each command once."""
    named = [name for names in GROUPS.values() for name in names]
    assert sorted(named) == sorted(COMMANDS)


def test_help_is_quick_for_it_imports_neither_trio_nor_msgspec() -> None:
    script = "import sys, rayos_vmm.cli.main as m; m.main([]); print(sorted({'trio', 'msgspec'} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.endswith("[]\n")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "device"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["run", "--memory", "256"], "has no unit"),
        (["run", "--memory", "256MB"], "has unit 'MB'"),
        (["wait", "dev", "--timeout", "5 apples"], "has unit ' apples'"),
        (["console", "dev", "--port", "39"], "is not a port"),
        (["stop"], "NAME"),
    ],
)
def test_wrong_usage_is_status_2_and_says_what_is_allowed(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RayosError("x"), 1),
        (Invalid("x"), 2),
        (NotFound("x"), 3),
        (Conflict("x"), 4),
        (Busy("x"), 4),
        (GuestGone("x"), 5),
        (Timeout_("x"), 124),
    ],
)
def test_an_error_has_its_exit_status(error: RayosError, status: int) -> None:
    assert of_error(error) == status


def test_without_a_daemon_a_command_fails_with_a_hint(tmp_path: Path) -> None:
    """In words, or as one JSON object on standard error."""
    plain = rayos("stats", "dev", directory=tmp_path)
    assert (plain.returncode, plain.stdout) == (1, "")
    assert "no daemon answers" in plain.stderr
    assert "try: start one with `rayos serve`" in plain.stderr
    assert '"code":"no_daemon"' in rayos("--json", "stats", "dev", directory=tmp_path).stderr
    assert '"code":"no_daemon"' in rayos("stats", "dev", "--json", directory=tmp_path).stderr
    assert list(tmp_path.iterdir()) == []


def test_the_shell_completes_commands(tmp_path: Path) -> None:
    line = "rayos scr"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "rayos_vmm.cli"],
        env={
            **os.environ,
            "_ARGCOMPLETE": "1",
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
            "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"),
            "RAYOS_RUNTIME_DIR": str(tmp_path),
        },
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text().split("\v") == ["screenshot "]


def test_the_table_of_exit_statuses_is_in_the_documents() -> None:
    """Every status with its word and meaning, as `rayos run --help` has them."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "exit-status.md").read_text(encoding="utf-8")
    rows = [f"| {status} | {word} | {meaning} |" for status, (word, meaning) in TABLE.items()]
    assert [row for row in rows if row not in page] == []
    assert OTHERS in page
    assert all(f"{status:>3}  {word}" in in_words() for status, (word, _) in TABLE.items())
