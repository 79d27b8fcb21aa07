"""Kernel, initramfs and QEMU: all that a guest boots from. Usable alone: imports nothing from the other packages.

Everything is built from Debian packages into a `Cache`, by blocking functions that raise `ImageError`.
"""

from rayos_images.cache import Cache
from rayos_images.errors import ImageError

__all__ = ["Cache", "ImageError"]
