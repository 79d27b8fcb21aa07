"""Authority: what a machine may do with its devices, until when, by whose leave, and the record of every decision."""
