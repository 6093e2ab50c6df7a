"""The linear maps of attention heads: from what a block attends with to queries, keys and values, and from heads to the stream."""
