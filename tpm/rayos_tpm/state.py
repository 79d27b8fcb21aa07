"""A VM's TPM state directory: private, its own, and never somebody else's.

Invariant: after prepare() the directory is real (no symlink), ours, mode 0700, holds no symlinks, and
its record names the VM. Cloning a state directory would clone the endorsement seed, hence the identity:
a record with another VM's UUID refuses the start.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import struct
from pathlib import Path
from typing import Final

import msgspec

from rayos_tpm.errors import StateError

PERMANENT: Final = "tpm2-00.permall"  # swtpm's file: seeds, persistent objects, NV
RECORD: Final = "record.json"
LOCK: Final = ".lock"  # swtpm holds a POSIX record lock on it while it runs
UNFINISHED: Final = "provisioning"  # stands while a fresh TPM is set up; then the state is worth nothing
RECORD_LIMIT: Final = 64 * 1024


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The host's knowledge of a VM's TPM, all public.

    vm_uuid: the VM it belongs to.
    ak_public: the attestation key's TPMT_PUBLIC, empty until provisioned.
    ek_public: the endorsement key's TPMT_PUBLIC.
    ek_certificate: the endorsement key's certificate, DER.
    """

    vm_uuid: str
    ak_public: bytes = b""
    ek_public: bytes = b""
    ek_certificate: bytes = b""


def _check_plain(path: Path) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        raise StateError(f"{path} is a symbolic link; TPM state is never followed through one. Remove it")


def prepare(directory: Path) -> bool:
    """Make the directory private and say whether it is fresh (holds no TPM yet).

    StateError: it is a symlink, not a directory, another user's, holds a symlink, or a swtpm uses it.
    """
    if not directory.is_symlink():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_plain(directory)
    info = directory.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise StateError(f"{directory} is not a directory")
    if info.st_uid != os.geteuid():
        raise StateError(f"{directory} belongs to user {info.st_uid}, this is user {os.geteuid()}")
    if stat.S_IMODE(info.st_mode) != 0o700:
        directory.chmod(0o700)
    for entry in sorted(directory.iterdir()):
        _check_plain(entry)
    if (holder := _lock_holder(directory)) is not None:
        raise StateError(f"the TPM state in {directory} is in use by process {holder}; stop that VM first")
    if (directory / UNFINISHED).exists():
        _empty(directory)
    return not (directory / PERMANENT).exists()


_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid


def _lock_holder(directory: Path) -> int | None:
    """The process that holds swtpm's lock, None when it is free."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
        return None if kind == fcntl.F_UNLCK else int(pid)
    finally:
        os.close(descriptor)


def read_record(directory: Path, vm_uuid: str) -> Record:
    """The record beside existing state.

    StateError: no record, a damaged one, or another VM's.
    """
    path = directory / RECORD
    try:
        with path.open("rb") as file:
            record = msgspec.json.decode(file.read(RECORD_LIMIT), type=Record)
    except FileNotFoundError:
        raise StateError(
            f"{directory} holds TPM state that RayOS did not make (no {RECORD}); remove it to get a new TPM"
        ) from None
    except msgspec.DecodeError as error:
        raise StateError(f"{path} is damaged ({error}); remove {directory} to start with a new TPM") from None
    if record.vm_uuid != vm_uuid:
        raise StateError(
            f"{directory} is the TPM of VM {record.vm_uuid}, not of {vm_uuid}; it cannot be shared or cloned"
        )
    return record


def begin(directory: Path) -> None:
    """Mark the directory as being set up: until finish() it counts as fresh."""
    (directory / UNFINISHED).touch(mode=0o600)


def finish(directory: Path, record: Record) -> None:
    """Store the record and end what begin() began."""
    temporary = directory / f"{RECORD}.new"
    descriptor = os.open(
        temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(record))
    temporary.rename(directory / RECORD)
    (directory / UNFINISHED).unlink(missing_ok=True)


def _empty(directory: Path) -> None:
    for entry in directory.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def wipe(directory: Path) -> None:
    """Destroy a VM's TPM: overwrite the regular files once, remove all. Nothing happens when it is gone.

    StateError: the directory is a symlink.
    """
    if not directory.is_symlink() and not directory.exists():
        return
    _check_plain(directory)
    for entry in directory.iterdir():
        if stat.S_ISREG(entry.lstat().st_mode):
            with entry.open("r+b") as file:
                size = entry.stat().st_size
                file.write(bytes(size))
                file.flush()
                os.fsync(file.fileno())
    shutil.rmtree(directory)
