"""The contract between the API and its clients."""
