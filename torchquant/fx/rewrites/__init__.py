"""Rewrites that keep the function: composite ops as arithmetic, one form for what has several."""
