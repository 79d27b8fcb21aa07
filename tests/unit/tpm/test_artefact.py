"""Sealed artefacts: shared, unchangeable, and told apart when the file changes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from rayos_tpm.artefact import ArtefactStore, measure_boot
from rayos_tpm.errors import TpmError
from rayos_tpm.phase import Phase


def test_copy_is_sealed_and_measured(tmp_path: Path) -> None:
    """The digest is of the very bytes behind the descriptor, and nobody can change those."""
    path = tmp_path / "vmlinux"
    path.write_bytes(b"kernel" * 300_000)
    store = ArtefactStore()
    with store.open(path) as kernel:
        path.write_bytes(b"replaced")
        whole = Path(f"/proc/self/fd/{kernel.descriptor}").read_bytes()
        assert hashlib.sha256(whole).digest() == kernel.digest == kernel.measurement(Phase.KERNEL).digest
        assert kernel.measurement(Phase.KERNEL).description == "kernel vmlinux"
        for change in (lambda fd: os.write(fd, b"!"), lambda fd: os.ftruncate(fd, 1)):
            with pytest.raises(PermissionError):
                change(kernel.descriptor)
    store.close()


def test_same_file_is_copied_once_and_a_changed_one_again(tmp_path: Path) -> None:
    """Two VMs share the memory; a file with other contents is another artefact."""
    path = tmp_path / "initrd"
    path.write_bytes(b"one")
    store = ArtefactStore()
    with store.open(path) as first, store.open(path) as second:
        assert os.fstat(first.descriptor).st_ino == os.fstat(second.descriptor).st_ino
        assert first.descriptor != second.descriptor
        path.write_bytes(b"two!")
        with store.open(path) as third:
            assert third.digest == hashlib.sha256(b"two!").digest() != first.digest
    store.close()


def test_store_gives_up_the_oldest(tmp_path: Path) -> None:
    """A file that was handed out stays good after the store let go of it."""
    store = ArtefactStore(kept_bytes=100)
    (tmp_path / "a").write_bytes(b"a" * 80)
    (tmp_path / "b").write_bytes(b"b" * 80)
    with store.open(tmp_path / "a") as first, store.open(tmp_path / "b"):
        with store.open(tmp_path / "a") as again:
            assert os.fstat(again.descriptor).st_ino != os.fstat(first.descriptor).st_ino
        assert os.pread(first.descriptor, 80, 0) == b"a" * 80
    store.close()


def test_missing_file_is_named(tmp_path: Path) -> None:
    """The sentence has the path and the reason."""
    with pytest.raises(TpmError, match="nothing to measure it: No such file"):
        ArtefactStore().open(tmp_path / "nothing")


def test_measured_boot_has_an_event_for_each_thing(tmp_path: Path) -> None:
    """In phase order; a file that is missing closes what was opened before it."""
    for name in ("vmlinux", "initrd"):
        (tmp_path / name).write_bytes(name.encode())
    store = ArtefactStore()
    boot = measure_boot(
        store, launch="vm", policy="p", append="quiet", kernel=tmp_path / "vmlinux", initrd=tmp_path / "initrd",
        built_in_firmware="qboot",
    )  # fmt: skip
    assert [event.phase for event in boot.measurements] == list(Phase)
    assert boot.measurements[2].digest == hashlib.sha256(b"vmlinux").digest()
    assert boot.kernel is not None and os.pread(boot.kernel.descriptor, 9, 0) == b"vmlinux"
    assert len(boot.descriptors) == 2
    boot.close()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(TpmError, match="nothing"):
        measure_boot(store, launch="vm", kernel=tmp_path / "vmlinux", initrd=tmp_path / "nothing")
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    store.close()
