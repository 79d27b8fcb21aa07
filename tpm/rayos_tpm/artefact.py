"""Kernels, initrds and firmware as sealed memory: what is measured is what QEMU gets.

A file is copied into a memfd that nobody can change again, and hashed on the way. The copies are kept, so that
many VMs share one and only the first start pays (66 MB: 140 ms). A file that was changed, replaced or touched is
another file. Invariant: a digest belongs to the sealed bytes of its descriptor, whatever the file does.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Final, Self

from rayos_tpm.errors import TpmError
from rayos_tpm.measurement import Measurement, in_order, of_bytes, of_command_line, pieces
from rayos_tpm.phase import Phase

KEPT_BYTES: Final = 512 << 20
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


@dataclass(frozen=True, slots=True)
class Artefact:
    """A sealed copy. descriptor: the caller's own, close-on-exec; QEMU takes /proc/self/fd/N of it.

    Close it, or use it as a context manager.
    """

    name: str
    descriptor: int
    digest: bytes
    size_bytes: int

    def measurement(self, phase: Phase) -> Measurement:
        """The event for the log."""
        return Measurement(phase, f"{phase} {self.name}", self.digest)

    def close(self) -> None:
        """Give the descriptor back. Call once."""
        os.close(self.descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ArtefactStore:
    """Sealed copies of files, the least recently used given up beyond kept_bytes. Any thread may call."""

    def __init__(self, *, kept_bytes: int = KEPT_BYTES) -> None:
        self._kept_bytes = kept_bytes
        self._kept: OrderedDict[tuple[str, int, int, int, int, int], Artefact] = OrderedDict()
        self._lock = Lock()

    def open(self, path: Path) -> Artefact:
        """The file's sealed copy. Blocks while it is copied: call in a thread.

        TpmError: the file cannot be read, or memory is short.
        """
        try:
            source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TpmError(f"cannot read {path} to measure it: {error.strerror}") from None
        try:
            info = os.fstat(source)
            identity = (str(path), info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)
            with self._lock:
                kept = self._kept.get(identity)
                if kept is None:
                    kept = self._kept[identity] = _seal(path, source)
                self._kept.move_to_end(identity)
                own = os.dup(kept.descriptor)
                self._shrink()
            return Artefact(kept.name, own, kept.digest, kept.size_bytes)
        except OSError as error:
            raise TpmError(f"cannot copy {path} to measure it: {error.strerror}") from None
        finally:
            os.close(source)

    def _shrink(self) -> None:
        total = sum(kept.size_bytes for kept in self._kept.values())
        while total > self._kept_bytes:
            _, oldest = self._kept.popitem(last=False)
            total -= oldest.size_bytes
            oldest.close()

    def close(self) -> None:
        """Give up all copies; those that were handed out stay good. Safe to call again."""
        with self._lock:
            while self._kept:
                self._kept.popitem()[1].close()


def _seal(path: Path, source: int) -> Artefact:
    target = os.memfd_create(f"rayos-{path.name[:64]}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        total = hashlib.sha256()
        size = 0
        for piece in pieces(source):
            total.update(piece)
            size += len(piece)
            view = memoryview(piece)
            while view:
                view = view[os.write(target, view) :]
        fcntl.fcntl(target, fcntl.F_ADD_SEALS, _SEALS)
        os.lseek(target, 0, os.SEEK_SET)
        return Artefact(path.name, target, total.digest(), size)
    except BaseException:
        os.close(target)
        raise


@dataclass(frozen=True, slots=True)
class MeasuredBoot:
    """A measured boot: the events for start_tpm, and the sealed files for QEMU. Close it once QEMU runs."""

    measurements: list[Measurement]
    kernel: Artefact | None
    initrd: Artefact | None
    firmware: Artefact | None

    def close(self) -> None:
        """Give the descriptors back. Call once."""
        for artefact in (self.kernel, self.initrd, self.firmware):
            if artefact is not None:
                artefact.close()

    @property
    def descriptors(self) -> tuple[int, ...]:
        """The descriptors that QEMU has to inherit."""
        found = (self.kernel, self.initrd, self.firmware)
        return tuple(artefact.descriptor for artefact in found if artefact is not None)


def measure_boot(
    store: ArtefactStore,
    *,
    launch: str,
    policy: str = "",
    append: str = "",
    kernel: Path | None = None,
    initrd: Path | None = None,
    firmware: Path | None = None,
    built_in_firmware: str = "",
) -> MeasuredBoot:
    """Copy and measure everything a VM boots, one event for each phase that has something. Blocks: use a thread.

    launch: which VM this is, canonical text: UUID, memory, CPUs. Equal over boots, or PCR 11 differs.
    policy: the security policy in force, as text. append: the kernel command line.
    firmware: a file; else built_in_firmware says which QEMU brings it: "qboot.rom of QEMU 11.1.3".
    TpmError: a file cannot be read; no descriptor is left open then.
    """
    opened: list[Artefact] = []
    try:
        for path in (firmware, kernel, initrd):
            if path is not None:
                opened.append(store.open(path))
        taken = iter(opened)
        files = [None if path is None else next(taken) for path in (firmware, kernel, initrd)]
        events = [
            item.measurement(phase)
            for phase, item in zip((Phase.FIRMWARE, Phase.KERNEL, Phase.INITRD), files, strict=True)
            if item is not None
        ]
        texts = (
            (Phase.FIRMWARE, "" if firmware else built_in_firmware),
            (Phase.POLICY, policy),
            (Phase.LAUNCH, launch),
        )
        events += [of_bytes(phase, f"{phase}: {text}"[:256], text.encode()) for phase, text in texts if text]
        if kernel is not None:
            events.append(of_command_line(append))
        return MeasuredBoot(in_order(events), files[1], files[2], files[0])
    except BaseException:
        for artefact in opened:
            artefact.close()
        raise
