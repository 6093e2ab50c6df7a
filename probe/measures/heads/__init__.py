"""The ranks of attention heads: of their weights, on data, and what a model loses with less of them."""
