"""What the model loses without each of its parts: exact removals, scored by its own task, and proxies beside them."""
