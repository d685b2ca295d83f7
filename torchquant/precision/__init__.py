"""A scheme for each weight, under a budget: found, written down, reviewed and applied again."""
