"""What algorithms share that see a block at a time: an objective, and learning what is continuous."""
