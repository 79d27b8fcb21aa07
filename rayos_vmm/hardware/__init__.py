"""A machine's devices as the service sees them: keepers, their clients, disk readers."""
