"""The operations on a running guest."""
