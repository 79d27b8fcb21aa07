"""Kernel module files: what they depend on, the order to insert them in, and what to leave out of them.

Pure. Dependencies are read from the file's own `.modinfo` (`depends=a,b`), so neither depmod nor modinfo is
needed.
"""

import re
import struct
from collections.abc import Iterable, Mapping
from typing import Final

from rayos_images.errors import ImageError

# struct module_signature (include/linux/module_signature.h): 8 bytes of type, then the length, big-endian
_SIGNATURE_MAGIC: Final = b"~Module signature appended~\n"
_SIGNATURE: Final = struct.Struct(">8xI")


def name_of(file_name: str) -> str:
    """Return the module's name as the kernel knows it: `virtio-gpu.ko` is `virtio_gpu`."""
    return file_name.removesuffix(".ko").replace("-", "_")


def depends_of(module: bytes) -> tuple[str, ...]:
    """Return the names of the modules that must be inserted before this one, in the file's order."""
    start = module.find(b"\0depends=")
    if start < 0:  # the first string of .modinfo has no terminator before it
        return ()
    value = module[start + len(b"\0depends=") : module.index(b"\0", start + 1)]
    return tuple(name_of(name) for name in value.decode("ascii").split(",") if name)


def aliases_of(module: bytes) -> tuple[str, ...]:
    """Return the other names that the kernel asks for the module by, such as `fs-ext4` or `crypto-crc32c`."""
    return tuple(
        found.decode("ascii") for found in re.findall(rb"(?<=\0)alias=((?:fs|crypto)-[!-~]+)(?=\0)", module)
    )


def insertion_order(wanted: Iterable[str], depends: Mapping[str, Iterable[str]]) -> list[str]:
    """Return `wanted` and all that they need, each after its dependencies, otherwise in the order given.

    `depends` has every available module; one that it lacks is taken to be built in when another module needs
    it. Raises `ImageError` when a wanted module is not there, or when modules depend on each other in a
    circle.
    """
    order: list[str] = []
    visiting: list[str] = []

    def visit(name: str) -> None:
        if name in order or name not in depends:
            return
        if name in visiting:
            raise ImageError(f"modules depend on each other: {' -> '.join([*visiting, name])}")
        visiting.append(name)
        for dependency in depends[name]:
            visit(dependency)
        visiting.pop()
        order.append(name)

    for name in wanted:
        if name not in depends:
            raise ImageError(f"module {name} is not in this kernel package")
        visit(name)
    return order


def trim(module: bytes) -> bytes:
    """Return the module without its signature and with its type information hidden.

    Both cost time at insertion, under TCG most of it: an RSA verification and a walk over all types. Debian's
    kernel accepts unsigned modules (they set the taint flag E); `.BTF` is only hidden by renaming it in the
    section names, so no offset moves.
    """
    if module.endswith(_SIGNATURE_MAGIC):
        end = len(module) - len(_SIGNATURE_MAGIC)
        (length,) = _SIGNATURE.unpack_from(module, end - _SIGNATURE.size)
        module = module[: end - _SIGNATURE.size - length]
    return module.replace(b"\0.BTF\0", b"\0.XTF\0")
