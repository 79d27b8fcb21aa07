"""The `newc` cpio archive that Linux unpacks as its first root (Documentation/driver-api/early-userspace/
buffer-format.rst). Every file belongs to root and has no time, so equal contents give equal bytes."""

import stat
from dataclasses import dataclass, field
from typing import Final

_MAGIC: Final = b"070701"
_TRAILER: Final = "TRAILER!!!"


@dataclass(slots=True)
class Archive:
    """Add entries parents first, then take `finish()`."""

    _parts: list[bytes] = field(default_factory=list)
    _inode: int = 0

    def directory(self, path: str, mode: int = 0o755) -> None:
        self._add(path, stat.S_IFDIR | mode, links=2)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        self._add(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._add(path, stat.S_IFCHR | mode, device=(major, minor))

    def fifo(self, path: str, mode: int = 0o600) -> None:
        self._add(path, stat.S_IFIFO | mode)

    def finish(self) -> bytes:
        """Return the whole archive with its trailer."""
        self._add(_TRAILER, 0)
        return b"".join(self._parts)

    def _add(
        self, path: str, mode: int, data: bytes = b"", *, device: tuple[int, int] = (0, 0), links: int = 1
    ) -> None:
        self._inode += 1
        name = path.encode() + b"\0"
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0)
        header = _MAGIC + b"".join(b"%08X" % value for value in fields)
        self._parts += [_padded(header + name), _padded(data)]


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
