"""The configuration that a user writes: units, machine specifications, the service's own settings, TOML files."""
