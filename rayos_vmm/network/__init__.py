"""The guests' network on the host."""
