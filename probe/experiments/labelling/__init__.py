"""Tasks with a label for each token, on which the paths of a trained network are measured."""
