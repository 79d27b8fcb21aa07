"""The `rayos` command: a thin client of the API, one module for each noun."""
