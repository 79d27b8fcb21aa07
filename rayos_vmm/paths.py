"""Where the service keeps things.

| what | root | a user | variable |
| --- | --- | --- | --- |
| state (disks, TPM state, records) | /var/lib/rayos | $XDG_STATE_HOME/rayos | RAYOS_STATE_DIR |
| runtime (sockets) | /run/rayos | $XDG_RUNTIME_DIR/rayos | RAYOS_RUNTIME_DIR |
| cache (kernels, QEMU) | /var/cache/rayos | $XDG_CACHE_HOME/rayos | RAYOS_CACHE_DIR |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rayos_vmm.errors import Invalid

# sockaddr_un.sun_path is 108 bytes with its NUL (unix(7)); the longest thing below a machine's directory:
SOCKET_PATH_MAXIMUM_BYTES: Final = 107
_LONGEST_SOCKET_NAME: Final = "vhost-console.sock"
_LONGEST_VM_NAME: Final = 32
_VARIABLES: Final = "RAYOS_STATE_DIR, RAYOS_RUNTIME_DIR, RAYOS_CACHE_DIR"


@dataclass(frozen=True, slots=True)
class Paths:
    """The three directories and what is where in them."""

    state: Path
    runtime: Path
    cache: Path

    @property
    def api_socket(self) -> Path:
        return self.runtime / "api.sock"

    @property
    def lock(self) -> Path:
        """Held by the one daemon that owns the runtime directory."""
        return self.runtime / "daemon.lock"

    @property
    def state_lock(self) -> Path:
        """Held by the one daemon that owns the state directory."""
        return self.state / "daemon.lock"

    @property
    def database(self) -> Path:
        return self.state / "rayos.db"

    @property
    def audit(self) -> Path:
        """The record of every decision."""
        return self.state / "audit.log"

    @property
    def audit_key(self) -> Path:
        """The key that signs the record's checkpoints."""
        return self.state / "audit.key"

    @property
    def token_key(self) -> Path:
        """The key that signs every token."""
        return self.state / "token.key"

    def vm_runtime(self, name: str) -> Path:
        """Sockets of a machine; removed when it stops."""
        return self.runtime / "vm" / name

    def vm_state(self, name: str) -> Path:
        """Disks, TPM state and logs of a machine; removed with it."""
        return self.state / "vm" / name

    def create(self) -> None:
        """Makes the directories, private to their owner.

        Raises:
            Invalid: the runtime directory's path is too long to hold a socket, or others may write in a directory.
        """
        longest = self.vm_runtime("n" * _LONGEST_VM_NAME) / _LONGEST_SOCKET_NAME
        if len(os.fsencode(longest)) > SOCKET_PATH_MAXIMUM_BYTES:
            room = SOCKET_PATH_MAXIMUM_BYTES - len(os.fsencode(longest)) + len(os.fsencode(self.runtime))
            raise Invalid(
                f"the runtime directory {self.runtime} has {len(os.fsencode(self.runtime))} bytes; "
                f"sockets in it allow at most {room}",
                hint="set RAYOS_RUNTIME_DIR to a shorter path",
            )
        for directory in (self.state, self.runtime, self.cache):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            _check_ours(directory)
        (self.runtime / "vm").mkdir(exist_ok=True, mode=0o700)
        (self.state / "vm").mkdir(exist_ok=True, mode=0o700)


def private(path: str, flags: int) -> int:
    """An opener for `open`: the file is its owner's alone."""
    return os.open(path, flags, 0o600)


def _check_ours(directory: Path) -> None:
    """Raises Invalid when somebody else could put things into the directory that we then believe."""
    status = directory.stat()
    if status.st_uid != os.geteuid():
        raise Invalid(
            f"{directory} belongs to user {status.st_uid}, and this service runs as user {os.geteuid()}",
            hint=f"chown it, or choose another directory: {_VARIABLES}",
        )
    if status.st_mode & 0o022:
        raise Invalid(
            f"others may write in {directory} (mode {status.st_mode & 0o7777:04o}); at most 0755 is allowed",
            hint=f"chmod go-w {directory}",
        )


def default_paths(environ: Mapping[str, str] | None = None, *, uid: int | None = None) -> Paths:
    """The directories that the environment and the user imply; creates nothing."""
    env = os.environ if environ is None else environ
    user = os.geteuid() if uid is None else uid
    home = Path(env.get("HOME", "/"))

    def pick(variable: str, for_root: str, xdg: str, fallback: Path) -> Path:
        if env.get(variable):
            return Path(env[variable]).absolute()
        if user == 0:
            return Path(for_root)
        return Path(env[xdg]) / "rayos" if env.get(xdg) else fallback

    return Paths(
        state=pick("RAYOS_STATE_DIR", "/var/lib/rayos", "XDG_STATE_HOME", home / ".local/state/rayos"),
        runtime=pick("RAYOS_RUNTIME_DIR", "/run/rayos", "XDG_RUNTIME_DIR", Path(f"/tmp/rayos-{user}")),
        cache=pick("RAYOS_CACHE_DIR", "/var/cache/rayos", "XDG_CACHE_HOME", home / ".cache/rayos"),
    )
