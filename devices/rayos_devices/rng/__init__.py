"""virtio-entropy: randomness for a guest (VIRTIO 1.3, 5.4)."""
