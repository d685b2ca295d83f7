"""Small models of distinct kinds, and what each must become on each target: right, or refused by name."""
