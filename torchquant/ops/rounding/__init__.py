"""Codes one after the other: the innermost loops of algorithms that round weights, in C++ where it can be compiled."""
