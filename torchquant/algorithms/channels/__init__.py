"""What algorithms share that move factors and shifts between layers, channel by channel."""
