"""The display device: virtio-gpu in 2D, with EDID and a cursor plane (VIRTIO 1.3, 5.7)."""
