"""Two models side by side: what the blocks of one got is given to the same blocks of the other."""
