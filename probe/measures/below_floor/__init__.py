"""Pure attention below the float floor: its recursion, and the bounds of theorem 2.2."""
