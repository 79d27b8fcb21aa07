"""An entry exists whole or not at all."""

import errno
import threading
import time
from pathlib import Path

import pytest

from rayos_images import Cache, ImageError
from rayos_images.cache import key_of


def test_an_entry_is_built_once(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    builds: list[Path] = []

    def make(directory: Path) -> None:
        builds.append(directory)
        (directory / "file").write_text("contents")

    first = cache.build("thing", {"a": 1, "b": [2]}, make)
    assert cache.build("thing", {"b": [2], "a": 1}, make) == first
    assert cache.build("thing", {"a": 2}, make) != first
    assert len(builds) == 2
    assert (first / "file").read_text() == "contents"
    assert first.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()]
)
def test_a_build_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    cache = Cache(tmp_path)

    def make(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise error

    with pytest.raises(ImageError if isinstance(error, OSError) else type(error)) as caught:
        cache.build("thing", {}, make)
    if isinstance(error, OSError):
        assert str(caught.value) == f"cannot build thing in {tmp_path}: No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == [".thing.lock"]


def test_what_a_killed_builder_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left = tmp_path / ".thing.build-dead"
    left.mkdir()
    Cache(tmp_path).build("thing", {}, lambda directory: None)
    assert not left.exists()


def test_two_builders_build_once(tmp_path: Path) -> None:
    builds: list[Path] = []

    def make(directory: Path) -> None:
        builds.append(directory)
        time.sleep(0.05)

    threads = [threading.Thread(target=Cache(tmp_path).build, args=("thing", {}, make)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1


def test_a_cache_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError, match=r"cannot build thing in .*: Not a directory"):
        Cache(tmp_path / "file" / "cache").build("thing", {}, lambda directory: None)


def test_notes_come_back_and_damaged_ones_do_not(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache")
    assert cache.read_note("answer") is None
    cache.write_note("answer", {"name": "tcg"})
    assert cache.read_note("answer") == {"name": "tcg"}
    (tmp_path / "cache/answer.json").write_text("{")
    assert cache.read_note("answer") is None


def test_the_scratch_directory_is_removed(tmp_path: Path) -> None:
    with Cache(tmp_path).scratch("thing") as scratch:
        (scratch / "file").touch()
    assert list(tmp_path.iterdir()) == []


def test_the_key_does_not_depend_on_the_order() -> None:
    assert key_of({"a": 1, "b": 2}) == key_of({"b": 2, "a": 1}) != key_of({"a": 1, "b": 3})
