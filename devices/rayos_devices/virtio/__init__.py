"""The transport-independent part of virtio: feature bits, guest memory, virtqueues, descriptor chains."""
