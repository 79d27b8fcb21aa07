"""What a guest boots from: kernel, initramfs, QEMU. Usable alone: imports nothing from the other packages."""
