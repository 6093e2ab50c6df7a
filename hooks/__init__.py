"""What touches a live model: find its blocks and junctions, gate them, own its attention op, tap its stream."""
