"""What would change it: other masks, norms, temperatures and skip strengths on the same weights."""
