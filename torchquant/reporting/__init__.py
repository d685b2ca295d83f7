"""Every op accounted for, for people to read."""
