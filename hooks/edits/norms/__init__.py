"""What stands in place of a norm: what it computes, and other things."""
