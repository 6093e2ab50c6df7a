"""What other masks, norms, temperatures and skips would change."""
