"""DNS for guests: an authoritative answer for their names, and a trio shell around it."""
