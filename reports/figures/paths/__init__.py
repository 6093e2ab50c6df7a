"""Figures of paths: how many of each length, what they carry, and products of attention along them."""
