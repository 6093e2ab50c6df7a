"""What touches a live model: find its blocks and junctions, gate them, tap its stream."""
