"""Algorithms run over a prepared graph: their contract, their answers, the guard, checkpoints."""
