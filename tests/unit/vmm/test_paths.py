"""Where things are kept, for root, for a user, and as the environment says."""

from __future__ import annotations

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


def test_a_runtime_directory_too_long_for_sockets_is_refused(tmp_path: Path) -> None:
    """Before anything fails half-way with a truncated path."""
    deep = tmp_path / ("d" * 90)
    with pytest.raises(Invalid, match="sockets in it allow at most") as refused:
        Paths(tmp_path / "s", deep, tmp_path / "c").create()
    assert "RAYOS_RUNTIME_DIR" in refused.value.hint
    assert not deep.exists()
