"""What a user may ask for: units, machine specifications, the service's own settings, TOML files."""
