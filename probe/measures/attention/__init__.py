"""The model's own attention: its patterns on the first samples, what their heads do, and which tokens see which."""
