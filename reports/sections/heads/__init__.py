"""Sections of attention heads."""
