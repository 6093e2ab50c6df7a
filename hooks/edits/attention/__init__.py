"""What is changed of an attention op itself: its mask, its temperature, its pattern."""
