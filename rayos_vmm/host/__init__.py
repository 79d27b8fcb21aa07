"""Processes of this host, and what they may reach."""
