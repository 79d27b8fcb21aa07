"""virtio-net (VIRTIO 1.3, 5.1) between a guest and a frame port: a tap, or for tests an echo or a sink."""
