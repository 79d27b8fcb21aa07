"""pytest fixtures for guests, loaded by itself where the package is installed."""
