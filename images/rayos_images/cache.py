"""A directory of things that were built once: each entry is named by a hash of everything that it was built
from.

Invariant: a path `<root>/<name>-<key>` exists only whole. An entry is built in a temporary directory beside
it and renamed when done, under a lock per name, so two builders do not race and a full disk or a crash leaves
no entry. An entry is never changed afterwards, so a running guest may go on using an old one.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rayos_images.errors import ImageError

KEY_LENGTH: Final = 16  # hex digits: 64 bits, far more than the handful of entries that a cache ever holds
_NAME: Final = re.compile(r"[a-z][a-z0-9]*")


def key_of(inputs: Mapping[str, Any]) -> str:
    """Return the key of an entry built from `inputs` (JSON values; the order of the keys does not matter)."""
    canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:KEY_LENGTH]


def _share(directory: Path) -> None:
    """Lets everybody read what is in an entry, whatever the umask was: QEMU runs under an identity of its own."""
    for path in (directory, *directory.rglob("*")):
        if not path.is_symlink():
            mode = path.stat().st_mode
            path.chmod(mode | (0o055 if path.is_dir() or mode & 0o100 else 0o044))


class Cache:
    """Entries and notes under `root`, which is made (0755) when it is first written to."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, name: str, inputs: Mapping[str, Any]) -> Path:
        """Return where the entry is or would be; it may not exist."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"cache name {name!r} is not of the form {_NAME.pattern}")
        return self.root / f"{name}-{key_of(inputs)}"

    def build(self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], None]) -> Path:
        """Return the entry of `inputs`, calling `make` with an empty directory when there is none yet.

        Blocks while another process builds an entry of the same name. `make` leaves its result in the
        directory; whatever it raises goes to the caller and nothing stays behind. An `OSError` (disk full, no
        permission) becomes `ImageError`.
        """
        entry = self.path(name, inputs)
        if entry.is_dir():
            return entry
        with self._errors(name), self._lock(name):
            if entry.is_dir():  # built while we waited for the lock
                return entry
            for stale in self.root.glob(f".{name}.build-*"):  # its builder died: the lock is ours
                shutil.rmtree(stale, ignore_errors=True)
            directory = Path(tempfile.mkdtemp(prefix=f".{name}.build-", dir=self.root))
            try:
                make(directory)
                _share(directory)
                subprocess.run(["sync", "-f", directory], check=True)
                directory.rename(entry)
            except BaseException:
                shutil.rmtree(directory, ignore_errors=True)
                raise
        return entry

    @contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A temporary directory on the cache's file system, removed on the way out."""
        with self._errors(name):
            self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}.scratch-", dir=self.root) as directory:
                yield Path(directory)

    def read_note(self, name: str) -> dict[str, Any] | None:
        """Return a small remembered JSON object, or None when there is none or it is damaged."""
        try:
            value = json.loads((self.root / f"{name}.json").read_bytes())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def write_note(self, name: str, value: Mapping[str, Any]) -> None:
        """Remember `value` under `name`, replacing atomically what was there."""
        with self._errors(name):
            self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.note-", dir=self.root)
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(value, file, indent=1, sort_keys=True)
                Path(temporary).chmod(0o644)
                Path(temporary).rename(self.root / f"{name}.json")
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        self.root.mkdir(mode=0o755, parents=True, exist_ok=True)
        with (self.root / f".{name}.lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ImageError(f"cannot build {name} in {self.root}: {error.strerror or error}") from error
        except subprocess.CalledProcessError as error:
            said = (error.stderr or b"")[:300]
            raise ImageError(f"cannot build {name} in {self.root}: {error} {said!r}") from error
