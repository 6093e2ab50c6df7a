"""Embeddings of whole samples: how they lie, how many directions they use, and which layer's find best."""
