"""The difference of two models: the same samples through both in lockstep, layer by layer, block by block."""
