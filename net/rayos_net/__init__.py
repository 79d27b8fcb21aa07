"""Links, taps, DHCP and the firewall. Usable alone: imports nothing from the other packages."""
