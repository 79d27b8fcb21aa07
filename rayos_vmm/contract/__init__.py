"""What travels between the API and its clients."""
