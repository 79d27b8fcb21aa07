"""The service as a whole: its parts opened in order, its machines, its workers, its records."""
