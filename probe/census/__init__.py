"""The census: what can be measured, type by type, on small random models of the whole library."""
