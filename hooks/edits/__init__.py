"""What is done to a running model: edits of operands, gates, the attention op, norms; taps of the stream."""
