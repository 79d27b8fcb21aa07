"""The other side of the devices: guest memory, the driver's rings, a vhost-user frontend, and ways to run a backend."""
