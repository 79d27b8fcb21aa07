"""The one exception of this package: a clear sentence about what could not be built or found."""


class ImageError(RuntimeError):
    """A kernel, initramfs, QEMU or accelerator is not available; the text says what was seen and what to
    do."""
