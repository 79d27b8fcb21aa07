"""What one does to a running guest."""
