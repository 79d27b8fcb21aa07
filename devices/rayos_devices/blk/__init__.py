"""virtio-blk (VIRTIO 1.3, 5.2) on raw files."""
