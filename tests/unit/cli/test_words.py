"""Words into requests, and answers into words: the pure parts of the commands."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from rayos_vmm.cli.agent import guest_command, split_remote
from rayos_vmm.cli.boot import boot_table
from rayos_vmm.cli.main import _parser
from rayos_vmm.cli.output import flatten, render_table
from rayos_vmm.cli.qmp import qmp_arguments
from rayos_vmm.cli.run import to_table
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.machine.view import VmState, VmView


def run_arguments(*words: str) -> argparse.Namespace:
    return _parser("run").parse_args(["run", *words])


def test_options_of_run_become_a_specification(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.touch()
    words = [
        "--memory",
        "1GiB",
        "--disk",
        "64MiB",
        "--disk",
        str(image),
        "--no-tpm",
        "--no-net",
        "--rm",
        "--cpus",
        "2",
    ]
    assert to_table(run_arguments(*words)) == {
        "memory": "1GiB",
        "cpus": 2,
        "disks": [{"size": "64MiB"}, {"path": str(image)}],
        "tpm": False,
        "net": {"enabled": False},
        "ephemeral": True,
    }


def test_options_of_run_win_over_its_file(tmp_path: Path) -> None:
    """A file says what a machine is like; the command line what is different today."""
    file = tmp_path / "vms.toml"
    file.write_text('[vm.one]\nmemory = "512MiB"\ncpus = 2\n[vm.two]\n')
    table = to_table(run_arguments("--config", str(file), "--name", "one", "--memory", "1GiB"))
    assert (table["name"], table["memory"], table["cpus"]) == ("one", "1GiB", 2)
    with pytest.raises(Invalid, match="which machine"):
        to_table(run_arguments("--config", str(file)))
    file.write_text('[vm.one]\nmemroy = "512MiB"\n')
    with pytest.raises(Invalid, match=r"vms\.toml: vm\.one\.memroy: there is no such key"):
        to_table(run_arguments("--config", str(file)))


def test_a_disk_that_is_neither_size_nor_file_is_refused() -> None:
    with pytest.raises(Invalid, match="no such file, and '64' has no unit"):
        to_table(run_arguments("--disk", "64"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("dev:/tmp/x", ("dev", "/tmp/x")),
        ("./dev:/tmp/x", None),
        ("/tmp/a:b", None),
        ("file", None),
        ("-", None),
        ("dev:", ("dev", "")),
    ],
)
def test_a_path_in_a_guest_is_told_from_one_here(text: str, parts: tuple[str, str] | None) -> None:
    assert split_remote(text) == parts


def test_one_word_is_a_shell_line_and_more_are_a_program() -> None:
    assert guest_command(["ls | wc -l"]) == "ls | wc -l"
    assert guest_command(["ls", "-l"]) == ["ls", "-l"]


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ([], None),
        (["id=disk0"], {"id": "disk0"}),
        (["value=3", "on=true", "text=a=b"], {"value": 3, "on": True, "text": "a=b"}),
        (['{"a": {"b": [1]}}'], {"a": {"b": [1]}}),
    ],
)
def test_words_become_the_arguments_of_a_qmp_command(
    words: list[str], arguments: dict[str, Any] | None
) -> None:
    assert qmp_arguments(words) == arguments


@pytest.mark.parametrize("words", [["id"], ["{"]])
def test_words_that_are_no_arguments_are_refused(words: list[str]) -> None:
    with pytest.raises(Invalid):
        qmp_arguments(words)


def test_counters_are_flattened_to_rows() -> None:
    assert flatten({"net": {"queues": [{"kicks": 2, "broken": ""}], "none": {}}}) == [
        ("net.queues.0.kicks", "2"),
        ("net.queues.0.broken", "-"),
        ("net.none", "-"),
    ]


def test_a_table_is_as_wide_as_its_cells() -> None:
    assert render_table(("A", "LONG"), [("first", "x")]) == "A      LONG\nfirst  x"


def test_where_the_time_went_adds_up() -> None:
    """Stages in order, each with its own time and the total; the guest's own clock is not a stage."""
    view = VmView(
        spec=VmSpec(name="dev"),
        state=VmState.RUNNING,
        boot={"qemu_ms": 300.0, "devices_ms": 100.0, "ready_ms": 2300.0, "guest_ms": 1900.0},
    )
    rows = [line.split()[-2:] for line in boot_table(view).splitlines()[1:-1]]
    assert rows == [["0.10", "0.10"], ["0.20", "0.30"], ["2.00", "2.30"]]
    assert boot_table(view).endswith("1.90")
