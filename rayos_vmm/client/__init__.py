"""The client of the API, and the daemon that it finds or starts."""
