"""Virtio device models served over vhost-user. Usable alone: imports nothing from the other packages."""

from devices import compiled

compiled.install()
