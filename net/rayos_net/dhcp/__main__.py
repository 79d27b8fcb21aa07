"""`python -m rayos_net.dhcp`: the DHCP server as a command."""

from __future__ import annotations

import sys

from rayos_net.dhcp.command import main

if __name__ == "__main__":
    sys.exit(main())
