"""Guests in tests: a private daemon, and a guest with the verbs that testers know.

    async with open_daemon() as daemon, open_guest(daemon, disk="64MiB") as guest:
        await guest.succeed("dd if=/dev/urandom of=/dev/vda bs=1M count=8 conv=fsync")

In pytest the fixture `guest_factory` does the first line.
"""

from rayos_vmm.testing.console import GuestConsole
from rayos_vmm.testing.daemon import PrivateDaemon, open_daemon, open_private_daemon
from rayos_vmm.testing.guest import CommandFailed, Guest
from rayos_vmm.testing.open import open_guest

__all__ = [
    "CommandFailed",
    "Guest",
    "GuestConsole",
    "PrivateDaemon",
    "open_daemon",
    "open_guest",
    "open_private_daemon",
]
