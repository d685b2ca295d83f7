"""Reading and walking FX graphs."""
