"""The service: decides, composes and exposes what the four libraries below it do."""
