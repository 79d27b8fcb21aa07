"""virtio-input: keyboard, mouse, tablet and touch screen, fed by injection."""
