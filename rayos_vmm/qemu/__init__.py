"""QEMU: its command line, its monitor, what it can boot."""
