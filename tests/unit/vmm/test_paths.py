"""Where things are kept, for root, for a user, and as the environment says."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayos_vmm.errors import Invalid
from rayos_vmm.paths import Paths, default_paths


def test_directories_follow_user_and_environment() -> None:
    """The environment wins, then root's places or XDG's."""
    root = default_paths({}, uid=0)
    assert (root.state, root.runtime, root.cache) == (
        Path("/var/lib/rayos"),
        Path("/run/rayos"),
        Path("/var/cache/rayos"),
    )
    user = default_paths({"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/1"}, uid=1)
    assert user.runtime == Path("/run/user/1/rayos")
    assert user.state == Path("/home/u/.local/state/rayos")
    assert default_paths({"RAYOS_STATE_DIR": "/x"}, uid=0).state == Path("/x")


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose path leaves room for sockets."""
    with tempfile.TemporaryDirectory(prefix="rayp", dir="/tmp") as directory:
        yield Path(directory)


@pytest.mark.parametrize("which", ["state", "runtime", "cache"])
def test_a_directory_in_which_others_may_write_is_refused(short: Path, which: str) -> None:
    """The service believes what is in there: records, sockets, programs."""
    paths = Paths(short / "state", short / "runtime", short / "cache")
    directory = short / which
    directory.mkdir()
    for mode in (0o777, 0o1777, 0o775, 0o707):
        directory.chmod(mode)
        with pytest.raises(Invalid, match=f"others may write in {directory}") as refused:
            paths.create()
        assert refused.value.hint == f"chmod go-w {directory}"
    directory.chmod(0o755)
    paths.create()


@pytest.mark.root
def test_a_directory_of_another_user_is_refused(short: Path) -> None:
    """Its owner may write there, whatever its mode is."""
    paths = Paths(short / "state", short / "runtime", short / "cache")
    paths.state.mkdir(mode=0o700)
    os.chown(paths.state, 65534, 65534)
    with pytest.raises(Invalid, match="belongs to user 65534"):
        paths.create()


def test_a_runtime_directory_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    """Before anything fails half-way with a truncated path."""
    deep = tmp_path / ("d" * 90)
    with pytest.raises(Invalid, match="sockets in it allow at most") as refused:
        Paths(tmp_path / "s", deep, tmp_path / "c").create()
    assert "RAYOS_RUNTIME_DIR" in refused.value.hint
    assert not deep.exists()
