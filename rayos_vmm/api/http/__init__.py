"""The HTTP server of the API: connections under limits, each a boundary of its own; an ASGI server on trio."""
