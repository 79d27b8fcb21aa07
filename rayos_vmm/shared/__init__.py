"""Memory and messages that the service and its device workers share."""
