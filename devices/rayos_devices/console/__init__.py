"""virtio-console: several named ports to a guest, their history, and the same ports for QEMU's own console."""
