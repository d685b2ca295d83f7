"""Decoders: export with a static cache, generate, evaluate, and read checkpoints."""
