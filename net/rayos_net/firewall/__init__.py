"""A firewall for guests: rules, a compiled table whose lookup does not grow with them, flows, and verdicts."""
