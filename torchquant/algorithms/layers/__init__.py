"""What algorithms share that see one layer at a time: second moments, and rounding as a quadratic problem."""
