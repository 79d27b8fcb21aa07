"""swtpm life cycle, measured boot and attestation. Usable alone: imports nothing from the other packages."""
