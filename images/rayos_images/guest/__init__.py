"""The programs inside the guest, and the host's side of speaking with them."""
