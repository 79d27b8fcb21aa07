"""Virtio device models served over vhost-user. Usable alone: imports nothing from the other packages."""

from rayos_devices import compiled

compiled.install()
