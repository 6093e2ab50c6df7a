"""Sections of paths: what those of each length do, and products of attention along them."""
