"""The service over HTTP: `/v1` on a unix socket, described by OpenAPI; and the client of it."""
