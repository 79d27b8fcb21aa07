"""A drop-in for QEMU's command line: parse it ●, translate it ●, run the machine ○ as if this process were QEMU."""
