"""What the service and its device workers both map or say."""
