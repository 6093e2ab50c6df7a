"""What a model is: an observed forward pass, its stacks of blocks, their junctions and branches."""
